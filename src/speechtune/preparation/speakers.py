"""Whose voice each piece is: voices by clustering, and pieces that fit none."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from speechtune.family import SpeakerEncoder
from speechtune.preparation.results import Result
from speechtune.preparation.settings import INSTALL, SpeakerSettings
from speechtune.tasks.voice_cloning.support import need
from speechtune.types import Audio

HALVED_SECONDS = 4.0  # halves of shorter pieces say little
MAX_CLUSTERED = 4000  # pieces; their distances take 128 MB, and later pieces go to the nearest voice


class Embedding(Result, frozen=True):
    """The voice of a piece as a vector of length 1, and the cosine of its halves; None of a short piece."""

    vector: tuple[float, ...]
    halves: float | None = None


@dataclass(frozen=True, slots=True)
class Voice:
    """The voice of a piece, "voice-1" and so on by how long each speaks, its cosine to that voice's mean, and
    that of its halves."""

    name: str
    similarity: float
    halves: float | None


def embed(encoder: SpeakerEncoder, audio: Audio) -> Embedding:
    """The voice of a piece; two people who take turns without a pause show in its halves."""
    middle = len(audio.samples) // 2
    parts = [audio]
    if audio.duration_seconds >= HALVED_SECONDS:
        parts += [replace(audio, samples=samples) for samples in (audio.samples[:middle], audio.samples[middle:])]
    whole, *halves = encoder.embed(parts)
    cosine = round(float(halves[0] @ halves[1]), 4) if halves else None
    return Embedding(vector=tuple(whole.round(5).tolist()), halves=cosine)


def find_voices(
    embeddings: Mapping[str, Embedding], seconds: Mapping[str, float], settings: SpeakerSettings
) -> dict[str, Voice]:
    """The voice of each piece, by average linkage over cosines; `seconds` is how long each piece speaks."""
    if not embeddings:
        return {}
    keys = sorted(embeddings)
    vectors = np.array([embeddings[key].vector for key in keys], np.float32)
    few = vectors[:: -(-len(vectors) // MAX_CLUSTERED)]
    labels = np.ones(1, int)
    if len(few) > 1:
        hierarchy = need("scipy.cluster.hierarchy", "voices", INSTALL)
        links = hierarchy.linkage(few, "average", metric="cosine")
        labels = hierarchy.fcluster(links, 1 - settings.same_voice, "distance")
    means = np.stack([few[labels == label].mean(axis=0) for label in np.unique(labels)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    cosines = vectors @ means.T
    nearest = cosines.argmax(axis=1)
    lengths = np.array([seconds[key] for key in keys])
    spoken = [float(lengths[nearest == number].sum()) for number in range(len(means))]
    order = sorted(range(len(means)), key=lambda number: -spoken[number])
    names = {number: f"voice-{rank}" for rank, number in enumerate(order, 1)}
    return {
        key: Voice(names[int(number)], round(float(row[number]), 4), embeddings[key].halves)
        for key, number, row in zip(keys, nearest, cosines, strict=True)
    }

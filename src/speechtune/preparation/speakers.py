"""Whose voice each piece is: voices by clustering, and pieces that fit none."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from speechtune.preparation.results import Result
from speechtune.preparation.settings import INSTALL, SpeakerSettings
from speechtune.tasks.voice_cloning.support import need

MAX_CLUSTERED = 4000  # pieces; their distances take 128 MB, and later pieces go to the nearest voice


class Embedding(Result, frozen=True):
    """A voice as a vector of length 1."""

    vector: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Voice:
    """The voice of a piece, "voice-1" and so on by how long each speaks, and its cosine to that voice's mean."""

    name: str
    similarity: float


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
        key: Voice(names[int(number)], round(float(row[number]), 4))
        for key, number, row in zip(keys, nearest, cosines, strict=True)
    }

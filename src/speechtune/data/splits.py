"""Splitting samples into training and validation sets, by sample or by speaker, reproducibly from a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from speechtune.errors import ManifestError
from speechtune.types import AudioRef, Sample


def split_validation(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(train, held out) by seed, in the order given: nothing heard in training is heard in validation.

    Pronunciation data is split by speaker where every sample names one, else by clip, so that all tasks of a clip stay
    together; everything else by `manifest.split_samples`.

    Raises:
        ManifestError: fewer than two speakers, clips or samples to split.
    """
    if any(sample.pronunciation is None for sample in samples):
        return split_samples(samples, fraction, seed)
    if all(sample.speaker is not None for sample in samples):
        return split_speakers(samples, fraction, seed)
    clips: dict[AudioRef | None, Sample] = {}
    for sample in sorted(samples, key=lambda sample: sample.id):  # the choice must not depend on order
        clips.setdefault(sample.audio, sample)
    held = {sample.audio for sample in split_samples(list(clips.values()), fraction, seed)[1]}
    return [sample for sample in samples if sample.audio not in held], [s for s in samples if s.audio in held]


def split_samples(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(train, held out): a share of whole samples chosen by seed and id, in the order given.

    At least one sample is held out when `fraction` > 0, and at least one is left. The choice does not depend on order.

    Raises:
        ManifestError: fewer than two samples to split.
    """
    if fraction <= 0:
        return list(samples), []
    if len(samples) < 2:
        raise ManifestError(f"cannot hold out {fraction:g} of {len(samples)} sample(s): at least 2 are needed")
    count = min(max(1, round(len(samples) * fraction)), len(samples) - 1)
    ranked = sorted(samples, key=lambda sample: hashlib.sha256(f"{seed}:{sample.id}".encode()).digest())
    held = {sample.id for sample in ranked[:count]}
    return [sample for sample in samples if sample.id not in held], [s for s in samples if s.id in held]


def split_speakers(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(train, held out): a share of the speakers with all their utterances, in the order given.

    At least one speaker is held out when `fraction` > 0, and at least one is left. The choice depends on the seed and
    the speakers' names alone.

    Raises:
        ManifestError: a sample without speaker, or fewer than two speakers to split.
    """
    if fraction <= 0:
        return list(samples), []
    nameless = [sample for sample in samples if sample.speaker is None]
    if nameless:
        raise ManifestError(f"{nameless[0].source}: {nameless[0].id}: no speaker, so speakers cannot be held out")
    speakers = {str(sample.speaker) for sample in samples}
    if len(speakers) < 2:
        raise ManifestError(f"cannot hold out {fraction:g} of {len(speakers)} speaker(s): at least 2 are needed")
    count = min(max(1, round(len(speakers) * fraction)), len(speakers) - 1)
    ranked = sorted(speakers, key=lambda speaker: hashlib.sha256(f"{seed}:{speaker}".encode()).digest())
    held = set(ranked[:count])
    return [s for s in samples if s.speaker not in held], [s for s in samples if s.speaker in held]

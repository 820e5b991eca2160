"""Splitting samples into training and validation sets, by sample or by speaker, reproducibly from a seed."""

import hashlib
from collections.abc import Collection, Sequence

from speechtune.errors import ManifestError
from speechtune.types import AudioRef, Sample


def split_validation(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(train, held out) by seed, in the order given: no clip of training is used in validation.

    Pronunciation data is split by speaker where every sample names one, else by clip, so that all tasks of a clip stay
    together; everything else by `split_samples`.

    Raises ManifestError: fewer than two speakers, clips or samples to split.
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
    """(train, held out): a share of the samples chosen by seed and id, in the order given.

    At least one sample is held out when `fraction` > 0, and at least one is left. The choice does not depend on order.
    """
    held = _choose([sample.id for sample in samples], fraction, seed, "sample")
    return [s for s in samples if s.id not in held], [s for s in samples if s.id in held]


def split_speakers(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(train, held out): a share of the speakers with all their utterances, chosen as by `split_samples`."""
    nameless = next((sample for sample in samples if sample.speaker is None), None)
    if nameless is not None and fraction > 0:
        raise ManifestError(f"{nameless.source}: {nameless.id}: no speaker, so speakers cannot be held out")
    held = _choose({str(sample.speaker) for sample in samples}, fraction, seed, "speaker")
    return [s for s in samples if s.speaker not in held], [s for s in samples if s.speaker in held]


def _choose(names: Collection[str], fraction: float, seed: int, what: str) -> set[str]:
    """The names held out."""
    if fraction <= 0:
        return set()
    if len(names) < 2:
        raise ManifestError(f"cannot hold out {fraction:g} of {len(names)} {what}(s): at least 2 are needed")
    count = min(max(1, round(len(names) * fraction)), len(names) - 1)
    return set(sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())[:count])

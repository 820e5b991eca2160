"""Checks of encoded data as a whole: what is on both sides of an evaluation, and what the base was not made for."""

import numpy as np

from speechtune.cache.encoded_set import EncodedSet
from speechtune.errors import some


def check_sets(train_set: EncodedSet, eval_set: EncodedSet | None, max_positions: int | None) -> list[str]:
    """What makes a run less than it seems, a sentence each: clips on both sides, samples longer than the base is for.

    Clips are compared by content, whatever their files are called.
    """
    found = []
    if eval_set is not None:
        held = {_clip_keys(eval_set, index)[0]: sample.id for index, sample in enumerate(eval_set.samples)}
        trained, used = set[str](), set[str]()
        for index in range(len(train_set)):
            target, references = _clip_keys(train_set, index)
            trained |= {target} & held.keys()
            used |= held.keys() & references
        for keys, what in ((trained, "are trained on"), (used - trained, "are references of training samples")):
            if keys:
                ids = some([held[key] for key in held if key in keys])
                found.append(f"{len(keys)} of {len(held)} clips held out for evaluation {what} too: {ids}")
    long = np.flatnonzero(train_set.lengths > (max_positions or np.inf))
    if len(long):
        ids = some([train_set.samples[int(index)].id for index in long])
        found.append(
            f"{len(long)} samples take more than the {max_positions} positions that the base was made for: {ids}"
        )
    return found


def _clip_keys(encoded: EncodedSet, index: int) -> tuple[str, set[str]]:
    """The key of a sample's target, and those of its references."""
    sample = encoded.samples[index]
    keys = dict(zip(encoded.family.clips(sample), encoded.keys[index], strict=True))
    target = keys.pop(sample.audio, "") if sample.audio else ""
    return target, set(keys.values())

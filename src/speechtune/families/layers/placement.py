"""Token ids of a batch, laid end to end or padded: the part of collating that the families share."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

Layout = Literal["packed", "right", "left"]
"""Samples end to end, or padded on a side."""


def place_ids(
    ids: Sequence[np.ndarray], pad_id: int, layout: Layout
) -> tuple[dict[str, np.ndarray], list[int], tuple[int, ...]]:
    """Put the ids of all samples into one array.

    Returns:
        `input_ids` (1, N) or (B, S), `position_ids` (N,), the `offsets` between samples (B + 1,) and, where they are
        padded, an `attention_mask`; the place of each sample's first id in the flattened batch; the positions that
        each sample takes, padding included.
    """
    sizes = [len(ids_S) for ids_S in ids]
    lengths = sizes if layout == "packed" else [max(sizes)] * len(sizes)
    offsets = np.cumsum([0, *lengths])
    starts = [int(o) + (n - s if layout == "left" else 0) for o, n, s in zip(offsets, lengths, sizes, strict=False)]
    ids_N, real_N = np.full(offsets[-1], pad_id, np.int64), np.zeros(offsets[-1], np.int64)
    for start, ids_S in zip(starts, ids, strict=True):
        ids_N[start : start + len(ids_S)], real_N[start : start + len(ids_S)] = ids_S, 1
    arrays = {
        "input_ids": ids_N.reshape(1 if layout == "packed" else len(ids), -1),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
        "offsets": offsets.astype(np.int32),
    }
    if layout != "packed":
        arrays["attention_mask"] = real_N.reshape(len(ids), -1)
    return arrays, starts, tuple(lengths)

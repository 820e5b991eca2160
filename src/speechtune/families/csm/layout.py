"""Prompts and batches of CSM: turns of text and codes, targets, and codes out of generated rows.

Shapes: S positions, F frames of a clip, A audio rows (frames and ends of clips), P of them targets, K codebooks.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from speechtune.errors import ManifestError
from speechtune.families.layers.decoder import Layout, place_ids
from speechtune.types import Sample

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
AUDIO, AUDIO_END = "<|AUDIO|>", "<|audio_eos|>"
SPECIAL = re.compile(r"<\|[^|<>]+\|>")


def render_turns(sample: Sample) -> list[str]:
    """The text of every turn, the target's last; training and generation both come through here.

    A turn is its text and then its clip; every reference is an earlier turn of the same speaker. A speaker that is a
    number is that number, any other is 0. Texts that would be read as more than text are refused.
    """
    texts = [*(reference.text for reference in sample.references), sample.text]
    for text in texts:
        if token := SPECIAL.search(text):
            raise ManifestError(f"{sample.source or sample.id}: the text holds the special token {token.group()!r}")
    number = sample.speaker if sample.speaker and re.fullmatch("[0-9]+", sample.speaker) else "0"
    return [f"{BEGIN}[{int(number)}]{text.strip()}{END}" for text in texts]


def cut_rows(rows_FK: np.ndarray, end_code: int) -> tuple[np.ndarray, bool]:
    """Codes before the end of speech, and whether one was generated.

    It is the first row with the end's code in all codebooks but the last, which is the native class's rule; what
    follows it in a batch, while others still speak, is noise.
    """
    ends = np.flatnonzero((rows_FK[:, :-1] == end_code).all(axis=1))
    return (rows_FK[: ends[0]], True) if len(ends) else (rows_FK, False)


def lay_out(
    items: Sequence[Mapping[str, np.ndarray]], audio_ids: tuple[int, int], pad_id: int, layout: Layout
) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
    """A batch of prompts, or of training samples, and the positions that each takes.

    Each is its `input_ids` (S,), its `audio_rows` (A, K), and for training `num_targets`, how many of these, the last,
    are targets; `audio_ids` are the ids that stand where rows go. Besides what `layers.decoder.place_ids` gives:

    - `audio_rows` (A, K) and `audio_places` (A,): codes, and where in the flattened batch they go;
    - with targets `kept` (P,): the positions before the target rows; `targets` (P, K); and which of these are `frames`,
      which `ends` of speech.
    """
    arrays, starts, lengths = place_ids([item["input_ids"] for item in items], pad_id, layout)
    places = [
        start + np.flatnonzero(np.isin(item["input_ids"], audio_ids)) for start, item in zip(starts, items, strict=True)
    ]
    arrays["audio_places"] = np.concatenate(places)
    arrays["audio_rows"] = np.concatenate([item["audio_rows"] for item in items]).astype(np.int64)
    if "num_targets" in items[0]:
        counts = [int(item["num_targets"]) for item in items]
        kept = [places_A[-count:] - 1 for places_A, count in zip(places, counts, strict=True)]
        targets = [item["audio_rows"][-count:] for item, count in zip(items, counts, strict=True)]
        ends = np.cumsum(counts) - 1
        arrays |= {"kept": np.concatenate(kept), "targets": np.concatenate(targets).astype(np.int64)}
        arrays |= {"frames": np.setdiff1d(np.arange(sum(counts)), ends), "ends": ends}
    return {name: torch.from_numpy(value) for name, value in arrays.items()}, lengths

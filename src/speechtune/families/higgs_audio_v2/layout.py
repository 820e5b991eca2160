"""Prompts and batches of Higgs Audio v2: text, codes in the delay pattern, labels, and codes out of generated rows.

Shapes: F frames of a clip, K codebooks, R = F + K + 1 rows.
"""

import re
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import HiggsAudioV2Config

from speechtune.errors import ManifestError
from speechtune.families.layers.decoder import place_ids
from speechtune.families.layers.ops import IGNORE
from speechtune.types import Sample

DEFAULT_SYSTEM = "Generate audio following instruction."
DEFAULT_SCENE = "Audio is recorded from a quiet room."
AUDIO = "<|AUDIO_OUT|>"
SPECIAL = re.compile(r"<\|[^|<>]+\|>")


def render_prompt(sample: Sample, *, with_target: bool) -> str:
    """The conversation as one string with a placeholder per clip; training and generation both come through here.

    Every reference is an earlier user/assistant turn. With `with_target` the target's turn follows in full, else the
    string ends where the model goes on with audio. Texts that would be read as more than text are refused.
    """
    for text in (sample.text, sample.system, sample.scene, *(reference.text for reference in sample.references)):
        if text and (token := SPECIAL.search(text)):
            raise ManifestError(f"{sample.source or sample.id}: the text holds the special token {token.group()!r}")
    system = DEFAULT_SYSTEM if sample.system is None else sample.system.strip()
    scene = sample.scene.strip() if sample.scene is not None else DEFAULT_SCENE if sample.system is None else None
    scene_part = "" if scene is None else f"\n\n<|scene_desc_start|>\n{scene}\n<|scene_desc_end|>"
    turns = [f"<|begin_of_text|>{_header('system')}{system}{scene_part}<|eot_id|>"]
    spoken = f"<|audio_out_bos|>{AUDIO}<|audio_eos|><|eot_id|>"
    for reference in sample.references:
        turns.append(f"{_header('user')}{reference.text.strip()}<|eot_id|>{_header('assistant')}{spoken}")
    answer = spoken if with_target else "<|audio_out_bos|>"
    turns.append(f"{_header('user')}{sample.text.strip()}<|eot_id|>{_header('assistant')}{answer}")
    return "".join(turns)


def _header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def delay_rows(codes_FK: np.ndarray, bos: int, eos: int) -> np.ndarray:
    """Put [BOS | codes | EOS] into the delay pattern: codebook k is shifted k rows down; int64 of (F + K + 1, K).

    BOS stands above and EOS below each codebook's shifted column.
    """
    num_frames, num_codebooks = codes_FK.shape
    rows_RK = np.full((num_frames + num_codebooks + 1, num_codebooks), eos, dtype=np.int64)
    for k in range(num_codebooks):
        rows_RK[: k + 1, k] = bos
        rows_RK[k + 1 : k + 1 + num_frames, k] = codes_FK[:, k]
    return rows_RK


def row_labels(rows_RK: np.ndarray, num_frames: int) -> np.ndarray:
    """Labels of the rows of a target clip: its codes, and EOS exactly once per codebook; all else -100.

    An EOS that is never supervised gives a voice that never stops; one supervised in every later row drowns the codes.
    """
    labels_RK = np.full_like(rows_RK, IGNORE)
    for k in range(rows_RK.shape[1]):
        supervised = slice(k + 1, k + num_frames + 2)
        labels_RK[supervised, k] = rows_RK[supervised, k]
    return labels_RK


def cut_rows(rows_RK: np.ndarray, eos: int) -> np.ndarray:
    """Generated rows up to and including the first that is all EOS; samples that ended go on with it in a batch."""
    finished = np.flatnonzero((rows_RK == eos).all(axis=1))
    return rows_RK[: finished[0] + 1] if len(finished) else rows_RK


def undelay(rows_RK: np.ndarray, eos: int, codebook_size: int) -> tuple[np.ndarray, bool]:
    """Codes (F, K) of generated rows, whose first is all BOS, and whether an EOS ended them with every frame complete.

    The clip ends where codebook 0 says EOS, or at the last complete frame where the length cap cut the rows.
    Stream ids drawn by a later codebook inside the clip are clipped to the last code, as the native decoder does.
    """
    num_rows, num_codebooks = rows_RK.shape
    ends = np.flatnonzero(rows_RK[:, 0] == eos)
    complete_frames = max(num_rows - num_codebooks, 0)
    stopped = len(ends) > 0 and int(ends[0]) - 1 <= complete_frames  # a cap may cut between the codebooks' ends
    num_frames = int(ends[0]) - 1 if stopped else complete_frames
    num_frames = max(num_frames, 0)
    codes_FK = np.stack([rows_RK[k + 1 : k + 1 + num_frames, k] for k in range(num_codebooks)], axis=1)
    return np.clip(codes_FK, 0, codebook_size - 1), stopped


def pad_inputs(
    prompts: Sequence[tuple[np.ndarray, np.ndarray]], pad_id: int, eos: int, *, left: bool
) -> dict[str, torch.Tensor]:
    """Stack prompts, each of token ids (S,) and rows (R, K), for the native forward pass.

    The rows are filled up with `eos` always on their right, as the native class expects; the ids on their `left` where
    generation must go on at the right edge.
    """
    placed, _, _ = place_ids([ids for ids, _ in prompts], pad_id, "left" if left else "right")
    rows = [torch.from_numpy(rows_RK.astype(np.int64)) for _, rows_RK in prompts]
    num_rows_B = torch.tensor([len(rows_RK) for rows_RK in rows])
    rows_BRK = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=eos)
    return {
        "input_ids": torch.from_numpy(placed["input_ids"]),
        "attention_mask": torch.from_numpy(placed["attention_mask"]),
        "audio_input_ids": rows_BRK,
        "audio_input_ids_mask": torch.arange(rows_BRK.shape[1]) < num_rows_B[:, None],
    }


def target_arrays(
    ids_S: np.ndarray, rows_RK: np.ndarray, num_frames: int, num_last_tokens: int
) -> dict[str, np.ndarray]:
    """Arrays of a training sample: ids, rows, and the targets with the positions whose hidden states predict them.

    `rows_RK` are the delayed rows of all clips, the target's with `num_frames` frames last; `num_last_tokens` text
    tokens stand behind them.
    """
    num_rows = num_frames + rows_RK.shape[1] + 1
    after_rows = len(ids_S) - num_last_tokens
    first_row = after_rows - num_rows
    labels_RK = row_labels(rows_RK[-num_rows:], num_frames)
    text_targets = np.asarray([first_row - 1, *range(after_rows, len(ids_S))])
    return {
        "input_ids": ids_S,
        "audio_rows": rows_RK.astype(np.int16),
        "audio_positions": np.arange(first_row, after_rows - 1),  # row t predicts row t + 1; row 0 is all BOS
        "audio_targets": labels_RK[1:].astype(np.int16),
        "text_positions": text_targets - 1,
        "text_targets": ids_S[text_targets],
    }


def lay_out(
    items: Sequence[Mapping[str, np.ndarray]], config: HiggsAudioV2Config, *, packed: bool
) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
    """A batch of what `target_arrays` returns, end to end or padded on the right, and the positions each sample takes.

    `input_ids` is (1, N) or (B, S), `audio_rows` (A, K) are all rows in order; the others are described in
    `layers.decoder.Sorting`. Positions of targets count in the flattened batch; text targets are sorted so that those
    predicted by audio rows come first.
    """
    pad_id = cast(int, config.pad_token_id)
    arrays, starts, lengths = place_ids([item["input_ids"] for item in items], pad_id, "packed" if packed else "right")
    ids_N = arrays["input_ids"].ravel()
    is_audio_N = np.isin(ids_N, (config.audio_token_id, config.audio_delay_token_id))
    order_N = np.concatenate([np.flatnonzero(is_audio_N), np.flatnonzero(~is_audio_N)])
    places_N = np.empty_like(order_N)
    places_N[order_N] = np.arange(len(order_N))
    positions = {
        head: np.concatenate([start + item[f"{head}_positions"] for start, item in zip(starts, items, strict=True)])
        for head in ("audio", "text")
    }
    targets = {head: np.concatenate([item[f"{head}_targets"] for item in items]).astype(np.int64) for head in positions}
    audio_first = np.argsort(~is_audio_N[positions["text"]], kind="stable")
    positions["text"], targets["text"] = positions["text"][audio_first], targets["text"][audio_first]
    kept_P = np.concatenate(list(positions.values()))
    kept_audio, kept_text = (places_N[kept_P[is_audio_N[kept_P] == audio]] for audio in (True, False))
    arrays |= {
        "audio_rows": np.concatenate([item["audio_rows"] for item in items]).astype(np.int64),
        "text_ids": ids_N[~is_audio_N],
        "order": order_N,
        "places": places_N,
        "kept": kept_P,
        "kept_audio": kept_audio,
        "kept_text": kept_text - int(is_audio_N.sum()),
    }
    arrays |= {f"{head}_positions": value for head, value in positions.items()}
    arrays |= {f"{head}_targets": value for head, value in targets.items()}
    return {name: torch.from_numpy(value) for name, value in arrays.items()}, lengths

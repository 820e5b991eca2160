"""What several test files need. The Higgs Audio v2 part is written without speechtune: tests compare against it.

Shapes: B samples, S positions, R audio rows, K codebooks, F frames.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

CODEBOOKS = 8
STREAM_BOS, STREAM_EOS = 1024, 1025
IGNORED = -100
FILLER = "<|reserved_special_token_6|>"
WAYS = [
    {"batch": {"packing": packing}, "speed": {"fast_forward": fast}}
    for packing in (True, False)
    for fast in (True, False)
]
"""Sections of the configuration: every way to compute the same training step."""
FORWARD_NAMES = ("input_ids", "attention_mask", "audio_input_ids", "audio_input_ids_mask")


@dataclass(frozen=True)
class DemoClip:
    """One row of the shipped clips.jsonl, its audio as an absolute path."""

    path: Path
    text: str
    speaker: str
    language: str
    duration_seconds: float


def read_demo_clips() -> list[DemoClip]:
    """All shipped demo clips, in file order."""
    folder = Path(str(files("speechtune"))) / "assets" / "demo-voices"
    rows = [json.loads(line) for line in (folder / "clips.jsonl").read_text(encoding="utf-8").splitlines() if line]
    return [
        DemoClip(folder / row["audio"], row["text"], row["speaker"], row["language"], row["duration_seconds"])
        for row in rows
    ]


def read_records(output_dir: Path) -> list[dict[str, Any]]:
    """All records of a run's metrics.jsonl, in order."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def merged(defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings laid over one another."""
    result = dict(defaults)
    for key, value in overrides.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


@dataclass(frozen=True)
class Utterance:
    """A target with its reference: texts, and codes of shape (F, K)."""

    text: str
    codes: np.ndarray
    reference_text: str
    reference_codes: np.ndarray

    @property
    def rows(self) -> int:
        """Rows the target takes: BOS, its frames, EOS, and seven more by the delay."""
        return len(self.codes) + 9


def prompt_text(utterance: Utterance, *, with_target: bool) -> str:
    """The prompt as the model's authors write it, a placeholder per clip."""
    text = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nGenerate audio following instruction.\n\n"
        "<|scene_desc_start|>\nAudio is recorded from a quiet room.\n<|scene_desc_end|><|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{utterance.reference_text}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|><|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{utterance.text}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>"
    )
    return text + "<|AUDIO_OUT|><|audio_eos|><|eot_id|>" if with_target else text


def delayed_rows(codes_FK: np.ndarray, *, delay: bool = True) -> np.ndarray:
    """[BOS | codes | EOS] of each codebook k, put k rows lower; cell by cell."""
    frames = len(codes_FK)
    shifts = [k if delay else 0 for k in range(CODEBOOKS)]
    rows = []
    for row in range(frames + 2 + max(shifts)):
        cells = []
        for k in range(CODEBOOKS):
            frame = row - shifts[k] - 1
            cells.append(STREAM_BOS if frame < 0 else STREAM_EOS if frame >= frames else int(codes_FK[frame, k]))
        rows.append(cells)
    return np.asarray(rows)


def undelayed(rows_RK: np.ndarray, frames: int) -> np.ndarray:
    """Codes of the first `frames` frames in delayed rows, whatever stands there; rows that are absent count as -1."""
    codes = np.full((frames, CODEBOOKS), -1)
    for frame in range(frames):
        for k in range(CODEBOOKS):
            if frame + k + 1 < len(rows_RK):
                codes[frame, k] = rows_RK[frame + k + 1, k]
    return codes


def expanded_prompt(utterance: Utterance, *, with_target: bool, delay: bool = True) -> tuple[str, np.ndarray]:
    """The prompt with a token name per row in place of each placeholder, and the rows of its clips."""
    clips = [utterance.reference_codes, utterance.codes] if with_target else [utterance.reference_codes]
    text = prompt_text(utterance, with_target=with_target)
    fillers = FILLER * (CODEBOOKS - 1) if delay else ""
    head, *tails = text.split("<|AUDIO_OUT|>")
    for clip, tail in zip(clips, tails, strict=True):
        head += "<|AUDIO_OUT|>" * (len(clip) + 2) + fillers + tail
    return head, np.concatenate([delayed_rows(clip, delay=delay) for clip in clips])


def native_batch(
    tokenizer: PreTrainedTokenizerBase,
    utterances: Sequence[Utterance],
    *,
    with_target: bool = True,
    delay: bool = True,
    left: bool = False,
) -> dict[str, torch.Tensor]:
    """Inputs of the native class: each prompt tokenized in one go, padded on one side; rows padded on the right."""
    prompts = [expanded_prompt(utterance, with_target=with_target, delay=delay) for utterance in utterances]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in prompts]
    width, height = max(map(len, ids)), max(len(rows) for _, rows in prompts)
    batch = {
        "input_ids": torch.full((len(ids), width), int(tokenizer.pad_token_id)),  # type: ignore[arg-type]
        "attention_mask": torch.zeros(len(ids), width, dtype=torch.long),
        "audio_input_ids": torch.full((len(ids), height, CODEBOOKS), STREAM_EOS),
        "audio_input_ids_mask": torch.zeros(len(ids), height, dtype=torch.bool),
    }
    for b, (tokens, (_, rows)) in enumerate(zip(ids, prompts, strict=True)):
        where = slice(width - len(tokens), width) if left else slice(0, len(tokens))
        batch["input_ids"][b, where] = torch.tensor(tokens)
        batch["attention_mask"][b, where] = 1
        batch["audio_input_ids"][b, : len(rows)] = torch.from_numpy(rows)
        batch["audio_input_ids_mask"][b, : len(rows)] = True
    return batch


def overfit(parameters: Iterable[nn.Parameter], loss: Callable[[], torch.Tensor], steps: int, rate: float) -> float:
    """Plain AdamW on one batch; returns the last loss."""
    chosen = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
    value = torch.zeros(())
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
    return float(value.detach())

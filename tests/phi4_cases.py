"""Cases for the Phi-4-multimodal tests: real speech with answers made up for it, and the family's side of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, Phi4MultimodalFeatureExtractor

from helpers import DemoClip, merged
from speechtune.audio import read_audio
from speechtune.config import RunConfig
from speechtune.families import build_config
from speechtune.families.phi4_multimodal.family import Phi4MultimodalFamily
from speechtune.families.phi4_multimodal.prompts import CONTROL_TOKENS, RUBRICS
from speechtune.precision import PrecisionPlan
from speechtune.tasks.pronunciation.phones import PHONES
from speechtune.tasks.pronunciation.targets import target_of, task_of
from speechtune.types import AudioRef, Encoded, Pronunciation, Sample

FP32 = PrecisionPlan("fp32", torch.device("cpu"), torch.float32, None, False, "test")
OVERFIT_STEPS = 160


def family_on(base: Path, **overrides: Any) -> Phi4MultimodalFamily:
    """The family on a model folder, without a run directory."""
    values = merged({"family": "phi4_multimodal", "model": {"path": str(base)}}, overrides)
    return Phi4MultimodalFamily(build_config(values, "test"))


def answers(number: int) -> dict[str, dict[str, Any]]:
    """Answers to both tasks that tell one clip from another."""
    steps = {"accuracy": 1, "fluency": 3, "prosodic": 5, "total": 7}
    scores = {name: (number * step) % 11 for name, step in steps.items()}
    phones = " ".join(PHONES[(number * 5 + i * (number + 1)) % len(PHONES)] for i in range(4))
    return {"APA": scores, "MDD": {"word_transcript": f"clip {number}", "phoneme_transcript": phones}}


def samples_of(clips: Sequence[DemoClip], seconds: float = 1.2) -> list[Sample]:
    """Two task samples per clip, cut to the first part of its speech, each a little longer than the one before."""
    return [
        Sample(
            f"{number}#{task}",
            clip.text,
            AudioRef(path=str(clip.path), offset_seconds=0.2, duration_seconds=round(seconds + 0.13 * number, 2)),
            pronunciation=Pronunciation(task, answer),
        )
        for number, clip in enumerate(clips)
        for task, answer in answers(number).items()
    ]


def write_rows(path: Path, samples: Sequence[Sample]) -> Path:
    """The samples as JSONL of {audio, text, task, target}."""
    rows = [
        {
            "id": sample.id,
            "audio": sample.audio.path,
            "offset": sample.audio.offset_seconds,
            "duration": sample.audio.duration_seconds,
            "text": sample.text,
            "task": task_of(sample),
            "target": target_of(sample),
        }
        for sample in samples
        if sample.audio is not None
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encoded(family: Phi4MultimodalFamily, samples: Sequence[Sample]) -> list[Encoded]:
    """Samples with their features, without a cache."""
    return [family.encode(sample, features(family, sample)) for sample in samples]


def features(family: Phi4MultimodalFamily, sample: Sample) -> list[np.ndarray]:
    """The features of a sample's clips."""
    return family.encode_audio([read_audio(ref, family.sampling_rate) for ref in family.clips(sample)])


def run_config(folder: Path, base: Path, rows: Path, **overrides: Any) -> RunConfig:
    """A recipe that learns a few samples by heart."""
    values = {
        "family": "phi4_multimodal",
        "output_dir": folder / "run",
        "model": {"path": str(base)},
        "data": {"train": rows, "cache_dir": folder / "cache"},
        "lora": {"rank": 32, "alpha": 64, "dropout": 0.0, "targets": "language+audio"},
        "train": {"max_steps": OVERFIT_STEPS, "batch_size": 16, "learning_rate": 4e-3, "warmup_steps": 20},
        "tracking": {"trackers": (), "log_every_steps": 40},
    }
    return build_config(merged(values, overrides), "test")


def native_inputs(folder: Path, sample: Sample) -> dict[str, torch.Tensor]:
    """What plain transformers wants for one sample: its own extractor, and the prompt put together here."""
    assert sample.audio is not None
    audio = read_audio(sample.audio, 16_000).samples
    found = Phi4MultimodalFeatureExtractor.from_pretrained(folder)(audio, sampling_rate=16_000, return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task = task_of(sample)
    text = f"<|user|>{'<|audio|>' * int(found['audio_embed_sizes'][0])}{CONTROL_TOKENS[task]}{RUBRICS[task]}<|end|>"
    ids = tokenizer(f"{text}<|assistant|>", return_tensors="pt", add_special_tokens=False)
    return {
        "input_ids": ids["input_ids"],
        "attention_mask": ids["attention_mask"],
        "audio_input_features": found["audio_input_features"],
        "audio_embed_sizes": found["audio_embed_sizes"],
    }


@torch.no_grad()
def native_logits(model: nn.Module, folder: Path, sample: Sample) -> torch.Tensor:
    """Logits (1, S, V) of plain transformers on one sample's prompt."""
    return model(**native_inputs(folder, sample)).logits


@torch.no_grad()
def native_answer(model: Any, folder: Path, sample: Sample, max_new_tokens: int = 120) -> str:
    """Text that plain transformers generates, up to and including its end."""
    inputs = native_inputs(folder, sample)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return AutoTokenizer.from_pretrained(folder).decode(ids[0, inputs["input_ids"].shape[1] :])

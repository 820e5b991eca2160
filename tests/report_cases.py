"""Run directories as training leaves them, made without training, for the tests of `speechtune report`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from helpers import DemoClip
from speechtune.audio import read_audio, write_wav
from speechtune.storage.files import file_blake3
from speechtune.types import Audio, AudioRef

HIGGS = {
    "heads": ("audio", "text"),
    "scores": {
        "wer": (1.4, 0.12),
        "sim": (0.31, 0.82),
        "mos": (2.1, 3.9),
        "stop_rate": (0.2, 1.0),
        "duration_ratio": (2.4, 1.03),
        **{f"codebook_accuracy_{k}": (0.02, 0.7 - 0.06 * k) for k in range(8)},
    },
}
PHI4 = {
    "heads": ("text",),
    "scores": {
        **{f"pcc_{name}": (0.1, 0.7) for name in ("accuracy", "fluency", "prosodic", "total")},
        "wer": (0.3, 0.05),
        "per": (0.4, 0.08),
        "mdd_f1": (0.05, 0.61),
        "parse_rate": (0.6, 1.0),
    },
}


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def step_record(step: int, total: int, heads: Sequence[str], start: float = 20.0) -> dict[str, Any]:
    """A training record with losses that fall and a rate that warms up and decays."""
    fall = start * math.exp(-4 * step / total) + 0.5 + 0.2 * math.sin(step)
    losses = {head: fall / (n + 1) for n, head in enumerate(heads)}
    rate = 1e-3 * min(step / (0.1 * total), 0.5 + 0.5 * math.cos(math.pi * step / total))
    return {
        "step": step,
        "epoch": step / 10,
        "loss": sum(losses.values()),
        "losses": losses,
        "learning_rate": rate,
        "grad_norm": 1 + fall,
        "audio_seconds_per_second": 40 + math.sin(step / 3),
        "tokens_per_second": 5000 + 100 * math.cos(step),
        "data_wait_share": 0.03,
        "eta_seconds": float(total - step),
    }


def evaluation_record(step: int, total: int, kind: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation record whose scores go from the base's to the trained model's."""
    share = step / total
    scores = {name: first + (last - first) * share for name, (first, last) in kind["scores"].items()}
    losses = {head: 9.0 - 8 * share for head in kind["heads"]}
    loss = sum(losses.values())
    return {"step": step, "eval_loss": loss, "eval_losses": losses, "eval_seconds": 2.5, "scores": scores, "seconds": 9}


def write_checkpoint(folder: Path, step: int, content: bytes = b"weights" * 100) -> Path:
    """A checkpoint folder with a manifest that fits."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(content)
    files = [
        {"name": f.name, "bytes": f.stat().st_size, "blake3": file_blake3(f)}
        for f in (path / "adapter_model.safetensors",)
    ]
    write_json(path / "MANIFEST.json", {"files": files})
    return path


def make_config(folder: Path, family: str = "higgs_audio_v2", **train: Any) -> dict[str, Any]:
    """A resolved configuration, as far as a report reads it."""
    return {
        "family": family,
        "output_dir": str(folder),
        "model": {"path": "/models/base", "revision": None},
        "data": {"train": "/data/train.json", "eval": None, "validation_split": 0.1},
        "lora": {"enabled": True, "rank": 32, "alpha": 64.0, "dropout": 0.05, "targets": "all", "dora": False},
        "train": {
            "max_steps": 60,
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "warmup_steps": 6,
            "precision": "auto",
            "seed": 42,
            **train,
        },
    }


def make_bare_run(folder: Path, steps: int = 30, total: int = 60, **train: Any) -> Path:
    """What an unfinished run has: its configuration and its records."""
    folder.mkdir(parents=True)
    config = make_config(folder, max_steps=total, **train)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", (step_record(s, total, HIGGS["heads"]) for s in range(1, steps + 1)))
    return folder


def make_run(
    folder: Path, clips: Sequence[DemoClip] = (), kind: Mapping[str, Any] = HIGGS, total: int = 60, **train: Any
) -> Path:
    """A finished run with every file that training writes; `clips` become prompts."""
    folder.mkdir(parents=True)
    family = "higgs_audio_v2" if kind is HIGGS else "phi4_multimodal"
    config = make_config(folder, family, max_steps=total, **train)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    evaluations = [evaluation_record(step, total, kind) for step in range(0, total + 1, total // 3)]
    training = [step_record(step, total, kind["heads"]) for step in range(1, total + 1)]
    write_lines(folder / "metrics.jsonl", sorted([*evaluations, *training], key=lambda r: (r["step"], "scores" in r)))
    state = {
        "step": total,
        "total_steps": total,
        "identity": {"dataset": "d" * 64, "base": "b" * 64, "global_batch": 8, "lora": {"targets": ".*q_proj"}},
        "best_step": total,
        "best_value": 1.0,
    }
    write_json(folder / "trainer_state.json", state)
    write_json(folder / "run_info.json", run_info())
    write_json(folder / "summary.json", summary())
    write_lines(folder / "warnings.jsonl", [{"step": 20, "kind": "evaluation", "message": "stop_rate fell to 0"}])
    write_checkpoint(folder, total // 3)
    write_checkpoint(folder, total)
    write_samples(folder / "samples", clips, [0, total // 3, 2 * total // 3, total])
    return folder


def run_info() -> dict[str, Any]:
    """run_info.json."""
    return {
        "speechtune": "0.1.0",
        "versions": {"torch": "2.13.0", "transformers": "5.17.0", "peft": "0.17.0", "python": "3.11.7"},
        "hardware": {"device": "cuda", "name": "NVIDIA H200", "count": 2, "cpu": "EPYC", "memory_bytes": 137 * 10**9},
        "precision": "bf16 on cuda: adapters float32",
        "base": {"path": "/models/base", "revision": "abc123", "fingerprint": "b" * 64},
        "data": {
            "fingerprint": "d" * 64,
            "samples": 812,
            "hours": 1.75,
            "speakers": 4,
            "languages": {"en": 500, "ru": 312},
            "eval_samples": 90,
        },
        "parameters": [
            {"component": "attention", "total": 55296, "trainable": 43008},
            {"component": "embeddings", "total": 223968, "trainable": 0},
        ],
        "command": ["speechtune", "train", "my recipe.yaml", "train.seed=42"],
        "started": "2026-11-20T10:00:00+00:00",
        "world_size": 2,
    }


def summary() -> dict[str, Any]:
    """summary.json."""
    return {
        "speechtune": "0.1.0",
        "seconds": 3700.0,
        "proof": {"lora_b_total": 20, "lora_b_moved": 20, "base_unchanged": True, "trainable_parameters": 43008},
        "best_checkpoint": "checkpoint-60",
        "reproduce": "speechtune train 'my recipe.yaml' train.seed=42",
        "time": {
            "data_seconds": 100.0,
            "forward_backward_seconds": 2500.0,
            "optimizer_seconds": 300.0,
            "evaluation_seconds": 600.0,
            "checkpoint_seconds": 60.0,
            "total_seconds": 3700.0,
        },
    }


def write_samples(folder: Path, clips: Sequence[DemoClip], steps: Sequence[int]) -> None:
    """Prompts, references, and for each step real speech that stands for what the model said."""
    prompts = [
        {"id": f"p{n}", "text": c.text, "speaker": c.speaker, "language": c.language} for n, c in enumerate(clips)
    ]
    write_lines(folder / "prompts.jsonl", prompts)
    for name in ("reference", *(f"step-{step}" for step in steps)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for n, clip in enumerate(clips):
            audio = read_audio(AudioRef(str(clip.path)), 24_000)
            noisy = audio.samples[::-1].copy() if name == "step-0" else audio.samples
            write_wav(folder / name / f"p{n}.wav", Audio(noisy, 24_000))
    for step in steps:
        rows = [
            {"id": f"p{n}", "transcript": clip.text.lower(), "wer": 1 - step / (steps[-1] or 1), "sim": 0.8, "mos": 3.6}
            | {"stopped": step > 0, "seconds": clip.duration_seconds, "duration_ratio": 1.02}
            for n, clip in enumerate(clips)
        ]
        write_lines(folder / f"step-{step}" / "scores.jsonl", rows)

"""Fixtures of the issue tests: a tiny Phi-4-multimodal with real speech, and recipes on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import DemoClip, merged
from speechtune.config import RunConfig
from speechtune.families import build_config
from speechtune.families.phi4_multimodal import tiny as tiny_phi4

SCORES = {"accuracy": 7, "fluency": 3, "prosodic": 5, "total": 6}
PHONES = {"word_transcript": "one", "phoneme_transcript": "W AH N"}


@pytest.fixture(scope="session")
def phi4_base(tmp_path_factory: pytest.TempPathFactory, demo_clips: list[DemoClip]) -> Path:
    """A tiny Phi-4-multimodal with a speech LoRA of rank 4; do not write to it."""
    folder = tmp_path_factory.mktemp("phi4-issues") / "base"
    tiny_phi4.make_model(folder, [clip.text for clip in demo_clips[:8]], output_scale=10.0, speech_lora_rank=4)
    return folder


@pytest.fixture
def phi4_copy(phi4_base: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(phi4_base, tmp_path / "model"))


@pytest.fixture(scope="session")
def phi4_rows(tmp_path_factory: pytest.TempPathFactory, demo_clips: list[DemoClip]) -> Path:
    """Four pieces of real speech with both tasks, as JSONL."""
    rows = [
        {
            "id": f"clip-{number}#{task}",
            "audio": str(clip.path),
            "offset": 0.2,
            "duration": round(1.0 + 0.13 * number, 2),
            "text": clip.text,
            "task": task,
            "target": target,
        }
        for number, clip in enumerate(demo_clips[:4])
        for task, target in (("APA", SCORES), ("MDD", PHONES))
    ]
    path = tmp_path_factory.mktemp("phi4-issue-data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def phi4_config(
    tmp_path: Path, phi4_base: Path, phi4_rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., RunConfig]:
    """Build a recipe of three steps; keyword arguments are sections laid over it."""

    def build(**sections: Any) -> RunConfig:
        defaults = {
            "family": "phi4_multimodal",
            "output_dir": tmp_path / "run",
            "model": {"path": str(phi4_base)},
            "data": {"train": phi4_rows, "cache_dir": tmp_path_factory.getbasetemp() / "phi4-cache"},
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "language"},
            "train": {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1},
            "checkpoint": {"every_steps": 1},
            "tracking": {"trackers": ()},
        }
        return build_config(merged(defaults, sections), "test")

    return build

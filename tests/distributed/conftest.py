"""Fixtures of complete runs: the tiny Higgs on real speech, and its plain run that others are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import train
from runs import STEPS, Configure

from helpers import DemoClip, merged
from speechtune.families import build_config


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Also where there is a GPU: another precision and order of sums would be another test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with on_the_cpu():
        yield


@pytest.fixture(scope="session")
def configure(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: Path,
    cache_dir: Path,
    demo_clips: Sequence[DemoClip],
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
) -> Configure:
    """Build a configuration for an output folder: 11 clips to train on, 3 to evaluate on, global batches of 8."""
    folder = tmp_path_factory.mktemp("equivalence")
    short = sorted(demo_clips, key=lambda clip: clip.duration_seconds)[:14]
    defaults = {
        "family": "higgs_audio_v2",
        "model": {"path": str(tiny_base / "model"), "codec_path": str(tiny_base / "codec")},
        "data": {
            "train": write_chatml(folder / "train.json", short[:11]),
            "eval": write_chatml(folder / "eval.json", short[11:]),
            "cache_dir": cache_dir,
        },
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "train": {"max_steps": STEPS, "batch_size": 8, "learning_rate": 5e-3},
        "evaluate": {"every_steps": 3, "batch_size": 2, "prompts": 0},
        "checkpoint": {"every_steps": 2, "resume": "auto"},
        "tracking": {"trackers": ()},
    }
    return lambda output_dir, *more: build_config(_all_merged(defaults, {"output_dir": output_dir}, *more), "test")


def _all_merged(*parts: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for part in parts:
        result = merged(result, part)
    return result


@pytest.fixture(scope="session")
def straight(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directory of the plain run: one process, batches of 8, no dropout."""
    output = tmp_path_factory.mktemp("straight") / "output"
    with on_the_cpu():
        train(configure(output))
    return output

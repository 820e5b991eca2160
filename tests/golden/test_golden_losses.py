"""Losses of the first ten steps, per family, pinned in full digits: what training computes changes only on purpose.

The runs go the whole way from manifest to loop on the tiny base. Only the codec is left out: made-up codes stand for
its own, because a code is the nearest of 1024 vectors, and another CPU's rounding may find another one nearest. Dropout
is off: its random numbers differ between CPU makers.

The losses are compared within 1e-5 of their value: CPUs sum in different orders (vector width, threads), which shows in
the seventh digit of a float32, and ten steps of training carry it on. A change of the labels, the order of samples, the
learning rate or the initialisation moves them by a hundred times as much.

To accept a change: `SPEECHTUNE_UPDATE_GOLDEN=1 pytest tests/golden`, then say in CHANGELOG.md what changed and why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import speechtune.run
from helpers import DemoClip
from speechtune.config import RunConfig
from speechtune.families.base import Audio
from speechtune.families.higgs_audio_v2 import HiggsAudioV2Family
from speechtune.run import run_training
from speechtune.tracking import read_records

GOLDEN = Path(__file__).with_name("higgs_audio_v2.json")
UPDATE = "SPEECHTUNE_UPDATE_GOLDEN"
STEPS = 10
TOLERANCE = 1e-5
SAMPLES_PER_FRAME = 960


class MadeUpCodes(HiggsAudioV2Family):
    """The family with codes that follow from a clip's length alone: as many frames, each a repeatable jumble."""

    encode_key = "made-up codes for tests/golden"

    def encode_audio(self, audios: Sequence[Audio]) -> list[np.ndarray]:
        return [self._codes(len(audio.samples) // SAMPLES_PER_FRAME) for audio in audios]

    def _codes(self, num_frames: int) -> np.ndarray:
        places = np.arange(num_frames)[:, None] * 31 + np.arange(self.model_config.num_codebooks) * 7 + num_frames
        return (places * 2_654_435_761 % 2**32 * 1024 // 2**32).astype(np.int16)


@pytest.fixture
def losses(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, list[float]]:
    """Ten steps with LoRA on attention and audio FFN: eight clips in global batches of six, cut into threes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(speechtune.run, "create_family", MadeUpCodes)
    short = sorted(demo_clips, key=lambda clip: (clip.duration_seconds, clip.path.name))[:8]
    config = make_config(
        data={"train": write_chatml(tmp_path / "train.json", short)},
        lora={"rank": 4, "alpha": 8, "dropout": 0.0},
        train={"max_steps": STEPS, "batch_size": 3, "accumulation": 2, "learning_rate": 5e-3, "warmup_steps": 2},
        evaluate={"enabled": False},
    )
    run_training(config)
    records = read_records(config.output_dir / "metrics.jsonl")
    heads = ("audio", "text")
    return {head: [record["losses"][head] for record in records] for head in heads}  # type: ignore[index]


def test_losses_are_those_pinned(losses: dict[str, list[float]]) -> None:
    """Any difference is a change in what is trained: find it, or accept it as the docstring above says."""
    if os.environ.get(UPDATE):
        GOLDEN.write_text(json.dumps({"steps": STEPS, "losses": losses}, indent=1) + "\n", encoding="utf-8")
        pytest.skip(f"{GOLDEN.name} written anew: say in CHANGELOG.md what changed and why")
    pinned = json.loads(GOLDEN.read_text(encoding="utf-8"))["losses"]
    assert losses.keys() == pinned.keys()
    for head, expected in pinned.items():
        assert len(losses[head]) == STEPS
        assert losses[head] == pytest.approx(expected, rel=TOLERANCE), head


def test_the_pinned_run_learns() -> None:
    """Numbers of a run in which nothing happens would not show a change either."""
    for values in json.loads(GOLDEN.read_text(encoding="utf-8"))["losses"].values():
        assert values[0] - values[-1] > 100 * TOLERANCE * values[0]

"""Losses of the first ten steps, per family, pinned in full digits: what training computes changes only on purpose.

The runs go all the way from manifest to loop on tiny bases. Only what encodes the audio is left out: made-up codes
and features stand for its own, because a code is the nearest of 1024 vectors, and another CPU's rounding may find
another one nearest. Dropout is off: its random numbers differ between CPU makers.

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

from helpers import DemoClip, read_records
from speechtune.config import RunConfig
from speechtune.families import build_config, family_packages
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
from speechtune.families.phi4_multimodal.family import Phi4MultimodalFamily
from speechtune.families.phi4_multimodal.tiny import make_model
from speechtune.family import Family
from speechtune.training.run import run_training
from speechtune.types import Audio

FAMILY_TESTS = Path(__file__).parents[1] / "families"
UPDATE = "SPEECHTUNE_UPDATE_GOLDEN"
STEPS = 10
TOLERANCE = 1e-5
SAMPLES_PER_FRAME = 960
SAMPLES_PER_FEATURE = 160


class MadeUpCodes(HiggsAudioV2Family):
    """The family with codes that follow from a clip's length alone: as many frames, each a repeatable jumble."""

    encode_key = "made-up codes for tests/golden"

    def encode_audio(self, audios: Sequence[Audio]) -> list[np.ndarray]:
        return [self._codes(len(audio.samples) // SAMPLES_PER_FRAME) for audio in audios]

    def _codes(self, num_frames: int) -> np.ndarray:
        places = np.arange(num_frames)[:, None] * 31 + np.arange(self.model_config.num_codebooks) * 7 + num_frames
        return (places * 2_654_435_761 % 2**32 * 1024 // 2**32).astype(np.int16)


class MadeUpFeatures(Phi4MultimodalFamily):
    """The family with log-mel features that follow from a clip's length alone."""

    encode_key = "made-up features for tests/golden"

    def encode_audio(self, audios: Sequence[Audio]) -> list[np.ndarray]:
        return [self._features(len(audio.samples) // SAMPLES_PER_FEATURE) for audio in audios]

    def _features(self, num_frames: int) -> np.ndarray:
        places = np.arange(num_frames)[:, None] * 31 + np.arange(self.extractor.feature_size) * 7 + num_frames
        return (places * 2_654_435_761 % 2**32 / 2**28).astype(np.float32)


def learn(config: RunConfig, family: Family) -> dict[str, list[float]]:
    """Losses of every step, per head."""
    outcome = run_training(config, family)
    records = read_records(config.output_dir)
    return {head: [record["losses"][head] for record in records] for head in outcome.job.family.heads}


@pytest.fixture
def higgs_audio_v2(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, list[float]]:
    """Ten steps with LoRA on attention and audio FFN: eight clips in global batches of six, cut into threes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    short = sorted(demo_clips, key=lambda clip: (clip.duration_seconds, clip.path.name))[:8]
    config = make_config(
        data={"train": write_chatml(tmp_path / "train.json", short)},
        lora={"rank": 4, "alpha": 8, "dropout": 0.0},
        train={"max_steps": STEPS, "batch_size": 3, "accumulation": 2, "learning_rate": 5e-3, "warmup_steps": 2},
        evaluate={"enabled": False},
    )
    return learn(config, MadeUpCodes(config))


@pytest.fixture
def phi4_multimodal(
    tmp_path: Path, demo_clips: list[DemoClip], monkeypatch: pytest.MonkeyPatch
) -> dict[str, list[float]]:
    """Ten steps with LoRA on language model and speech encoder, both tasks, the speech LoRA merged."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_model(tmp_path / "base", [clip.text for clip in demo_clips], output_scale=10.0, speech_lora_rank=4)
    rows = []
    for number, clip in enumerate(sorted(demo_clips, key=lambda clip: clip.path.name)[:6]):
        row = {"audio": str(clip.path), "offset": 0.1, "duration": 0.8 + 0.1 * number, "text": clip.text}
        scores = {name: (number * step) % 11 for step, name in enumerate(("accuracy", "fluency", "prosodic", "total"))}
        transcripts = {"word_transcript": clip.text.lower(), "phoneme_transcript": "AA B <unk>"}
        rows += [row | {"task": "APA", "target": scores}, row | {"task": "MDD", "target": transcripts}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {
        "family": "phi4_multimodal",
        "output_dir": tmp_path / "output",
        "model": {"path": str(tmp_path / "base")},
        "data": {"train": tmp_path / "rows.jsonl", "cache_dir": tmp_path / "cache"},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "language+audio"},
        "train": {"max_steps": STEPS, "batch_size": 2, "accumulation": 3, "learning_rate": 2e-3, "warmup_steps": 2},
        "tracking": {"trackers": ()},
    }
    config = build_config(values, "test")
    return learn(config, MadeUpFeatures(config))


@pytest.mark.parametrize("family", family_packages())
def test_losses_are_those_pinned(family: str, request: pytest.FixtureRequest) -> None:
    """Any difference is a change in what is trained: find it, or accept it as the docstring above says."""
    losses, golden = request.getfixturevalue(family), FAMILY_TESTS / family / "golden.json"
    if os.environ.get(UPDATE):
        golden.write_text(json.dumps({"steps": STEPS, "losses": losses}, indent=1) + "\n", encoding="utf-8")
        pytest.skip(f"{golden.name} written anew: say in CHANGELOG.md what changed and why")
    pinned = json.loads(golden.read_text(encoding="utf-8"))["losses"]
    assert losses.keys() == pinned.keys()
    for head, expected in pinned.items():
        assert len(losses[head]) == STEPS
        assert losses[head] == pytest.approx(expected, rel=TOLERANCE), head


@pytest.mark.parametrize("family", family_packages())
def test_the_pinned_run_learns(family: str) -> None:
    """Numbers of a run in which nothing happens would not show a change either."""
    for values in json.loads((FAMILY_TESTS / family / "golden.json").read_text(encoding="utf-8"))["losses"].values():
        assert values[0] - values[-1] > 100 * TOLERANCE * values[0]

"""Golden runs besides those in `test_golden_losses`: a fixture by the family's name gives the losses of every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from csm_cases import run_config
from helpers import DemoClip, read_records
from speechtune.families.csm import tiny
from speechtune.families.csm.family import CsmFamily
from speechtune.training.run import run_training
from speechtune.types import Audio


class MadeUpMimiCodes(CsmFamily):
    """The family with codes that follow from a clip's length alone: as many frames, each a repeatable jumble."""

    encode_key = "made-up codes for tests/golden"  # type: ignore[assignment]

    def encode_audio(self, audios: Sequence[Audio]) -> list[np.ndarray]:
        return [self._codes(len(audio.samples) // 1920) for audio in audios]

    def _codes(self, num_frames: int) -> np.ndarray:
        places = np.arange(num_frames)[:, None] * 31 + np.arange(8) * 7 + num_frames
        return (places * 2_654_435_761 % 2**32 * 64 // 2**32).astype(np.int16)


@pytest.fixture
def csm(
    tmp_path: Path,
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, list[float]]:
    """Ten steps with LoRA on both decoders: eight clips in global batches of six, a quarter of the frames drawn."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny.make_model(tmp_path / "base", (), output_scale=10.0)
    short = sorted(demo_clips, key=lambda clip: (clip.duration_seconds, clip.path.name))[:8]
    config = run_config(
        tmp_path,
        tmp_path / "base",
        write_chatml(tmp_path / "train.json", short),
        data={"depth_share": 0.25},
        train={"max_steps": 10, "batch_size": 3, "accumulation": 2, "learning_rate": 5e-3, "warmup_steps": 2},
        checkpoint={"every_steps": 10},
    )
    run_training(config, MadeUpMimiCodes(config))
    records = read_records(config.output_dir)
    return {head: [record["losses"][head] for record in records] for head in CsmFamily.heads}

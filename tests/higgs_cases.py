"""Cases for the Higgs Audio v2 tests, and the family's side of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from helpers import DemoClip, Utterance, overfit
from speechtune.audio import read_audio
from speechtune.families import build_config
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
from speechtune.precision import PrecisionPlan
from speechtune.types import AudioRef, Batch, Clip, Losses, Sample

FP32 = PrecisionPlan("fp32", torch.device("cpu"), torch.float32, None, False, "test")
STEPS, RATE = 120, 2e-3


@dataclass(frozen=True)
class Case:
    """A sample, the codes of its clips, and the same thing in the terms of the independent helpers."""

    sample: Sample
    features: list[np.ndarray]
    utterance: Utterance


def family_on(
    model: Path, codec: Path | None = None, batch: Any = None, speed: Any = None, **values: Any
) -> HiggsAudioV2Family:
    """The family on a model folder, without a run directory; `batch` and `speed` are sections of the configuration."""
    section = {"path": str(model), "codec_path": str(codec) if codec else None, **values}
    sections = {"model": section, "batch": batch or {}, "speed": speed or {}}
    return HiggsAudioV2Family(build_config({"family": "higgs_audio_v2", **sections}, "test"))


def make_case(
    family: HiggsAudioV2Family, target: DemoClip, frames: int, reference: DemoClip, reference_frames: int
) -> Case:
    """Cut two clips to whole frames (40 ms each) of their speech, and the texts to their first two words."""
    voice = Clip(cut(reference, reference_frames), " ".join(reference.text.split()[:2]))
    text = " ".join(target.text.split()[:2])
    sample = Sample(f"{target.path.stem}-{frames}", text, cut(target, frames), (voice,))
    features = family.encode_audio([read_audio(ref, family.sampling_rate) for ref in family.clips(sample)])
    return Case(sample, features, Utterance(text, features[1], voice.text, features[0]))


def cut(clip: DemoClip, frames: int) -> AudioRef:
    """`frames` codec frames out of a clip, from 0.3 s on."""
    return AudioRef(path=str(clip.path), offset_seconds=0.3, duration_seconds=frames / 25)


def collated(family: HiggsAudioV2Family, cases: Sequence[Case]) -> Batch:
    """The family's batch of some cases."""
    return family.collate([family.encode(case.sample, case.features) for case in cases])


def mean_loss(losses: Losses, batch: Batch) -> torch.Tensor:
    """What the loop minimises: each head's sum over its number of targets."""
    return torch.stack([value / batch.target_counts[head] for head, value in losses.sums.items()]).sum()


def train(family: HiggsAudioV2Family, cases: Sequence[Case], steps: int = STEPS, model: Any = None) -> Any:
    """Overfit a model (a fresh base by default) on the family's own losses."""
    model = family.load(FP32) if model is None else model
    batch = collated(family, cases)
    overfit(model.parameters(), lambda: mean_loss(family.losses(model, batch), batch), steps, RATE)
    return model.eval()


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of a model's parameters."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def drop_tensors(folder: Path, pattern: str) -> None:
    """Remove the tensors whose names match from a folder's one weights file."""
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not re.search(pattern, name)}
    save_file(kept, file, metadata={"format": "pt"})

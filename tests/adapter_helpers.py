"""What the tests of adapters on disk share: a trained adapter, a fixed input, and the original layout by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, HiggsAudioV2ForConditionalGeneration

from helpers import DemoClip, Utterance, native_batch
from speechtune.families import build_config
from speechtune.training.run import run_training

NATIVE, BOSON = "base_model.model.model.layers.", "base_model.model.layers."


def train_adapter(
    folder: Path,
    base: Path,
    cache_dir: Path,
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    clips: Sequence[DemoClip],
    **lora: Any,
) -> Path:
    """Train four steps on two clips and return the run's folder: checkpoint-2, checkpoint-4, lora_adapters."""
    chosen = sorted(clips, key=lambda clip: clip.duration_seconds)[:2]
    config = build_config(
        {
            "family": "higgs_audio_v2",
            "output_dir": folder,
            "model": {"path": str(base / "model"), "codec_path": str(base / "codec")},
            "data": {"train": write_chatml(folder.parent / f"{folder.name}.json", chosen), "cache_dir": cache_dir},
            "lora": {"rank": 4, "alpha": 8, "targets": "all", "dropout": 0.0} | lora,
            "train": {"max_steps": 4, "batch_size": 2, "learning_rate": 3e-2, "warmup_steps": 1},
            "checkpoint": {"every_steps": 2},
            "tracking": {"trackers": ()},
        },
        "test",
    )
    run_training(config)
    return folder


def plain_base(base: Path) -> Any:
    """The tiny base as plain transformers loads it."""
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(base / "model", use_text_head=True).eval()


@torch.no_grad()
def plain_logits(model: nn.Module, base: Path) -> torch.Tensor:
    """Audio logits on a fixed prompt with made-up codes, without any code of speechtune."""
    tokenizer = AutoTokenizer.from_pretrained(base / "model")
    codes = np.random.default_rng(5).integers(0, 1024, (9, 8))
    return model(**native_batch(tokenizer, [Utterance("One two.", codes, "Three four.", codes[:6])])).logits


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of an adapter folder."""
    return load_file(folder / "adapter_model.safetensors")


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write an adapter's tensors as PEFT does."""
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def copy_adapter(source: Path, target: Path, *, manifest: bool = False) -> Path:
    """Copy an adapter's own files, and on request its MANIFEST.json."""
    target.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", *(["README.md", "MANIFEST.json"] * manifest)):
        shutil.copyfile(source / name, target / name)
    return target


def as_boson(source: Path, target: Path, *, binary: bool = False) -> Path:
    """The same adapter as the original package would have written it, keys replaced as plain text."""
    copy_adapter(source, target)
    tensors = {key.replace(NATIVE, BOSON): tensor for key, tensor in read_weights(source).items()}
    write_weights(target, tensors)
    edit_config(target, auto_mapping=True, target_modules=sorted({key.split(".")[-3] for key in tensors}))
    if binary:
        to_binary(target)
    return target


def to_binary(folder: Path) -> None:
    """Replace adapter_model.safetensors by adapter_model.bin."""
    torch.save(read_weights(folder), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def make_adapter(base: Path, folder: Path, **kind: Any) -> Path:
    """Save an adapter with random weights, by plain PEFT."""
    config = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]} | kind
    model = get_peft_model(plain_base(base), LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            # a magnitude stays near the norm that it is trained from
            parameter.data = parameter.data * (1 + 0.1 * noise) if "magnitude" in name else 0.1 * noise
    model.save_pretrained(str(folder))
    return folder

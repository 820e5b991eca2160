"""Time of a verified save of a 500 MB adapter against plain `save_pretrained` and fsync, in pairs."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from speechtune.adapter import adapter_state, trainable
from speechtune.checkpoint import write_verified
from speechtune.saving import cpu_copy

ADAPTER_BYTES = 500_000_000
LAYERS, WIDTH = 16, 4096


def adapter_model() -> PeftModel:
    """A LoRA of about 500 MB on linear layers without weights of their own worth mentioning."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False, device="meta") for _ in range(LAYERS))

    rank = ADAPTER_BYTES // (4 * LAYERS * 2 * WIDTH)
    model = get_peft_model(Stack(), LoraConfig(r=rank, target_modules=["0"] + [str(i) for i in range(1, LAYERS)]))
    for name, parameter in list(model.named_parameters()):
        if "lora_" in name:
            module_name, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module_name), leaf, nn.Parameter(torch.randn(parameter.shape)))
    return model


def plain_save(model: PeftModel, directory: Path) -> None:
    """What a careful script does: save, and sync each file."""
    model.save_pretrained(str(directory))
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def measure(pairs: int = 5) -> dict[str, list[float]]:
    """Ratios to the plain save of the same pair: the time training waits, and the time until the save is published.

    One pair goes before them unmeasured: the first writes find cold caches.
    """
    model = adapter_model()
    result: dict[str, list[float]] = {"training waits / plain": [], "published / plain": [], "plain seconds": []}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        target = Path(folder) / "adapter"
        for pair in range(pairs + 1):
            started = time.perf_counter()
            plain_save(model, target)
            plain = time.perf_counter() - started
            shutil.rmtree(target)
            started = time.perf_counter()
            copied = cpu_copy(trainable(model))
            waited = time.perf_counter() - started
            state = adapter_state(model, copied)
            write_verified(
                target, lambda aside, copied=copied: model.save_pretrained(str(aside), state_dict=copied), state
            )
            published = time.perf_counter() - started
            shutil.rmtree(target)
            if pair:
                result["training waits / plain"].append(waited / plain)
                result["published / plain"].append(published / plain)
                result["plain seconds"].append(plain)
    return result

"""Time of a verified save of a 500 MB adapter against plain `save_pretrained` and fsync, in pairs."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
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


def measure(pairs: int = 15) -> dict[str, list[float]]:
    """Ratios to the plain save beside it: a verified save, and what training waits for when the save runs beside it.

    One pair goes before them unmeasured: the first writes find cold caches.
    """
    model = adapter_model()
    state = adapter_state(model)
    result: dict[str, list[float]] = {"verified / plain": [], "training waits / plain": [], "plain seconds": []}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        target = Path(folder) / "adapter"
        for pair in range(pairs + 1):
            plain = timed(lambda: plain_save(model, target))
            shutil.rmtree(target)
            verified = timed(lambda: write_verified(target, lambda aside: model.save_pretrained(str(aside)), state))
            shutil.rmtree(target)
            copied = timed(lambda: cpu_copy(trainable(model)))
            if pair:
                result["verified / plain"].append(verified / plain)
                result["training waits / plain"].append(copied / plain)
                result["plain seconds"].append(plain)
    return result


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started

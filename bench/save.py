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

from speechtune.adapter import adapter_state
from speechtune.checkpoint import write_verified

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


def measure(pairs: int = 5) -> dict[str, object]:
    """Ratios verified / plain, in the order measured."""
    model = adapter_model()
    state = adapter_state(model)
    ratios, plain_seconds = [], []
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for _ in range(pairs):
            times = []
            for verified in (False, True):
                target = Path(folder) / "adapter"
                os.sync()
                started = time.perf_counter()
                if verified:
                    write_verified(target, lambda aside: model.save_pretrained(str(aside)), state)
                else:
                    plain_save(model, target)
                times.append(time.perf_counter() - started)
                shutil.rmtree(target)
            ratios.append(times[1] / times[0])
            plain_seconds.append(times[0])
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    return {"bytes": size, "ratios": ratios, "plain_seconds": plain_seconds}


if __name__ == "__main__":
    print(measure())

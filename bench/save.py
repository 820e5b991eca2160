"""Time of verified saves against what a careful script does (save, and sync each file), in pairs.

Two saves: of a 500 MB adapter alone, written as `lora_adapters` is; and of a whole checkpoint, an adapter of the size
that the default LoRA has on the released base (100 MB) with both moments of AdamW. The checkpoint is saved in both ways
of the loop: at once, as the script does, and behind the training's back, which waits only while what is trained is
copied; until it is published then takes that copy longer than at once. What the thread takes from training beside it,
on a machine without a core to spare, is not counted here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from speechtune.lora.apply import adapter_state, trainable
from speechtune.storage.verified_folder import write_verified
from speechtune.tensors import rng_state
from speechtune.training.checkpoint import RunParts, RunState, Saver, checkpoint_writer, cpu_copy

ADAPTER_BYTES = 500_000_000
LAYERS, WIDTH = 16, 4096
DEFAULT_LAYERS, DEFAULT_WIDTH, DEFAULT_RANK = 250, 3072, 16
T, U = TypeVar("T"), TypeVar("U")


def adapter_model(layers: int, width: int, rank: int) -> PeftModel:
    """A LoRA on linear layers without weights of their own worth mentioning."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(width, width, bias=False, device="meta") for _ in range(layers))

    model = get_peft_model(Stack(), LoraConfig(r=rank, target_modules=[str(i) for i in range(layers)]))
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


def measure(pairs: int = 9) -> dict[str, list[float]]:
    """Both saves."""
    return adapter_saves(pairs) | checkpoint_saves(pairs)


def adapter_saves(pairs: int) -> dict[str, list[float]]:
    """Ratios to the plain save beside it: a verified save, and what training waits for when the save runs beside it.

    One pair goes before them unmeasured: the first writes find cold caches.
    """
    model = adapter_model(LAYERS, WIDTH, ADAPTER_BYTES // (4 * LAYERS * 2 * WIDTH))
    state = adapter_state(model)
    result: dict[str, list[float]] = {"verified / plain": [], "training waits / plain": [], "plain seconds": []}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        target = Path(folder) / "adapter"

        def plain_seconds() -> float:
            seconds = timed(lambda: plain_save(model, target))
            shutil.rmtree(target)
            return seconds

        def verified_seconds() -> float:
            seconds = timed(lambda: write_verified(target, lambda aside: model.save_pretrained(str(aside)), state))
            shutil.rmtree(target)
            return seconds

        for pair in range(pairs + 1):
            plain, verified = in_turn(pair, plain_seconds, verified_seconds)
            copied = timed(lambda: cpu_copy(trainable(model)))
            if pair:
                result["verified / plain"].append(verified / plain)
                result["training waits / plain"].append(copied / plain)
                result["plain seconds"].append(plain)
    return result


def in_turn(pair: int, one: Callable[[], T], other: Callable[[], U]) -> tuple[T, U]:
    """Results of both; which goes first changes from pair to pair: the second writes while the disk still empties."""
    if pair % 2:
        second = other()
        return one(), second
    return one(), other()


def plain_checkpoint(model: PeftModel, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """Adapter, optimizer and random state of a careful script."""
    directory.mkdir()
    torch.save(optimizer.state_dict(), directory / "optimizer.pt")
    torch.save(torch.get_rng_state(), directory / "rng.pt")
    plain_save(model, directory)


def checkpoint_saves(pairs: int) -> dict[str, list[float]]:
    """Ratios of a checkpoint as the loop saves it: at once; and behind, until training goes on and until published."""
    model = adapter_model(DEFAULT_LAYERS, DEFAULT_WIDTH, DEFAULT_RANK)
    optimizer = torch.optim.AdamW(trainable(model).values())
    for parameter in trainable(model).values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    result: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        target = Path(folder) / "checkpoint-1"

        def plain_seconds() -> float:
            seconds = timed(lambda: plain_checkpoint(model, optimizer, target))
            shutil.rmtree(target)
            return seconds

        def verified(background: bool) -> tuple[float, float]:
            started = time.perf_counter()
            with Saver(background) as saver:
                parts, state = RunParts(model, optimizer, scaler), RunState(1, 1, 1.0, {})
                publish = checkpoint_writer(target, parts, state, [rng_state()], copy=background)
                saver.submit(lambda: ignore(publish()))
                held = time.perf_counter() - started
                saver.wait()
                published = time.perf_counter() - started
            shutil.rmtree(target)
            return held, published

        for background in (False, True):
            for pair in range(pairs + 1):
                plain, (held, published) = in_turn(pair, plain_seconds, lambda: verified(background))  # noqa: B023
                if pair and background:
                    result.setdefault("checkpoint: training waits / plain", []).append(held / plain)
                    result.setdefault("checkpoint, behind: published / plain", []).append(published / plain)
                elif pair:
                    result.setdefault("checkpoint: verified / plain", []).append(published / plain)
    return result


def ignore(_: object) -> None:
    """Make nothing of a result, where nothing is wanted."""


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started

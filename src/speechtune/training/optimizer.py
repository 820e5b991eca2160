"""The optimizer, and its learning rate by step: a pure function, so that there is nothing to save or restore."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from speechtune.config import TrainConfig


def make_optimizer(parameters: Sequence[nn.Parameter], config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over what is trained, fused where the device has such a kernel."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=device.type == "cuda",
    )


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of step `step` (from 0): linear warm-up that starts above zero, then the schedule's decay."""
    warmup = min(config.warmup_steps, math.ceil(total_steps / 10))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.learning_rate * shape[config.schedule]

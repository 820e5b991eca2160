"""Learning rate by step, a pure function: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from speechtune.config import TrainConfig


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of step `step` (from 0): linear warm-up that starts above zero, then the schedule's decay."""
    warmup = min(config.warmup_steps, math.ceil(total_steps / 10))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.learning_rate * shape[config.schedule]

"""What is minimised: model and loss as one module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from speechtune.families.base import Batch, Family
from speechtune.precision import PrecisionPlan


class Objective(nn.Module):
    """Model and loss as one module, so that DDP sees the whole forward pass; calling past it lets ranks drift apart."""

    def __init__(self, model: nn.Module, family: Family, plan: PrecisionPlan, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.model, self.family, self.plan, self.weights = model, family, plan, dict(weights)

    def forward(self, batch: Batch, counts: Mapping[str, float]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Weighted loss of a batch, each head's sum divided by `counts`, and the sums without gradient."""
        with torch.autocast(self.plan.device.type, self.plan.autocast, enabled=self.plan.autocast is not None):
            sums = self.family.losses(self.model, batch).sums
        terms = [self.weights.get(head, 1.0) * value.float() / counts[head] for head, value in sums.items()]
        return torch.stack(terms).sum(), {head: value.detach().float() for head, value in sums.items()}


def checkpoint_activations(model: nn.Module) -> None:
    """Let the layers of a transformers model compute their activations anew in the backward pass."""
    cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

"""What the training loop is given (`Job`), what it returns (`TrainResult`), and the loss it minimises (`Objective`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from speechtune.cache.encoded_set import EncodedSet
from speechtune.config import RunConfig
from speechtune.family import Family
from speechtune.precision import PrecisionPlan
from speechtune.training.checkpoint import RunState
from speechtune.training.generated_samples import SampleGenerator
from speechtune.types import Batch


@dataclass(frozen=True)
class Job:
    """All that a run needs, loaded and checked.

    Attributes:
        identity: what a resume must find unchanged.
        notes: texts by file name that lie beside the saved weights.
        sample_generator: None where no samples are generated during training.
        checkpoint: the run goes on from it; None for a fresh start.
        initial: of the adapter that the run started from: `path`, `sha256` of its weights and `lora_b`, a fingerprint.
    """

    config: RunConfig
    family: Family
    model: nn.Module
    precision: PrecisionPlan
    train_set: EncodedSet
    eval_set: EncodedSet | None
    identity: Mapping[str, Any]
    notes: Mapping[str, str]
    sample_generator: SampleGenerator | None = None
    checkpoint: Path | None = None
    initial: Mapping[str, str] | None = None

    def weighted(self, losses: Mapping[str, float]) -> float:
        """Sum of the heads' losses, each times its `train.head_weights`."""
        return sum(self.config.train.head_weights.get(head, 1.0) * value for head, value in losses.items())


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended.

    Attributes:
        signal: number of the signal that ended it early, or None.
        scores: of the evaluation that the final adapter stands for; empty without one.
        seconds: of this launch, by what they went into, `total_seconds` in all.
    """

    state: RunState
    first_losses: Mapping[str, float]
    signal: int | None
    best_checkpoint: Path | None
    scores: Mapping[str, float]
    seconds: Mapping[str, float]


class Objective(nn.Module):
    """Model and loss as one module: DDP must see the complete forward pass, or ranks drift apart without an error."""

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
    """Switch on gradient checkpointing: layers compute their activations again in the backward pass."""
    cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

"""Sums over the micro-batches of a step and over all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from speechtune.errors import CheckpointError


def sum_heads(
    accelerator: Accelerator, per_batch: Sequence[Mapping[str, float]], heads: Sequence[str]
) -> dict[str, float]:
    """Add up per-head numbers over batches and ranks; a head that no batch of any rank had is left out."""
    seen = [{head: value, f"{head} seen": 1.0} for values in per_batch for head, value in values.items()]
    totals = sum_over_ranks(accelerator, seen, [name for head in heads for name in (head, f"{head} seen")])
    return {head: totals[head] for head in heads if totals[f"{head} seen"]}


def sum_over_ranks(
    accelerator: Accelerator, values: Sequence[Mapping[str, float]], names: Sequence[str] | None = None
) -> dict[str, float]:
    """Add up named numbers over a list and over all ranks, in float64.

    Args:
        accelerator: knows the ranks.
        values: this rank's numbers; a missing name counts as zero.
        names: the same on every rank; None takes those of the first entry.
    """
    names = list(values[0]) if names is None else names
    local = [math.fsum(value.get(name, 0.0) for value in values) for name in names]
    if accelerator.num_processes > 1:
        total = torch.tensor(local, dtype=torch.float64, device=accelerator.device)
        local = cast(torch.Tensor, accelerator.reduce(total, "sum")).tolist()
    return dict(zip(names, local, strict=True))


def check_same_checkpoint(accelerator: Accelerator, chosen: Path | None) -> None:
    """All ranks go on from the same checkpoint; a node that sees another disk would start from the beginning.

    Raises:
        CheckpointError: they differ; says what each found.
    """
    found = cast(list[str], gather_object([chosen.name if chosen else "none"]))
    if len(set(found)) > 1:
        raise CheckpointError(
            f"the ranks found different checkpoints to resume from ({', '.join(found)}, in order of rank): output_dir "
            "must lie on a disk that all nodes share"
        )


def least_over_ranks(accelerator: Accelerator, value: float) -> float:
    """The least of a number over all ranks."""
    if accelerator.num_processes == 1:
        return value
    every = accelerator.gather(torch.tensor([value], dtype=torch.float64, device=accelerator.device))
    return float(cast(torch.Tensor, every).min())

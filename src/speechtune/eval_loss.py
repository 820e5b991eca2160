"""Mean loss per head over an evaluation set, on all ranks together."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn

from speechtune.batching import evaluation_batches
from speechtune.cache import EncodedSet
from speechtune.ranks import sum_heads


@torch.no_grad()
def evaluation_losses(
    objective: nn.Module, eval_set: EncodedSet, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """Summed losses over target counts, so that the batch size does not change the result.

    Args:
        objective: returns a loss and the summed losses per head; put into evaluation mode meanwhile.
        eval_set: each sample is taken once.
        batch_size: samples per rank and forward pass.
        accelerator: knows the ranks and the device.
    """
    family = eval_set.family
    was_training = objective.training
    objective.eval()
    sums, counts = [], []
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mine, most = (evaluation_batches(eval_set.lengths, batch_size, one, ranks) for one in (rank, 0))
    # A rank whose share ran out takes the first rank's batch along for nothing: sharded weights need all in every pass.
    for number, indices in enumerate([*mine, *most[len(mine) :]]):
        batch = family.collate([eval_set[i] for i in indices]).to(accelerator.device)
        _, found = objective(batch, dict.fromkeys(batch.target_counts, 1.0))
        if number >= len(mine):
            continue
        sums.append({head: float(value) for head, value in found.items()})
        counts.append({head: float(batch.target_counts[head]) for head in found})
    objective.train(was_training)
    total, targets = (sum_heads(accelerator, values, family.heads) for values in (sums, counts))
    return {head: value / targets[head] for head, value in total.items()}

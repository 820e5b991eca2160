"""Which samples make up which batch: global batches from (seed, epoch), then cut by micro-step and rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from speechtune.families.base import Batch, Encoded, Family
from speechtune.interruption import ignore_signals


@dataclass(frozen=True)
class BatchPlan:
    """The order of a whole run, known at every step without replaying the ones before.

    The samples form one endless stream, a fresh permutation per epoch; step s takes the s-th run of
    `global_batch_size` samples from it. So each batch is full, nothing is dropped, and a resume is a `divmod`.
    The same global batch results however it is cut: 1 x 8, 4 x 2 accumulated, or 2 ranks.

    Attributes:
        lengths: positions each sample takes; with `group_by_length` they order a global batch before it is cut.
    """

    lengths: np.ndarray
    batch_size: int
    accumulation: int = 1
    world_size: int = 1
    seed: int = 42
    group_by_length: bool = True

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.accumulation * self.world_size

    def num_steps(self, epochs: float) -> int:
        """Steps until every sample was seen `epochs` times, the last one filled up from the next permutation."""
        return max(1, math.ceil(epochs * len(self.lengths) / self.global_batch_size - 1e-9))

    def epoch_at(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return step * self.global_batch_size / len(self.lengths)

    def global_batch(self, step: int) -> list[int]:
        """Indices of the samples of one optimizer step, in stream order."""
        first = step * self.global_batch_size
        indices = []
        for position in range(first, first + self.global_batch_size):
            epoch, place = divmod(position, len(self.lengths))
            indices.append(int(_permutation(len(self.lengths), self.seed, epoch)[place]))
        return indices

    def micro_batch(self, step: int, micro: int, rank: int) -> list[int]:
        """Indices of one forward pass on one rank; ranks of a micro-step get neighbouring lengths."""
        indices = self.global_batch(step)
        if self.group_by_length:
            indices.sort(key=lambda index: (int(self.lengths[index]), index))
        first = (micro * self.world_size + rank) * self.batch_size
        return indices[first : first + self.batch_size]


class MicroBatches(Dataset[Batch]):
    """The run's micro-batches of one rank, collated on demand; item k is micro-step k counted from the run's start."""

    def __init__(self, plan: BatchPlan, encoded: Sequence[Encoded], family: Family, rank: int) -> None:
        self.plan, self.encoded, self.family, self.rank = plan, encoded, family, rank

    def __getitem__(self, index: int) -> Batch:
        step, micro = divmod(index, self.plan.accumulation)
        chosen = self.plan.micro_batch(step, micro, self.rank)
        return self.family.collate([self.encoded[i] for i in chosen])


def make_loader(batches: MicroBatches, order: range, *, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """The micro-batches of `order`, collated ahead in `workers` processes."""
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        # A generator of its own: the loader would draw from the global one and change dropout on resume.
        generator=torch.Generator(),
        pin_memory=pin_memory,
    )
    return iter(loader)


def evaluation_batches(lengths: np.ndarray, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Cut an evaluation set into batches of like length and give this rank its share."""
    order = np.argsort(lengths, kind="stable").tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches[rank::world_size]


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)

"""Batches: which samples make up each step's global batch, how it is cut into micro-batches and ranks, and collated."""

import heapq
import logging
import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from speechtune.cache.encoded_set import EncodedSet
from speechtune.config import RunConfig
from speechtune.errors import ConfigError, TrainingError, some
from speechtune.family import Family
from speechtune.types import Batch, Encoded

log = logging.getLogger("speechtune")


@dataclass(frozen=True)
class BatchPlan:
    """The order of a complete run, known at every step without replaying the ones before.

    The samples form one endless stream, a fresh permutation per epoch; step s takes the s-th run of
    `global_batch_size` samples from it. So each batch is full, nothing is dropped, and a resume is a `divmod`.
    The same global batch results however it is cut: 1 x 8, 4 x 2 accumulated, or 2 ranks.

    Attributes:
        lengths: positions each sample takes.
        batch_size: samples per rank and micro-batch where there is no budget; with one, `batch_size` x `accumulation`
            is each rank's share of a step.
        tokens: most positions of a micro-batch, padding included; None cuts by number of samples.
        packed: samples lie end to end, so that their positions add up; padded ones take the longest one's each.
        group_by_length: order a global batch by length before it is cut by number.
    """

    lengths: np.ndarray
    batch_size: int
    accumulation: int = 1
    world_size: int = 1
    seed: int = 42
    group_by_length: bool = True
    tokens: int | None = None
    packed: bool = True

    @classmethod
    def of(cls, config: RunConfig, lengths: np.ndarray, world_size: int) -> Self:
        """The plan of a run; `batch.tokens` is a number or None here."""
        settings, batch = config.train, config.batch
        tokens = batch.tokens if isinstance(batch.tokens, int) else None
        sizes = (settings.batch_size, settings.accumulation, world_size)
        return cls(lengths, *sizes, settings.seed, settings.group_by_length, tokens, batch.packing)

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

    def micro_batches(self, step: int, rank: int) -> list[list[int]]:
        """Indices of each forward pass of one step on one rank, as many on every rank."""
        indices = self.global_batch(step)
        if self.tokens is not None:
            parts = cut_by_tokens(indices, self.lengths[indices], self.tokens, self.world_size, packed=self.packed)
        else:
            if self.group_by_length:
                indices.sort(key=lambda index: (int(self.lengths[index]), index))
            parts = [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        return parts[rank :: self.world_size]  # ranks of a micro-step get neighbours, alike in size


def cut_by_tokens(
    indices: Sequence[int], lengths: np.ndarray, tokens: int, ranks: int, *, packed: bool
) -> list[list[int]]:
    """Cut samples, a multiple of `ranks`, into as few parts as fit a budget, a multiple of `ranks` too, largest first.

    `lengths` are the positions of each; an index may stand more than once. A sample of more than `tokens` makes a part
    alone. In `packed` parts positions add up; else each sample takes those of the longest.
    """
    order = sorted(range(len(indices)), key=lambda place: (-int(lengths[place]), indices[place]))
    sizes = [int(lengths[place]) for place in order]
    parts = _packed(sizes, tokens, ranks) if packed else _padded(sizes, tokens, ranks)
    return [[indices[order[i]] for i in part] for part in parts]


def _packed(sizes: Sequence[int], tokens: int, ranks: int) -> list[list[int]]:
    count = max(math.ceil(sum(sizes) / tokens / ranks), 1) * ranks
    while count < len(sizes):
        parts = _balance(sizes, count)
        if all(sum(sizes[i] for i in part) <= tokens or len(part) == 1 for part in parts):
            return parts
        count += ranks
    return [[i] for i in range(len(sizes))]


def _balance(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Longest first, each to the part that holds least (Graham 1969), so that no rank waits long for another."""
    parts: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for place, size in enumerate(sizes):
        total, number = heapq.heappop(heap)
        parts[number].append(place)
        heapq.heappush(heap, (total + size, number))
    return parts


def _padded(sizes: Sequence[int], tokens: int, ranks: int) -> list[list[int]]:
    """Samples of like length together, as many as fit; then the fullest parts halved until every rank has as many."""
    parts: list[list[int]] = []
    for place in range(len(sizes)):
        if parts and sizes[parts[-1][0]] * (len(parts[-1]) + 1) <= tokens:
            parts[-1].append(place)
        else:
            parts.append([place])
    while len(parts) % ranks:
        fullest = max(range(len(parts)), key=lambda number: len(parts[number]))
        part = parts[fullest]
        parts[fullest : fullest + 1] = [part[: len(part) // 2], part[len(part) // 2 :]]
    return parts


def evaluation_batches(lengths: np.ndarray, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Cut an evaluation set into batches of like length and give this rank its share."""
    order = np.argsort(lengths, kind="stable").tolist()
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return batches[rank::world_size]


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)


def ignore_signals(_worker: int) -> None:
    """Leave a signal to the process group to the main process; called in worker processes."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class BatchLoader:
    """Micro-batches of one rank, step by step."""

    def __init__(
        self, config: RunConfig, plan: BatchPlan, encoded: EncodedSet, rank: int, device: torch.device
    ) -> None:
        self.config, self.plan, self.encoded, self.rank, self.device = config, plan, encoded, rank, device
        self._loader: Iterator[list[Batch]] | None = None
        self._next = -1
        longest = int(plan.lengths.argmax())
        if plan.tokens is not None and plan.lengths[longest] > plan.tokens:
            raise ConfigError(
                f"batch.tokens={plan.tokens}: sample {encoded[longest].sample_id} alone takes {plan.lengths[longest]} "
                "positions: give a larger budget, or leave such samples out with data.max_seconds"
            )
        if config.batch.on_oom == "halve" and plan.world_size > 1:
            raise ConfigError(
                "batch.on_oom=halve is for one rank: with several the others wait for the one that ran out. Set "
                "batch.tokens lower instead; what is learnt does not depend on it"
            )

    def take(self, step: int) -> list[Batch]:
        """The micro-batches of a step, collated ahead where there are workers."""
        if self._loader is None or step != self._next:
            workers, on_gpu = self.config.train.workers, self.device.type == "cuda"
            workers = (2 if on_gpu else 0) if workers is None else workers
            batches = StepBatches(self.plan, self.encoded, self.encoded.family, self.rank)
            self._loader = make_loader(batches, range(step, 2**62), workers=workers, pin_memory=on_gpu)
        self._next = step + 1
        return next(self._loader)

    def close(self) -> None:
        """End the worker processes: they ignore SIGTERM, so the interpreter would wait for them for ever at its end."""
        self._loader = None

    def cut_finer(self, step: int, batches: Sequence[Batch], error: torch.OutOfMemoryError) -> list[Batch]:
        """The step's samples in micro-batches of half the size; all later steps are cut as finely."""
        largest = max(sum(batch.lengths) for batch in batches)
        ids = [sample_id for batch in batches if sum(batch.lengths) == largest for sample_id in batch.sample_ids]
        issue = (
            f"step {step + 1}: out of memory on {self.device} with a micro-batch of up to {largest} positions "
            f"(samples {some(ids)}): {str(error).splitlines()[0]}"
        )
        if self.config.batch.on_oom == "fail":
            raise TrainingError(
                f"{issue}\nSet batch.tokens={largest // 2} (or batch.on_oom=halve; `speechtune fit` measures "
                "what fits) and go on from the last checkpoint with checkpoint.resume=auto: the samples of each step, "
                "and so what is learnt, stay the same. train.gradient_checkpointing=true saves memory too"
            ) from error
        if all(len(batch.sample_ids) == 1 for batch in batches):
            raise TrainingError(
                f"{issue}\nEvery micro-batch is one sample already: set train.gradient_checkpointing=true, or leave "
                "long samples out with data.max_seconds"
            ) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.plan = replace(self.plan, tokens=largest // 2)
        self._loader = None
        log.warning("%s\nbatch.tokens is %d from here on; the step is taken again", issue, largest // 2)
        return self.take(step)


@dataclass
class StepBatches(Dataset[list[Batch]]):
    """The run's micro-batches of one rank, collated on demand; item s holds those of step s."""

    plan: BatchPlan
    encoded: Sequence[Encoded]
    family: Family
    rank: int

    def __getitem__(self, step: int) -> list[Batch]:
        parts = self.plan.micro_batches(step, self.rank)
        return [self.family.collate([self.encoded[i] for i in part]) for part in parts]


def make_loader(batches: StepBatches, steps: range, *, workers: int, pin_memory: bool) -> Iterator[list[Batch]]:
    """The micro-batches of each of `steps`, collated ahead in `workers` processes."""
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        # A generator of its own: the loader would draw from the global one and change dropout on resume.
        generator=torch.Generator(),
        pin_memory=pin_memory,
    )
    return iter(loader)

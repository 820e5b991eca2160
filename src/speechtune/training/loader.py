"""Loading of micro-batches, collated ahead in worker processes, and the smaller ones after a step ran out of memory."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch.utils.data import DataLoader, Dataset

from speechtune.cache.encoded_set import EncodedSet
from speechtune.config import RunConfig
from speechtune.errors import ConfigError, TrainingError, some
from speechtune.family import Family
from speechtune.training.batching import BatchPlan
from speechtune.training.signals import ignore_signals
from speechtune.types import Batch, Encoded

log = logging.getLogger("speechtune")


class BatchLoader:
    """Micro-batches of one rank, step by step.

    Raises:
        ConfigError: `batch.tokens` is less than the longest sample takes, or `batch.on_oom` cannot be kept.
    """

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


class StepBatches(Dataset[list[Batch]]):
    """The run's micro-batches of one rank, collated on demand; item s holds those of step s."""

    def __init__(self, plan: BatchPlan, encoded: Sequence[Encoded], family: Family, rank: int) -> None:
        self.plan, self.encoded, self.family, self.rank = plan, encoded, family, rank

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

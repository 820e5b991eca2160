"""The loop's supply of micro-batches, and what becomes of a step that does not fit the memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from speechtune.cache.encoded_set import EncodedSet
from speechtune.config import RunConfig
from speechtune.errors import ConfigError, TrainingError, some
from speechtune.training.batching import BatchPlan, StepBatches, make_loader
from speechtune.types import Batch

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
            # Without an end: the run stops asking.
            self._loader = make_loader(batches, range(step, 2**62), workers=workers, pin_memory=on_gpu)
        self._next = step + 1
        return next(self._loader)

    def cut_finer(self, step: int, batches: Sequence[Batch], error: torch.OutOfMemoryError) -> list[Batch]:
        """The same step in micro-batches of half the size, which all steps after it have too.

        Raises:
            TrainingError: not to be done, or not possible; names the samples and says what to set.
        """
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

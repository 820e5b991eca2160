"""How many positions one forward and backward pass can take on this device, measured with real samples."""

import gc
import logging
import math
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import nn

from speechtune.errors import TrainingError
from speechtune.lora.apply import trainable
from speechtune.tensors import rng_state, set_rng_state
from speechtune.training.batching import BatchPlan
from speechtune.training.checkpoint import ADAM_MOMENTS
from speechtune.training.job import Job, Objective, checkpoint_activations
from speechtune.types import Batch

log = logging.getLogger("speechtune")

USABLE = 0.92  # share of the memory that a budget may fill: allocators leave gaps, and batches differ
STEP = 64  # budgets are multiples of it
TIMED_PASSES = 2
AS_FAST = 0.98  # a smaller budget is taken if it is nearly as fast as the fastest


@dataclass(frozen=True, slots=True)
class Fit:
    """What a budget costs: a micro-batch that fills it, forward and backward.

    Attributes:
        tokens: positions of the micro-batch, padding included.
        samples, audio_seconds: what it held.
        seconds: for its forward and backward pass.
        peak_bytes: greatest memory in use, Adam's moments included; None where it did not fit.
    """

    tokens: int
    samples: int
    audio_seconds: float
    seconds: float
    peak_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory of a device: its limit, and the peak use since `start`."""

    device: torch.device

    def start(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # resets VmHWM; where it cannot, the greatest use so far counts
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return psutil.Process().memory_info().rss

    def limit(self) -> int:
        """Bytes that this process may use, other processes' share left out."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return int((free + torch.cuda.memory_reserved(self.device)) * USABLE)
        return int((psutil.virtual_memory().available + psutil.Process().memory_info().rss) * USABLE)


def measure_budgets(job: Job, ranks: int = 1, on_result: Callable[[Fit], None] = lambda fit: None) -> list[Fit]:
    """Try growing budgets until one does not fit or takes a rank's entire step; weights and random state stay.

    `on_result` is called with each measurement. Raises TrainingError: not even the longest sample fits.
    """
    plan = BatchPlan.of(job.config, job.train_set.lengths, ranks)
    memory = Memory(job.precision.device)
    limit = memory.limit()
    longest, most = int(plan.lengths.max()), _greatest_share(plan)
    results: list[Fit] = []

    def try_budget(tokens: int) -> bool:
        fit = _measure(job, replace(plan, tokens=tokens), memory)
        if fit.peak_bytes is not None and fit.peak_bytes > limit:
            fit = replace(fit, peak_bytes=None)
        results.append(fit)
        on_result(fit)
        return fit.peak_bytes is not None

    tokens = _rounded(max(longest, 512))
    while try_budget(tokens) and tokens < most:
        tokens = min(2 * tokens, _rounded(most))
    fitting = [fit for fit in results if fit.peak_bytes is not None]
    if not fitting:
        raise TrainingError(
            f"the longest sample ({longest} positions) does not fit {limit / 2**30:.1f} GiB of {memory.device}: set "
            "train.gradient_checkpointing=true, or leave long samples out with data.max_seconds"
        )
    if len(fitting) < len(results) and (between := _between(fitting, limit, results[-1].tokens)):
        try_budget(between)
    return sorted(results, key=lambda fit: fit.tokens)


def choose_budget(results: list[Fit]) -> Fit:
    """The smallest of those that fit which is nearly as fast as the fastest."""
    fitting = [fit for fit in results if fit.peak_bytes is not None]
    fastest = max(fit.tokens_per_second for fit in fitting)
    return next(fit for fit in fitting if fit.tokens_per_second >= AS_FAST * fastest)


def settle_checkpointing(job: Job, ranks: int, agree: Callable[[float], float]) -> Job:
    """Decide `train.gradient_checkpointing: auto`; arguments as of `settle_budget`."""
    train = job.config.train
    if train.gradient_checkpointing != "auto":
        return job
    wanted = not agree(float(_fits(job, ranks)))
    if wanted:
        checkpoint_activations(job.model)
    log.info("train.gradient_checkpointing: auto is %s on %s", wanted, job.precision.device)
    train = train.model_copy(update={"gradient_checkpointing": wanted})
    return replace(job, config=job.config.model_copy(update={"train": train}))


def settle_budget(job: Job, ranks: int, agree: Callable[[float], float]) -> Job:
    """Decide `batch.tokens: auto` for a run on `ranks` processes; `agree` gives a number's least over all ranks."""
    if job.config.batch.tokens != "auto":
        return job
    tokens = int(agree(choose_budget(measure_budgets(job, ranks)).tokens))
    log.info("batch.tokens: auto is %d on %s", tokens, job.precision.device)
    batch = job.config.batch.model_copy(update={"tokens": tokens})
    return replace(job, config=job.config.model_copy(update={"batch": batch}))


def _fits(job: Job, ranks: int) -> bool:
    """Whether the fullest micro-batch of the run fits, or the longest sample where the budget is not decided yet."""
    plan, batch = BatchPlan.of(job.config, job.train_set.lengths, ranks), job.config.batch
    longest = int(plan.lengths.max())
    needed = plan.tokens or (longest if batch.tokens == "auto" else longest * plan.batch_size)
    memory = Memory(job.precision.device)
    tokens = max(longest, min(needed, _greatest_share(plan)))
    fit = _measure(job, replace(plan, tokens=tokens), memory)
    return fit.peak_bytes is not None and fit.peak_bytes <= memory.limit()


def _moments(job: Job) -> int:
    """Bytes that Adam will take."""
    return ADAM_MOMENTS * sum(p.nbytes for p in trainable(job.model).values())


def _rounded(tokens: int) -> int:
    return math.ceil(tokens / STEP) * STEP


def _greatest_share(plan: BatchPlan) -> int:
    """Positions of the fullest share of a step that a rank can get, whatever the order of samples."""
    share = plan.global_batch_size // plan.world_size
    taken = sorted(plan.lengths.tolist(), reverse=True)[:share]
    return sum(taken) if plan.packed else taken[0] * share


def _between(fitting: list[Fit], limit: int, too_large: int) -> int | None:
    """Where memory, which grows with the positions, would be full."""
    last, before = fitting[-1], fitting[-2] if len(fitting) > 1 else None
    if before is None or last.tokens == before.tokens:
        guess = (last.tokens + too_large) // 2
    else:
        assert last.peak_bytes is not None and before.peak_bytes is not None
        each = max((last.peak_bytes - before.peak_bytes) / (last.tokens - before.tokens), 1.0)
        guess = last.tokens + int((limit - last.peak_bytes) / each)
    guess = min(guess, too_large - STEP) // STEP * STEP
    return guess if guess > last.tokens else None


def _measure(job: Job, plan: BatchPlan, memory: Memory) -> Fit:
    """Time and memory of forward and backward passes of a micro-batch that fills the budget."""
    batch = job.family.collate([job.train_set[i] for i in _fullest(plan)])
    objective = Objective(job.model, job.family, job.precision, job.config.train.head_weights).train()
    before, seconds = rng_state(), []
    memory.start()
    try:
        for _ in range(1 + TIMED_PASSES):
            seconds.append(_one_pass(objective, batch, memory.device))
        peak = memory.peak() + _moments(job)
    except torch.OutOfMemoryError:
        peak = None
    objective.zero_grad(set_to_none=True)
    set_rng_state(before)
    timed = min(seconds[1:], default=0.0)
    return Fit(sum(batch.lengths), len(batch.sample_ids), batch.audio_seconds, timed, peak)


def _fullest(plan: BatchPlan) -> list[int]:
    """The longest samples that fit a budget, over and over until the shortest finds no room."""
    longest_first = plan.lengths.argsort(kind="stable")[::-1].tolist()
    room, part = plan.tokens or 0, []
    if not plan.packed:
        return longest_first[:1] * (room // int(plan.lengths.max()))
    while not part or room >= plan.lengths.min():
        for index in longest_first:
            if plan.lengths[index] <= room:
                part.append(index)
                room -= int(plan.lengths[index])
    return part


def _one_pass(objective: nn.Module, batch: Batch, device: torch.device) -> float:
    started = time.monotonic()
    moved = batch.to(device)
    loss, _ = objective(moved, moved.target_counts)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic() - started

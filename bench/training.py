"""Training throughput against `peers/higgs_trainer.py`: model, data, LoRA, optimizer, threads, samples per step alike.

Both sides are timed by one hook that torch calls behind every optimizer step, so what a loop does between its steps
counts in full; tokens are real positions, without padding. The first step is left out, and the steps timed see each
sample once. Ours is `speechtune.loop.Run` with its guards on. The peer runs at the best of its settings, found first
with the same data; that table is part of the result.
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from peers import higgs_trainer as peer
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.utils import logging as transformers_logging
from voices import (
    BENCH,
    LORA_ALPHA,
    LORA_RANK,
    RATE,
    SAMPLES_PER_STEP,
    SEED,
    SYSTEM,
    Size,
    bench_config,
    equal_seconds,
    make_base,
    make_examples,
    make_job,
    mixed_seconds,
    read_examples,
    write_examples,
)

from speechtune.loop import Run

SAMPLES = 32
TIMED_STEPS = SAMPLES // SAMPLES_PER_STEP
OURS_TOKENS = 2048
TRIES, LOADERS = 2, 2
CANDIDATES = (
    peer.Settings(1, 8),
    peer.Settings(4, 2),
    peer.Settings(8, 1),
    peer.Settings(1, 8, "random"),
    peer.Settings(4, 2, "random"),
    peer.Settings(8, 1, "random"),
    peer.Settings(4, 2, "batch_rebalance"),
)
DISTRIBUTIONS: dict[str, Callable[[int], list[tuple[float, float]]]] = {"mixed": mixed_seconds, "equal": equal_seconds}


@dataclass(frozen=True)
class Rate:
    """Real tokens per second of wall time, and per second of this process's CPU time."""

    wall: float
    cpu: float


@dataclass
class Meter:
    """Time and real tokens at the end of every optimizer step."""

    tokens: int = 0
    marks: list[tuple[float, float, int]] = field(default_factory=list)

    def mark(self, *_: object) -> None:
        """Called by torch when an optimizer has stepped."""
        self.marks.append((perf_counter(), process_time(), self.tokens))

    def rate(self) -> Rate:
        """From the end of the first step to the end of the last."""
        (wall, cpu, tokens), (last_wall, last_cpu, last_tokens) = self.marks[0], self.marks[-1]
        return Rate((last_tokens - tokens) / (last_wall - wall), (last_tokens - tokens) / (last_cpu - cpu))


@contextmanager
def metered() -> Iterator[Meter]:
    """Watch the optimizers of this process."""
    meter = Meter()
    handle = register_optimizer_step_post_hook(meter.mark)
    try:
        yield meter
    finally:
        handle.remove()
        gc.collect()
        for state in (PartialState, AcceleratorState, GradientState):  # else the next run would find this one's
            state._reset_state()


def train_ours(
    base: Path, data: Path, folder: Path, steps: int, **sections: dict[str, Any]
) -> tuple[Meter, list[float]]:
    """Train with the toolkit's loop; the meter, and the loss of every step."""
    output_dir = folder / "ours"
    shutil.rmtree(output_dir, ignore_errors=True)
    config = bench_config(base, output_dir, steps, **({"batch": {"tokens": OURS_TOKENS}} | sections))
    job = make_job(config, read_examples(data), folder / "cache")
    lengths = job.train_set.lengths
    with metered() as meter:
        run = Run(job, Accelerator(cpu=not torch.cuda.is_available(), project_dir=output_dir))

        def count(*_: object) -> None:
            meter.tokens += int(lengths[run.plan.global_batch(len(meter.marks))].sum())

        run.optimizer.register_step_pre_hook(count)
        run.train()
    records = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return meter, [float(json.loads(line)["loss"]) for line in records]


def train_peer(base: Path, data: Path, folder: Path, steps: int, settings: peer.Settings) -> tuple[Meter, list[float]]:
    """Train with the peer's script; the meter, and the loss of every micro-batch."""
    model = peer.load_model(str(base / "model"), LORA_RANK, LORA_ALPHA, SEED)
    voices = peer.Voices(str(base / "model"), data, SYSTEM)
    losses: list[torch.Tensor] = []
    with metered() as meter:

        def count(_: object, __: object, inputs: dict[str, torch.Tensor], output: Any) -> None:
            meter.tokens += int(inputs["attention_mask"].sum())
            losses.append(output.loss.detach())

        model.get_base_model().register_forward_hook(count, with_kwargs=True)
        peer.make_trainer(model, voices, settings, steps, folder / "peer", RATE).train()
    return meter, [float(loss) for loss in losses]


@dataclass(frozen=True)
class Setting:
    """Where the runs of one distribution of lengths find their base and data, and may write."""

    base: Path
    data: Path
    folder: Path

    def ours(self, steps: int = TIMED_STEPS + 1) -> Rate:
        """Real tokens a second of ours."""
        return train_ours(self.base, self.data, self.folder, steps)[0].rate()

    def peer(self, settings: peer.Settings, steps: int = TIMED_STEPS + 1) -> Rate:
        """Real tokens a second of the peer."""
        return train_peer(self.base, self.data, self.folder, steps, settings)[0].rate()


def prepare(folder: Path, lengths: str, samples: int = SAMPLES, size: Size = BENCH) -> Setting:
    """Make base and data of one distribution of lengths."""
    base = folder / "base"
    if not base.exists():
        make_base(base, size)
    data = write_examples(make_examples(DISTRIBUTIONS[lengths](samples), size.codebook_size), folder / lengths)
    return Setting(base, data, folder / f"{lengths}-runs")


def measure(pairs: int = 5) -> dict[str, list[float]]:
    """Ratios and rates on mixed and equal lengths, and the rates of all the peer's settings."""
    result: dict[str, list[float]] = {}
    with quiet(), tempfile.TemporaryDirectory(prefix="speechtune-bench-") as name:
        for lengths in DISTRIBUTIONS:
            setting = prepare(Path(name), lengths)
            result |= compare(setting, lengths, pairs)
    return result


def compare(setting: Setting, lengths: str, pairs: int) -> dict[str, list[float]]:
    """Find the peer's best settings, then alternate; which side begins changes from pair to pair."""
    tried: dict[peer.Settings, list[float]] = {settings: [] for settings in CANDIDATES}
    for _ in range(min(pairs, TRIES)):  # round by round: what slows the machine for a while slows all of them
        for settings in tried:
            tried[settings].append(setting.peer(settings).wall)
    fastest = max(tried, key=lambda settings: median(tried[settings]))
    loading = replace(fastest, workers=LOADERS)
    tried[loading] = [setting.peer(loading).wall for _ in range(min(pairs, TRIES))]
    best = max(tried, key=lambda settings: median(tried[settings]))
    rates: dict[str, list[Rate]] = {"ours": [], "peer": []}
    for pair in range(pairs):
        for side in ("ours", "peer") if pair % 2 else ("peer", "ours"):
            rates[side].append(setting.ours() if side == "ours" else setting.peer(best))
    both = list(zip(rates["ours"], rates["peer"], strict=True))
    result = {
        f"{lengths} lengths: ours / peer": [ours.wall / peers.wall for ours, peers in both],
        f"{lengths} lengths: ours / peer, by CPU time": [ours.cpu / peers.cpu for ours, peers in both],
        f"{lengths} lengths: ours, tokens/s": [ours.wall for ours, _ in both],
        f"{lengths} lengths: peer, tokens/s ({best})": [peers.wall for _, peers in both],
    }
    return result | {f"{lengths} lengths: peer tried, {name}": values for name, values in tried.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the runs' own lines off the table."""
    logger = logging.getLogger("speechtune")
    level, verbosity = logger.level, transformers_logging.get_verbosity()
    logger.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)

"""Our side of the training benches: `training.loop.Run` with its guards on, as a user gets it with a token budget."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from meter import Meter, metered
from voices import (
    BENCH,
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

from speechtune.training.loop import Run

OURS_TOKENS = 4096
DISTRIBUTIONS: dict[str, Callable[[int], list[tuple[float, float]]]] = {"mixed": mixed_seconds, "equal": equal_seconds}


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


def prepare(folder: Path, lengths: str, samples: int, size: Size = BENCH) -> Path:
    """Make base and data of one distribution of lengths; the data's folder."""
    if not (folder / "base").exists():
        make_base(folder / "base", size)
    return write_examples(make_examples(DISTRIBUTIONS[lengths](samples), size.codebook_size), folder / lengths)

"""The verb `fit`: measure what a recipe needs on this machine."""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from speechtune.commands import print_json, wide_console
from speechtune.config import RunConfig, world_size
from speechtune.errors import ConfigError
from speechtune.families import load_config
from speechtune.training.batching import BatchPlan
from speechtune.training.distributed import start_accelerator
from speechtune.training.memory_budget import Fit, Memory, choose_budget, measure_budgets, settle_checkpointing
from speechtune.training.prepare import prepare

GIB = 2**30


def run_fit(recipe: Path, overrides: Sequence[str], *, price_per_hour: float | None, as_json: bool) -> int:
    """Measure budgets for a recipe with its own data and base, and print what the complete run will take; 0.

    Nothing is written but the encoded clips, which the run will need anyway. The price is in any currency.
    """
    config = load_config(recipe, overrides)
    if world_size() > 1:
        raise ConfigError("speechtune fit measures one device: start it without torchrun")
    with tempfile.TemporaryDirectory() as folder:
        quiet = {
            "output_dir": Path(folder) / "output",
            "data": config.data.model_copy(update={"cache_dir": config.cache_dir}),
            "evaluate": config.evaluate.model_copy(update={"enabled": False}),
            "checkpoint": config.checkpoint.model_copy(update={"resume": None}),
            "tracking": config.tracking.model_copy(update={"trackers": ()}),
        }
        trial = config.model_copy(update=quiet)
        job = settle_checkpointing(prepare(trial, start_accelerator(trial)), 1, agree=lambda fits: fits)
        progress = Console(stderr=True)
        results = measure_budgets(job, on_result=lambda fit: progress.print(f"  {_describe(fit)}"))
    plan = BatchPlan.of(config, job.train_set.lengths, 1)
    answer = _estimate(config, plan, results, price_per_hour) | {"device": str(job.precision.device)}
    answer["gradient_checkpointing"] = job.config.train.gradient_checkpointing
    if as_json:
        print_json(answer)
    else:
        _show(answer, results, Memory(job.precision.device).limit())
    return 0


def _estimate(config: RunConfig, plan: BatchPlan, results: list[Fit], price: float | None) -> dict[str, Any]:
    """Time and cost of the run at the chosen budget, evaluation and saving left out."""
    best = choose_budget(results)
    steps = config.train.max_steps or plan.num_steps(config.train.epochs)
    positions_per_step = plan.global_batch_size * float(plan.lengths.mean())
    hours = steps * positions_per_step / best.tokens_per_second / 3600
    return {
        "tokens": best.tokens,
        "largest_tokens": max(fit.tokens for fit in results if fit.peak_bytes is not None),
        "tokens_per_second": best.tokens_per_second,
        "audio_seconds_per_second": best.audio_seconds / best.seconds,
        "peak_bytes": best.peak_bytes,
        "steps": steps,
        "micro_batches_per_step": math.ceil(positions_per_step / best.tokens),
        "hours": hours,
        "cost": None if price is None else price * hours,
        "measured": [asdict(fit) for fit in results],
    }


def _describe(fit: Fit) -> str:
    if fit.peak_bytes is None:
        return f"batch.tokens={fit.tokens}: does not fit"
    return f"batch.tokens={fit.tokens}: {fit.tokens_per_second:,.0f} positions/s, {fit.peak_bytes / GIB:.2f} GiB"


def _show(answer: dict[str, Any], results: list[Fit], limit: int) -> None:
    table = Table("batch.tokens", "samples", "positions/s", "audio s/s", "memory GiB", f"of {limit / GIB:.1f} GiB")
    for fit in results:
        row = [str(fit.tokens), str(fit.samples)]
        if fit.peak_bytes is None:
            table.add_row(*row, "does not fit")
            continue
        row += [f"{fit.tokens_per_second:,.0f}", f"{fit.audio_seconds / fit.seconds:.1f}"]
        table.add_row(*row, f"{fit.peak_bytes / GIB:.2f}", f"{fit.peak_bytes / limit:.0%}")
    console = wide_console()
    console.print(table)
    cost = "" if answer["cost"] is None else f", cost {answer['cost']:,.2f}"
    console.print(
        f"batch.tokens={answer['tokens']} on {answer['device']}: {answer['steps']} steps of about "
        f"{answer['micro_batches_per_step']} micro-batches, {answer['hours']:.2f} h{cost} for the complete run "
        "(without evaluation and saving)",
        highlight=False,
    )

"""`speechtune evaluate`: measure models on recordings or prompts, beside the base and baselines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from speechtune.data.sources import find_source
from speechtune.errors import ConfigError
from speechtune.inference.evaluate_pronunciation import evaluate
from speechtune.inference.evaluate_voices import evaluate_voice, systems_of
from speechtune.tasks.pronunciation.evaluation import print_evaluation
from speechtune.tasks.voice_cloning.comparison import Comparison, print_comparison
from speechtune.tasks.voice_cloning.scorers import load_scorers
from speechtune.types import GenerationOptions


def run_evaluate(
    data: Path,
    *,
    adapter: Sequence[Path] = (),
    model: str | None = None,
    out: Path,
    as_json: bool = False,
    cache_dir: Path,
    batch_size: int,
    max_new_tokens: int | None = None,
    train: Path | None = None,
    tasks: Sequence[str] = (),
    **voice: Any,
) -> int:
    """Evaluate what the data is for, and print the table, or with `as_json` what metrics.json holds; 0."""
    common: dict[str, Any] = {"cache_dir": cache_dir, "batch_size": batch_size}
    if find_source(data) is None and not train and not tasks:
        from speechtune.commands.evaluate import run_evaluate_voice

        report, show = run_evaluate_voice(data, adapter, model, out, max_new_tokens, **common, **voice)
    else:
        if len(adapter) > 1:
            raise ConfigError("--adapter: several are compared on voices only; name one for pronunciation")
        one = adapter[0] if adapter else None
        report = evaluate(
            data, train=train, model=model, adapter=one, out=out, max_new_tokens=max_new_tokens, tasks=tasks, **common
        )
        show = partial(print_evaluation, report)
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False, allow_nan=False))
    else:
        show(Console())
    return 0


def run_evaluate_voice(
    data: Path,
    adapters: Sequence[Path],
    model: str | None,
    out: Path,
    max_new_tokens: int | None,
    *,
    codec: str | None,
    asr: str | None,
    speaker: str | None,
    mos: str | None,
    seed: int,
    temperature: float | None,
    no_base: bool,
    cache_dir: Path,
    batch_size: int,
) -> tuple[Comparison, Callable[[Console], None]]:
    """Evaluate as the command line says; the comparison, and how to print it."""
    scorers = load_scorers(asr, speaker, mos, device="cuda" if torch.cuda.is_available() else "cpu")
    options = GenerationOptions(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    systems = systems_of(model, adapters, include_base=not no_base)
    sizes: dict[str, Any] = {"cache_dir": cache_dir, "batch_size": batch_size}
    comparison = evaluate_voice(data, systems, out, scorers, codec=codec, options=options, **sizes)
    return comparison, partial(print_comparison, comparison)

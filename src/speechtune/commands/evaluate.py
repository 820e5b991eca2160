"""The verb `evaluate`: measure models on prompts or recordings."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from speechtune.commands import check_output, print_json, wide_console
from speechtune.data.sources import find_source
from speechtune.errors import ConfigError
from speechtune.inference.evaluate_pronunciation import evaluate_pronunciation
from speechtune.inference.evaluate_voices import evaluate_voices, systems_of
from speechtune.tasks.pronunciation.evaluation import EvaluationReport, print_evaluation
from speechtune.tasks.voice_cloning.comparison import Comparison, print_comparison
from speechtune.tasks.voice_cloning.scorers import load_scorers
from speechtune.types import GenerationOptions


def run_evaluate(
    data: Path,
    *,
    adapter: Sequence[Path],
    model: str | None,
    out: Path,
    as_json: bool,
    cache_dir: Path,
    batch_size: int,
    max_new_tokens: int | None,
    train: Path | None,
    tasks: Sequence[str],
    model_options: Mapping[str, str],
    asr: str | None,
    speaker: str | None,
    mos: str | None,
    seed: int,
    temperature: float | None,
    no_base: bool,
) -> int:
    """Evaluate what the data is for, and print the table, or with `as_json` what metrics.json holds; 0."""
    check_output(out, folder=True)
    sizes: dict[str, Any] = {"cache_dir": cache_dir, "batch_size": batch_size, "model_options": model_options}
    report: Comparison | EvaluationReport
    if find_source(data) is None and not train and not tasks:
        scorers = load_scorers(asr, speaker, mos, device="cuda" if torch.cuda.is_available() else "cpu")
        options = GenerationOptions(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
        systems = systems_of(model, adapter, include_base=not no_base)
        report = evaluate_voices(data, systems, out, scorers, options=options, **sizes)
    else:
        if len(adapter) > 1:
            raise ConfigError("--adapter: several are compared on voices only; name one for pronunciation")
        asked: dict[str, Any] = {"train": train, "model": model, "adapter": adapter[0] if adapter else None}
        report = evaluate_pronunciation(data, **asked, out=out, max_new_tokens=max_new_tokens, tasks=tasks, **sizes)
    if as_json:
        print_json(report.to_json())
    elif isinstance(report, EvaluationReport):
        print_evaluation(report, wide_console())
    else:
        print_comparison(report, wide_console())
    return 0

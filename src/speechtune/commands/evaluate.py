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
from speechtune.inference.load import NO_ADAPTER
from speechtune.tasks.pronunciation.evaluation import EvaluationReport, print_evaluation
from speechtune.tasks.voice_cloning.comparison import Comparison, print_comparison
from speechtune.tasks.voice_cloning.scorers import load_scorers
from speechtune.types import GenerationOptions


def run_evaluate(
    data: Path,
    *,
    adapter: Sequence[Path],
    strength: Sequence[float],
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
    """Evaluate what the data is for, and print the table, or with `as_json` what metrics.json holds; 0.

    Each of several strengths of an adapter for pronunciation has a folder of its own in `out`.
    """
    check_output(out, folder=True)
    sizes: dict[str, Any] = {"cache_dir": cache_dir, "batch_size": batch_size, "model_options": model_options}
    reports: list[Comparison | EvaluationReport]
    if find_source(data) is None and not train and not tasks:
        scorers = load_scorers(asr, speaker, mos, device="cuda" if torch.cuda.is_available() else "cpu")
        options = GenerationOptions(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
        systems = systems_of(model, adapter, include_base=not no_base, strengths=strength)
        reports = [evaluate_voices(data, systems, out, scorers, options=options, **sizes)]
    else:
        if len(adapter) > 1:
            raise ConfigError("--adapter: several are compared on voices only; name one for pronunciation")
        if strength and not adapter:
            raise ConfigError(NO_ADAPTER)
        asked: dict[str, Any] = {"train": train, "model": model, "adapter": adapter[0] if adapter else None}
        asked |= {"max_new_tokens": max_new_tokens, "tasks": tasks, **sizes}
        folders = {s: out / f"strength-{s:g}" for s in strength} if len(strength) > 1 else {(*strength, 1.0)[0]: out}
        reports = [evaluate_pronunciation(data, strength=s, out=folder, **asked) for s, folder in folders.items()]
    if as_json:
        values = [report.to_json() for report in reports]
        print_json(values[0] if len(values) == 1 else {"strengths": values})
        return 0
    console = wide_console()
    for report in reports:
        if isinstance(report, EvaluationReport):
            if len(reports) > 1:
                console.print(f"strength {report.strength:g}")
            print_evaluation(report, console)
        else:
            print_comparison(report, console)
    return 0

"""Several systems on the same prompts: means with intervals, paired tests against the first, groups, worst outputs.

Intervals are percentile bootstraps over prompts (Efron & Tibshirani 1993, chapter 13). Differences from the first
system are tested by a paired permutation test: under the null hypothesis each prompt's difference has a random sign
(Noreen 1989). P-values are adjusted over all tests by Holm's step-down method (1979). Prompts count as independent;
several of one speaker are not quite, so true intervals are somewhat wider.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from speechtune.family import Scorers
from speechtune.tasks import statistics
from speechtune.tasks.results import write_evaluation
from speechtune.tasks.statistics import Estimate, holm, interval, permutation_test
from speechtune.tasks.voice_cloning.measures import VoiceRow, summarise, warnings_of
from speechtune.tasks.voice_cloning.scorers import what_is_missing

RESAMPLES = 1000


SIGNIFICANT = 0.05
WORST = 10
TEST = "paired permutation test over prompts, two-sided, Holm-adjusted over all tests"
INTERVAL = f"95 % percentile bootstrap over prompts, {RESAMPLES} resamples"
BETTER = {"wer": "lower", "sim": "higher", "mos": "higher", "stop_rate": "higher", "duration_ratio": "near 1"}
LABELS = {"wer": "WER", "sim": "similarity", "mos": "MOS", "stop_rate": "stopped", "duration_ratio": "duration ratio"}


@dataclass(frozen=True, slots=True)
class SystemFigures:
    """What was found of one system.

    Attributes:
        summary: as `voice_measure.summarise`.
        estimates: figure -> value and interval.
        groups: "speaker" and "language" -> group -> summary.
        worst: ids of the outputs to listen to first, and where they lie.
        warnings: sentences about what looks wrong beside the first system.
    """

    summary: dict[str, float]
    estimates: dict[str, Estimate]
    groups: dict[str, dict[str, dict[str, float]]]
    worst: list[dict[str, Any]]
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All systems by name, the baseline first; `rows` of all, `scorers` what measured, `missing` what was not there."""

    prompts: int
    systems: dict[str, SystemFigures]
    scorers: dict[str, str]
    missing: tuple[str, ...]
    rows: tuple[VoiceRow, ...] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """All but the rows as a plain dict; what is not defined is None."""
        values = statistics.to_json(replace(self, rows=()))
        del values["rows"]
        return values | {"interval": INTERVAL, "test": TEST, "baseline": next(iter(self.systems), None)}


def compare(
    systems: Mapping[str, Sequence[VoiceRow]], scorers: Scorers, *, resamples: int = RESAMPLES, seed: int = 0
) -> Comparison:
    """Compare systems that spoke the same prompts; the first is the baseline.

    Raises:
        ValueError: no system, or systems with other prompts than the first.
    """
    if not systems:
        raise ValueError("no system to compare")
    base = list(next(iter(systems.values())))
    for name, rows in systems.items():
        if [(row.id, row.text) for row in rows] != [(row.id, row.text) for row in base]:
            raise ValueError(f"{name}: other prompts than those of {next(iter(systems))}")
    p_values = _tests(systems, seed)
    found = {}
    for position, (name, rows) in enumerate(systems.items()):
        estimates = _estimates(rows, resamples, seed)
        for figure, estimate in estimates.items():
            estimates[figure] = replace(estimate, p_value=p_values.get((name, figure)))
        summary = summarise(rows)
        found[name] = SystemFigures(
            summary=summary,
            estimates=estimates,
            groups={
                "speaker": statistics.by_group(rows, lambda row: row.speaker, summarise),
                "language": statistics.by_group(rows, lambda row: row.language, summarise),
            },
            worst=[_listed(row) for row in worst(rows)],
            warnings=warnings_of(summary, summarise(base) if position else None),
        )
    named = tuple(replace(row, system=name) for name, rows in systems.items() for row in rows)
    return Comparison(len(base), found, scorers.names, tuple(what_is_missing(scorers)), named)


def worst(rows: Sequence[VoiceRow], count: int = WORST) -> list[VoiceRow]:
    """Outputs to listen to first: without sound, then by WER, then by similarity, then by MOS."""

    def key(row: VoiceRow) -> tuple[bool, float, float, float]:
        return row.problem is None, -_or(row.wer, 0.0), _or(row.sim, 1.0), _or(row.mos, 5.0)

    return sorted(rows, key=key)[:count]


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _listed(row: VoiceRow) -> dict[str, Any]:
    names = ("id", "text", "heard", "wer", "sim", "mos", "stopped", "problem", "audio")
    return {name: getattr(row, name) for name in names}


# -- intervals -----------------------------------------------------------------------------------------------------


def _weighted(rows: Sequence[VoiceRow], figure: str) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators per row, NaN and 0 where not measured: the figure is the quotient of their sums."""
    if figure == "wer":
        pairs = [(row.word_errors, row.words) if row.wer is not None else (None, None) for row in rows]
    else:
        names = {"sim": "sim", "mos": "mos", "stop_rate": "stopped", "duration_ratio": "duration_ratio"}
        values = [getattr(row, names[figure]) for row in rows]
        pairs = [(value, None if value is None else 1) for value in values]
    numerators = np.array([math.nan if a is None else float(a) for a, _ in pairs], dtype=np.float64)
    return numerators, np.array([0.0 if b is None else float(b) for _, b in pairs], dtype=np.float64)


def _estimates(rows: Sequence[VoiceRow], resamples: int, seed: int) -> dict[str, Estimate]:
    found = {}
    for figure in BETTER:
        numerators, denominators = _weighted(rows, figure)
        kept = denominators > 0
        if kept.any():
            found[figure] = interval(numerators[kept], denominators[kept], figure == "duration_ratio", resamples, seed)
    return found


# -- tests ---------------------------------------------------------------------------------------------------------


def _tests(systems: Mapping[str, Sequence[VoiceRow]], seed: int) -> dict[tuple[str, str], float]:
    """Adjusted p-value per (system, figure), of all systems but the first."""
    names = list(systems)
    raw = {}
    for figure in BETTER:
        if figure == "duration_ratio":  # a median has no sum of differences to test
            continue
        base, weights = _weighted(systems[names[0]], figure)
        for name in names[1:]:
            values, own = _weighted(systems[name], figure)
            kept = (weights > 0) & (own > 0)
            if kept.any():
                raw[(name, figure)] = permutation_test(values[kept] - base[kept], seed)
    return holm(raw)


# -- output --------------------------------------------------------------------------------------------------------


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print one table with a column per system, then warnings, the worst outputs, and what measured what."""
    table = Table("figure", "better", *map(escape, comparison.systems))
    for figure, label in LABELS.items():
        estimates = [system.estimates.get(figure) for system in comparison.systems.values()]
        if any(estimates):
            table.add_row(label, BETTER[figure], *(Text(_cell(figure, estimate)) for estimate in estimates))
    silence = (system.summary.get("silence_rate", math.nan) for system in comparison.systems.values())
    table.add_row("silent", "lower", *(f"{value:.1%}" for value in silence))
    console.print(table)
    lines = [f"{comparison.prompts} prompts; [low, high]: {INTERVAL}; p: {TEST}, * below {SIGNIFICANT}"]
    for name, system in comparison.systems.items():
        lines += [f"warning: {name}: {line}" for line in system.warnings]
        if system.worst:
            first = system.worst[0]
            lines.append(f"worst of {name}: {first['id']} {first['audio'] or ''} ({_why(first)})")
    lines += [f"{job}: {name}" for job, name in comparison.scorers.items()]
    lines += [f"missing: {line}" for line in comparison.missing]
    console.print(Text("\n".join(lines)))


def _cell(figure: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    numbers = (estimate.value, estimate.low, estimate.high)
    shown = [f"{n:.1%}" if figure in {"wer", "stop_rate"} else f"{n:.3f}" for n in numbers]
    text = f"{shown[0]} [{shown[1]}, {shown[2]}]"
    if estimate.p_value is None:
        return text
    return f"{text} p={estimate.p_value:.3g}{'*' if estimate.p_value < SIGNIFICANT else ''}"


def _why(row: Mapping[str, Any]) -> str:
    figures = (f"{name} {row[name]:.3g}" for name in ("wer", "sim", "mos") if row[name] is not None)
    return row["problem"] or ", ".join(figures) or "nothing measured"


def write_comparison(comparison: Comparison, directory: Path) -> tuple[Path, Path]:
    """Write `metrics.json` and `utterances.jsonl`; see `evaluation_files.write_evaluation`."""
    return write_evaluation(comparison, directory)

"""Several systems on the same prompts: means with intervals, paired tests against the first, groups, worst outputs.

Intervals are percentile bootstraps over prompts. Differences from the first system are tested by a paired permutation
test: under the null hypothesis each prompt's difference has a random sign (Noreen 1989). P-values are adjusted over all
tests by Holm's step-down method (1979).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from speechtune.family import Scorers
from speechtune.tasks.results import to_json
from speechtune.tasks.statistics import RESAMPLES, Estimate, by_group, estimate, holm, permutation_test
from speechtune.tasks.voice_cloning.measures import VoiceRow, summarise, warnings_of
from speechtune.tasks.voice_cloning.scorers import what_is_missing

SIGNIFICANT = 0.05
WORST = 10
TEST = "paired permutation test over prompts, two-sided, Holm-adjusted over all tests"
INTERVAL = f"95 % percentile bootstrap over prompts, {RESAMPLES} resamples"
MEASURES = {  # name: (label, which is better)
    "wer": ("WER", "lower"),
    "sim": ("similarity", "higher"),
    "mos": ("MOS", "higher"),
    "stop_rate": ("stopped", "higher"),
    "duration_ratio": ("duration ratio", "near 1"),
}
LISTED = ("id", "text", "transcript", "wer", "sim", "mos", "stopped", "defect", "audio")


@dataclass(frozen=True, slots=True)
class SystemFigures:
    """Figures of one system.

    Attributes:
        summary: as `measures.summarise`.
        estimates: measure -> value and interval.
        groups: "speaker" and "language" -> group -> summary.
        worst: the worst outputs, and where they lie.
        warnings: sentences about what looks wrong beside the first system.
    """

    summary: dict[str, float]
    estimates: dict[str, Estimate]
    groups: dict[str, dict[str, dict[str, float]]]
    worst: list[dict[str, Any]]
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All systems by name, the baseline first; `rows` of all, names of the `scorers`, and of what is `missing`.

    `strengths`: of the adapters, by the system's name.
    """

    prompts: int
    systems: dict[str, SystemFigures]
    scorers: dict[str, str]
    missing: tuple[str, ...]
    rows: tuple[VoiceRow, ...] = field(repr=False)
    strengths: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All but the rows as a plain dict; what is not defined is None."""
        values = to_json(replace(self, rows=()))
        del values["rows"]
        return values | {"interval": INTERVAL, "test": TEST, "baseline": next(iter(self.systems), None)}


def compare(systems: Mapping[str, Sequence[VoiceRow]], scorers: Scorers) -> Comparison:
    """Compare systems that spoke the same prompts; the first is the baseline.

    Raises ValueError: no system, or systems with other prompts than the first.
    """
    if not systems:
        raise ValueError("no system to compare")
    baseline, *others = systems
    prompts = [(row.id, row.text) for row in systems[baseline]]
    for name in others:
        if [(row.id, row.text) for row in systems[name]] != prompts:
            raise ValueError(f"{name}: other prompts than those of {baseline}")
    p_values = _p_values(systems)
    summaries = {name: summarise(rows) for name, rows in systems.items()}
    figures = {
        name: SystemFigures(
            summary=summaries[name],
            estimates={m: replace(figure, p_value=p_values.get((name, m))) for m, figure in _estimates(rows).items()},
            groups={column: by_group(rows, attrgetter(column), summarise) for column in ("speaker", "language")},
            worst=[{column: getattr(row, column) for column in LISTED} for row in worst(rows)],
            warnings=warnings_of(summaries[name], None if name == baseline else summaries[baseline]),
        )
        for name, rows in systems.items()
    }
    named = tuple(replace(row, system=name) for name, rows in systems.items() for row in rows)
    return Comparison(len(prompts), figures, scorers.names, tuple(what_is_missing(scorers)), named)


def worst(rows: Sequence[VoiceRow], count: int = WORST) -> list[VoiceRow]:
    """The worst outputs: those without sound, then by WER, then by similarity, then by MOS."""

    def key(row: VoiceRow) -> tuple[bool, float, float, float]:
        wer, sim, mos = row.wer or 0.0, 1.0 if row.sim is None else row.sim, 5.0 if row.mos is None else row.mos
        return row.defect is None, -wer, sim, mos

    return sorted(rows, key=key)[:count]


# -- intervals and tests -------------------------------------------------------------------------------------------


def _weighted(rows: Sequence[VoiceRow], measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators per row, NaN and 0 where not measured: the figure is the quotient of their sums."""
    if measure == "wer":
        pairs = [(row.word_errors, row.words) if row.wer is not None else (None, None) for row in rows]
    else:
        values = [getattr(row, "stopped" if measure == "stop_rate" else measure) for row in rows]
        pairs = [(value, None if value is None else 1) for value in values]
    numerators = np.array([math.nan if a is None else float(a) for a, _ in pairs], dtype=np.float64)
    return numerators, np.array([0.0 if b is None else float(b) for _, b in pairs], dtype=np.float64)


def _estimates(rows: Sequence[VoiceRow]) -> dict[str, Estimate]:
    estimates = {}
    for measure in MEASURES:
        numerators, denominators = _weighted(rows, measure)
        kept = denominators > 0
        if kept.any():
            estimates[measure] = estimate(numerators[kept], denominators[kept], median=measure == "duration_ratio")
    return estimates


def _p_values(systems: Mapping[str, Sequence[VoiceRow]]) -> dict[tuple[str, str], float]:
    """Adjusted p-value per (system, measure), of all systems but the first."""
    baseline, *others = systems
    raw = {}
    for measure in MEASURES:
        if measure == "duration_ratio":  # a median has no sum of differences to test
            continue
        base, weights = _weighted(systems[baseline], measure)
        for name in others:
            values, own = _weighted(systems[name], measure)
            kept = (weights > 0) & (own > 0)
            if kept.any():
                raw[(name, measure)] = permutation_test(values[kept] - base[kept])
    return holm(raw)


# -- output --------------------------------------------------------------------------------------------------------


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print one table with a column per system, then warnings, the worst outputs, and what measured what."""
    table = Table("figure", "better", *map(escape, comparison.systems))
    for measure, (label, better) in MEASURES.items():
        estimates = [system.estimates.get(measure) for system in comparison.systems.values()]
        if any(estimates):
            table.add_row(label, better, *(Text(_cell(measure, figure)) for figure in estimates))
    silence = (system.summary.get("silence_rate", math.nan) for system in comparison.systems.values())
    table.add_row("silent", "lower", *(f"{value:.1%}" for value in silence))
    console.print(table)
    lines = [f"{comparison.prompts} prompts; [low, high]: {INTERVAL}; p: {TEST}, * below {SIGNIFICANT}"]
    for name, system in comparison.systems.items():
        lines += [f"warning: {name}: {line}" for line in system.warnings]
        if system.worst:
            row = system.worst[0]
            measured = ", ".join(f"{key} {row[key]:.3g}" for key in ("wer", "sim", "mos") if row[key] is not None)
            reason = row["defect"] or measured or "nothing measured"
            lines.append(f"worst of {name}: {row['id']} {row['audio'] or ''} ({reason})")
    lines += [f"{job}: {name}" for job, name in comparison.scorers.items()]
    lines += [f"missing: {line}" for line in comparison.missing]
    console.print(Text("\n".join(lines)))


def _cell(measure: str, figure: Estimate | None) -> str:
    if figure is None:
        return "-"
    numbers = (figure.value, figure.low, figure.high)
    value, low, high = (f"{n:.1%}" if measure in {"wer", "stop_rate"} else f"{n:.3f}" for n in numbers)
    if figure.p_value is None:
        return f"{value} [{low}, {high}]"
    return f"{value} [{low}, {high}] p={figure.p_value:.3g}{'*' if figure.p_value < SIGNIFICANT else ''}"

"""The curves of runs as data for the plots of a page, which its script draws."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from speechtune.report.facts import CODEBOOK, better, measure_label
from speechtune.report.read_run import RATES, Curve, RunReport, curve, names_in

MAX_POINTS = 160
"""Most points drawn of a curve; in a longer one each is the mean of some steps, and a band shows their range."""
MAX_MARKS = 40

Point = tuple[float | None, ...]
"""Step and mean over a part of the steps, and where they differ the least and greatest value; None is a gap."""


class Line(NamedTuple):
    """One curve of a plot; `base` is the zero-shot base's value, `broken` the steps without a finite one."""

    label: str
    colour: int
    points: list[Point]
    base: float | None
    broken: list[int]


class Plot(NamedTuple):
    """One plot; the axis of values may be logarithmic where `log` is set."""

    title: str
    note: str
    log: bool
    lines: list[Line]


def section_plots(reports: Sequence[RunReport]) -> dict[str, list[Plot]]:
    """The plots of each section: losses per head, rate and norm; evaluations; throughput and waiting for data."""
    heads = names_in(chain.from_iterable(report.steps for report in reports), "losses")
    total = [] if len(heads) == 1 else ["loss"]
    return {
        "curves": _plots(reports, [*total, *(f"losses/{head}" for head in heads), "learning_rate", "grad_norm"]),
        "evaluation": _evaluation_plots(reports),
        "time": _plots(reports, RATES),
    }


def _evaluation_plots(reports: Sequence[RunReport]) -> list[Plot]:
    """Evaluation losses and scores against the zero-shot base; the codebooks of a single run share one plot."""
    records = [record for report in reports for record in report.evaluations]
    heads, scores = names_in(records, "eval_losses"), names_in(records, "scores")
    names = ["eval_loss", *(f"eval_losses/{head}" for head in heads if len(heads) > 1)]
    codebooks = [name for name in scores if name.startswith(CODEBOOK)] if len(reports) == 1 else []
    plots = _plots(reports, [*names, *(f"scores/{name}" for name in scores if name not in codebooks)], evaluated=True)
    if codebooks:
        curves = {name.removeprefix(CODEBOOK): curve(records, f"scores/{name}") for name in codebooks}
        lines = [_line(label, i, points) for i, (label, points) in enumerate(curves.items())]
        plots.append(Plot("accuracy per codebook", better("accuracy"), False, lines))
    return plots


def _plots(reports: Sequence[RunReport], names: Iterable[str], *, evaluated: bool = False) -> list[Plot]:
    plots = []
    for name in names:
        curves = [curve(report.evaluations if evaluated else report.steps, name) for report in reports]
        runs = enumerate(zip(reports, curves, strict=True))
        lines = [_line(report.name, i, points) for i, (report, points) in runs if points]
        if lines:
            last = name.rpartition("/")[2]
            plots.append(Plot(measure_label(name), better(last), "loss" in name or name == "grad_norm", lines))
    return plots


def _line(label: str, colour: int, points: Curve) -> Line:
    base = points[0][1] if points and points[0][0] == 0 else None
    broken = [step for step, value in points if value is None]
    return Line(label, colour, downsample(points), base, broken[:MAX_MARKS])


def downsample(points: Curve, limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points; of longer curves each is the mean of a part of the steps, with its range."""
    drawn: list[Point] = []
    for part in np.array_split(np.array(points, float).reshape(-1, 2), max(1, min(limit, len(points)))):
        values = part[:, 1][np.isfinite(part[:, 1])]
        # Nine digits are more than any screen shows, and keep the page small.
        numbers = [float(f"{n:.9g}") for n in (values.mean(), values.min(), values.max())] if len(values) else [None]
        drawn.append((round(float(part[:, 0].mean()), 1), *(numbers if len(set(numbers)) > 1 else numbers[:1])))
    return drawn

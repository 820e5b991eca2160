"""Curves of runs as SVG: a page shows them without any script."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from speechtune.report.facts import CODEBOOK, better, figure, measure_label
from speechtune.report.read_run import RunReport, names_in

MAX_POINTS = 160
"""Most points drawn of a curve; in a longer one each is the mean of some steps, and a band shows their range."""
LOG_FROM = 50.0
"""Ratio of greatest to smallest value from which an axis of losses or norms is logarithmic."""
MAX_MARKS = 40
COLOURS = 8  # variables --c0 to --c7 of the style sheet; more lines repeat them
SOLID = 4  # later lines are dashed, because not everybody can tell eight colours apart

WIDTH, HEIGHT = 440.0, 250.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 428.0, 12.0, 212.0

Curve = Sequence[tuple[int, float | None]]


@dataclass(frozen=True, slots=True)
class Point:
    """One drawn point: mean over a part of the steps, and the least and greatest value in it; None is a gap."""

    step: float
    value: float | None
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Line:
    """One curve of a panel; `baseline` is the zero-shot base's value."""

    label: str
    colour: int
    curve: Curve
    baseline: float | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot: what it shows, its curves, how they are drawn."""

    title: str
    note: str
    lines: list[Line]
    log: bool = False
    dots: bool = False


def training_panels(reports: Sequence[RunReport]) -> list[Panel]:
    """Losses per head, learning rate and gradient norm."""
    heads = list(dict.fromkeys(head for report in reports for head in names_in(report.steps, "losses")))
    total = "loss" if len(heads) < 2 else "loss, all heads weighted"
    wanted = [(total, "loss", True)] + [(f"loss of the {head} head", f"losses/{head}", True) for head in heads]
    if len(heads) == 1:
        wanted = wanted[1:]
    wanted += [("learning rate", "learning_rate", False), ("gradient norm, before clipping", "grad_norm", True)]
    return _panels(reports, wanted)


def throughput_panels(reports: Sequence[RunReport]) -> list[Panel]:
    """How fast the steps went, and how long they waited for data."""
    wanted = {
        "seconds of audio per second": "audio_seconds_per_second",
        "positions per second": "tokens_per_second",
        "share of the step spent waiting for data": "data_wait_share",
    }
    return _panels(reports, [(title, name, False) for title, name in wanted.items()])


def _panels(reports: Sequence[RunReport], wanted: Iterable[tuple[str, str, bool]]) -> list[Panel]:
    panels = []
    for title, name, log in wanted:
        lines = [Line(report.name, i, report.training_curve(name)) for i, report in enumerate(reports)]
        panels.append(Panel(title, "", [line for line in lines if line.curve], log))
    return [panel for panel in panels if panel.lines]


def evaluation_panels(reports: Sequence[RunReport]) -> list[Panel]:
    """Evaluation losses and scores against the zero-shot base; the codebooks of a single run share one plot."""
    heads = dict.fromkeys(head for report in reports for head in names_in(report.evaluations, "eval_losses"))
    scores = dict.fromkeys(name for report in reports for name in names_in(report.evaluations, "scores"))
    measured = any(record.get("eval_loss") is not None for report in reports for record in report.evaluations)
    names = [*(["eval_loss"] if measured else []), *(f"eval_losses/{head}" for head in heads if len(heads) > 1)]
    codebooks = [name for name in scores if name.startswith(CODEBOOK)]
    alone = len(reports) == 1
    panels = []
    for name in [*names, *(f"scores/{score}" for score in scores if not (alone and score in codebooks))]:
        lines = [_evaluation_line(report, name, report.name, i) for i, report in enumerate(reports)]
        last = name.rpartition("/")[2]
        title = f"evaluation loss of the {last} head" if name.startswith("eval_losses/") else measure_label(last)
        panels.append(Panel(title, better(last), [line for line in lines if line.curve], log="loss" in name, dots=True))
    if alone and codebooks:
        labels = [name.removeprefix(CODEBOOK) for name in codebooks]
        lines = [_evaluation_line(reports[0], f"scores/{CODEBOOK}{n}", n, i) for i, n in enumerate(labels)]
        panels.append(Panel("accuracy per codebook", "higher is better", lines, dots=True))
    return [panel for panel in panels if panel.lines]


def _evaluation_line(report: RunReport, name: str, label: str, colour: int) -> Line:
    curve = report.evaluation_curve(name)
    baseline = curve[0][1] if curve and curve[0][0] == 0 else None
    return Line(label, colour, curve, baseline)


def downsample(curve: Curve, limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points; of longer curves each is the mean of a part of the steps, with its range."""
    if len(curve) <= limit:
        return [Point(step, value, value or 0.0, value or 0.0) for step, value in curve]
    points = []
    for i in range(limit):
        part = curve[i * len(curve) // limit : (i + 1) * len(curve) // limit]
        values = [value for _, value in part if value is not None]
        middle = fmean(step for step, _ in part)
        if values:
            points.append(Point(middle, fmean(values), min(values), max(values)))
        else:
            points.append(Point(middle, None, 0.0, 0.0))
    return points


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps steps and values to coordinates of the drawing."""

    first: float
    last: float
    low: float
    high: float
    log: bool

    def x(self, step: float) -> float:
        """Distance from the left."""
        return LEFT + (step - self.first) / (self.last - self.first) * (RIGHT - LEFT)

    def y(self, value: float) -> float:
        """Distance from the top."""
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        place = math.log10(max(value, self.low)) if self.log else value
        return BOTTOM - (place - low) / (high - low) * (BOTTOM - TOP)


def make_scale(panel: Panel, drawn: Sequence[Sequence[Point]]) -> Scale:
    """Axes that contain all of a panel, the base's lines too; never of zero length."""
    points = [point for line in drawn for point in line]
    steps = [point.step for point in points]
    values = [v for p in points if p.value is not None for v in (p.low, p.high)]
    values += [line.baseline for line in panel.lines if line.baseline is not None]
    first, last = min(steps), max(steps)
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    log = panel.log and low > 0 and high / low > LOG_FROM
    if log:
        return Scale(first, max(last, first + 1), low / 1.1, high * 1.1, True)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    floor = 0.0 if 0 <= low < max(margin, 0.4 * high) else low - margin
    return Scale(first, max(last, first + 1), floor, high + margin, False)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers between two values."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    start = math.ceil(low / spacing)
    return [spacing * n for n in range(start, math.floor(high / spacing) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two values; of many only some, with few also their multiples by 2 and 5."""
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    every = max(1, (last - first) // 5)
    ticks = [10.0**n for n in range(first, last + 1, every)]
    if len(ticks) < 3:
        ticks = [f * 10.0**n for n in range(first - 1, last + 1) for f in (1, 2, 5) if low <= f * 10.0**n <= high]
    return ticks


def compact(value: float) -> str:
    """A short label for an axis."""
    if value and abs(value) >= 1000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{0.0 if abs(value) < 1e-12 else value:.4g}"


def svg(panel: Panel) -> str:
    """One panel as an SVG element, coloured by the style sheet; its data attributes are for the script."""
    drawn = [downsample(line.curve) for line in panel.lines]
    scale = make_scale(panel, drawn)
    lines = [_draw(line, points, scale, dots=panel.dots) for line, points in zip(panel.lines, drawn, strict=True)]
    attributes = (
        f'data-first="{scale.first:g}" data-last="{scale.last:g}" data-low="{scale.low!r}" data-high="{scale.high!r}" '
        f'data-log="{int(scale.log)}" data-left="{LEFT:g}" data-right="{RIGHT:g}" data-top="{TOP:g}" '
        f'data-bottom="{BOTTOM:g}"'
    )
    label = escape(f"{panel.title} by step", quote=True)
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{label}" {attributes}>'
        + "".join([_axes(scale), *lines])
        + f'<line class="cursor" y1="{TOP:g}" y2="{BOTTOM:g}"/></svg>'
    )


def _axes(scale: Scale) -> str:
    parts = []
    for value in log_ticks(scale.low, scale.high) if scale.log else linear_ticks(scale.low, scale.high):
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{LEFT:g}" x2="{RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{compact(value)}</text>')
    for step in linear_ticks(scale.first, scale.last):
        if step == round(step):
            x = scale.x(step)
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{BOTTOM + 17:g}" text-anchor="middle">{compact(step)}</text>'
            )
    parts.append(f'<line class="axis" x1="{LEFT:g}" x2="{RIGHT:g}" y1="{BOTTOM:g}" y2="{BOTTOM:g}"/>')
    parts.append(f'<text class="name" x="{(LEFT + RIGHT) / 2:g}" y="{HEIGHT - 4:g}" text-anchor="middle">step</text>')
    return "".join(parts)


def _draw(line: Line, points: Sequence[Point], scale: Scale, *, dots: bool) -> str:
    parts, colour = [], f"c{line.colour % COLOURS}"
    label = escape(line.label, quote=True)
    if line.baseline is not None:
        y = scale.y(line.baseline)
        parts.append(f'<line class="base {colour}" x1="{LEFT:g}" x2="{RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}">')
        parts.append(f"<title>zero-shot base, {label}: {figure(line.baseline)}</title></line>")
    segments = _segments(points)
    for segment in segments:
        if any(point.low < point.high for point in segment):
            edge = [(p.step, p.high) for p in segment] + [(p.step, p.low) for p in reversed(segment)]
            parts.append(f'<path class="band {colour}" d="{_path(edge, scale)}Z"/>')
    dashed = " dashed" if line.colour >= SOLID else ""
    route = "".join(_path([(p.step, p.value or 0.0) for p in segment], scale) for segment in segments)
    if route:
        parts.append(f'<path class="line {colour}{dashed}" data-label="{label}" d="{route}"/>')
    for point in points if dots or len(points) == 1 else ():
        if point.value is not None:
            parts.append(
                f'<circle class="dot {colour}" cx="{scale.x(point.step):.1f}" cy="{scale.y(point.value):.1f}" r="3.5">'
                f"<title>step {point.step:g}, {label}: {figure(point.value)}</title></circle>"
            )
    for step in [step for step, value in line.curve if value is None][:MAX_MARKS]:
        parts.append(
            f'<text class="broken" x="{scale.x(step):.1f}" y="{BOTTOM - 3:g}" text-anchor="middle">&#215;'
            f"<title>step {step}, {label}: NaN or infinite</title></text>"
        )
    return "".join(parts)


def _segments(points: Sequence[Point]) -> list[list[Point]]:
    """Runs of points without a gap."""
    segments: list[list[Point]] = [[]]
    for point in points:
        if point.value is not None:
            segments[-1].append(point)
        elif segments[-1]:
            segments.append([])
    return [segment for segment in segments if segment]


def _path(places: Iterable[tuple[float, float]], scale: Scale) -> str:
    return "M" + "L".join(f"{scale.x(step):.1f} {scale.y(value):.1f}" for step, value in places)

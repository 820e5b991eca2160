"""The page of a report: one HTML file that holds style, curves, pictures and sound, and may load nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from string import Template

import yaml

from speechtune import __version__
from speechtune.report import facts
from speechtune.report.plots import COLOURS, SOLID, Panel, evaluation_panels, svg, throughput_panels, training_panels
from speechtune.report.read_run import FINISHED, GUARD, UNFINISHED, RunReport
from speechtune.report.sound import AudioBudget, listening

ASSETS = resources.files("speechtune") / "assets" / "report"
BADGES = {FINISHED: "finished", UNFINISHED: "unfinished"}
MAX_WARNINGS = 200
SHORT_CELL = 20  # characters


def page(reports: Sequence[RunReport], budget: AudioBudget | None = None) -> str:
    """The whole page for one run or several; `budget` limits the sound on it."""
    budget = budget or AudioBudget()
    body = one_run(reports[0], budget) if len(reports) == 1 else several_runs(reports, budget)
    script = (ASSETS / "report.js").read_text(encoding="utf-8")
    # Only this very script may run, and nothing may be fetched, whatever a data set's texts hold.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
        f"form-action 'none'; script-src 'sha256-{digest}'"
    )
    return Template((ASSETS / "page.html").read_text(encoding="utf-8")).substitute(
        policy=policy,
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        title=text(", ".join(report.name for report in reports) + " · speechtune report"),
        style=(ASSETS / "report.css").read_text(encoding="utf-8"),
        script=script,
        body=body,
    )


def text(value: object) -> str:
    """Text from data, made harmless."""
    return escape(str(value), quote=True)


def one_run(report: RunReport, budget: AudioBudget) -> str:
    """Body for a single run."""
    sections = [
        ("curves", "Training", plots(training_panels([report]))),
        ("evaluation", "Evaluation", evaluation([report])),
        ("listen", "Listening", listening([report], budget)),
        ("what", "What was trained on what", identity(report)),
        ("guards", "Guards and warnings", guards(report)),
        ("checkpoints", "Checkpoints", checkpoints(report)),
        ("time", "Throughput and time", timing(report) + plots(throughput_panels([report]))),
        ("again", "The same again", reproduce(report)),
        ("lacks", "What this report lacks", lacks(report)),
    ]
    badge = f'<span class="badge {BADGES.get(report.state, "stopped")}">{text(report.state)}</span>'
    head = (
        f'<header><p class="faint">speechtune report</p><h1>{text(report.name)}</h1>'
        f'<p>{badge} <span class="faint">{text(report.directory)}</span></p>{stop_notice(report)}'
        f"{figures(facts.headline(report))}{contents(sections)}</header>"
    )
    return head + "".join(section(*parts) for parts in sections)


def several_runs(reports: Sequence[RunReport], budget: AudioBudget) -> str:
    """Body for a comparison: what differs, final figures, curves laid over one another, then each run."""
    names = ["", *(report.name for report in reports)]
    differing = facts.differences(reports)
    differences = table([names, *differing]) if differing else "<p>The runs have the same configuration.</p>"
    sections = [
        ("differences", "What differs", differences),
        ("figures", "Final figures", table([names, *facts.final_figures(reports)])),
        ("curves", "Training", plots(training_panels(reports))),
        ("evaluation", "Evaluation", evaluation(reports)),
        ("listen", "Listening", listening(reports, budget)),
        ("time", "Throughput", plots(throughput_panels(reports))),
        ("runs", "Each run", "".join(details_of(report) for report in reports)),
    ]
    warning = facts.not_comparable(reports)
    notice = f'<p class="warnings">{text(warning)}</p>' if warning else ""
    badges = "".join(
        f'<li class="c{i % COLOURS}"><i></i>{text(report.name)} '
        f'<span class="badge {BADGES.get(report.state, "stopped")}">{text(report.state)}</span></li>'
        for i, report in enumerate(reports)
    )
    head = (
        f'<header><p class="faint">speechtune report</p><h1>{len(reports)} runs compared</h1>'
        f'<ul class="legend">{badges}</ul>{notice}{contents(sections)}</header>'
    )
    return head + "".join(section(*parts) for parts in sections)


def details_of(report: RunReport) -> str:
    """One run of a comparison, folded."""
    parts = [
        stop_notice(report),
        identity(report),
        f"<h3>Guards and warnings</h3>{guards(report)}",
        f"<h3>Checkpoints</h3>{checkpoints(report)}",
        f"<h3>Throughput and time</h3>{timing(report)}",
        f"<h3>The same again</h3>{reproduce(report)}",
        f"<h3>What is lacking</h3>{lacks(report)}",
    ]
    return f'<details class="run"><summary>{text(report.name)}</summary>{"".join(parts)}</details>'


def section(anchor: str, title: str, content: str) -> str:
    """One section under its heading."""
    return f'<section id="{anchor}"><h2>{title}</h2>{content}</section>'


def contents(sections: Sequence[tuple[str, str, str]]) -> str:
    """Links to the sections."""
    return "<nav>" + "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in sections) + "</nav>"


def figures(rows: facts.Rows) -> str:
    """Key figures as cards."""
    cells = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in rows)
    return f'<dl class="figures">{cells}</dl>'


def definitions(rows: facts.Rows) -> str:
    """Names and values."""
    return '<dl class="facts">' + "".join(f"<dt>{text(n)}</dt><dd>{text(v)}</dd>" for n, v in rows) + "</dl>"


def table(rows: Sequence[Sequence[str]], classes: Iterable[str] = ()) -> str:
    """A table that scrolls by itself on a narrow screen; the first row names the columns."""
    head = "".join(_cell("th", cell) for cell in rows[0])
    kinds = [*classes, *[""] * len(rows)]
    lines = []
    for row, kind in zip(rows[1:], kinds, strict=False):
        lines.append(f'<tr class="{kind}">{"".join(_cell("td", cell) for cell in row)}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cell(tag: str, value: str) -> str:
    """A short text stays on one line, however narrow the screen; the table scrolls then."""
    kind = ' class="short"' if len(value) <= SHORT_CELL else ""
    return f"<{tag}{kind}>{text(value)}</{tag}>"


def plots(panels: Sequence[Panel]) -> str:
    """Panels side by side, as many as fit."""
    return f'<div class="plots">{"".join(map(figure_of, panels))}</div>' if panels else "<p>Nothing recorded.</p>"


def figure_of(panel: Panel) -> str:
    """One plot with title and legend."""
    legend = f"<li>{text(panel.note)}</li>" if panel.note else ""
    if len(panel.lines) > 1:
        for line in panel.lines:
            dash = ' class="dash"' if line.colour >= SOLID else ""
            legend += f'<li class="c{line.colour % COLOURS}"><i{dash}></i>{text(line.label)}</li>'
    bases = [line for line in panel.lines if line.baseline is not None]
    if bases:
        shown = f" {facts.figure(bases[0].baseline)}" if len(panel.lines) == 1 else ""
        legend += f'<li class="c{bases[0].colour % COLOURS}"><i class="dot"></i>zero-shot base{shown}</li>'
    items = f'<ul class="legend">{legend}</ul>' if legend else ""
    return f'<figure class="panel"><h3>{text(panel.title)}</h3>{items}{svg(panel)}<p class="reading"></p></figure>'


def evaluation(reports: Sequence[RunReport]) -> str:
    """Evaluation curves, and for a single run the table of all evaluations."""
    panels = evaluation_panels(reports)
    if not panels:
        return "<p>No evaluation was recorded.</p>"
    rows = facts.evaluation_table(reports[0]) if len(reports) == 1 else []
    every = f"<details><summary>All evaluations as a table</summary>{table(rows)}</details>" if rows else ""
    return plots(panels) + every


def identity(report: RunReport) -> str:
    """Base, adapter, hashes, versions, hardware, precision; data; parameters."""
    rows = facts.parameter_rows(report)
    head = ("part", "base parameters", "trainable")
    parameters = f"<h3>Parameters</h3>{table([head, *rows])}" if rows else ""
    data = f"<h3>Data</h3>{definitions(facts.data_rows(report))}"
    return f'<div class="columns">{definitions(facts.identity_rows(report))}<div>{data}<br>{parameters}</div></div>'


def stop_notice(report: RunReport) -> str:
    """Why a run stopped, if a guard stopped it."""
    return f'<p class="stop">{text(facts.state_line(report))}</p>' if report.state not in BADGES else ""


def guards(report: RunReport) -> str:
    """Guards that fired, warnings, steps without finite values."""
    parts = []
    broken = report.non_finite
    if broken:
        shown = ", ".join(map(str, broken[:10])) + (" ..." if len(broken) > 10 else "")
        parts.append(f'<p class="warnings">{len(broken)} step(s) with a loss or norm not finite: {shown}</p>')
    if report.warnings:
        rows = [
            (facts.figure(w.get("step")), str(w.get("kind", "")), str(w.get("message", ""))) for w in report.warnings
        ]
        kinds = ["damaged" if kind == GUARD else "" for _, kind, _ in rows]
        parts.append(table([("step", "kind", "message"), *rows[:MAX_WARNINGS]], kinds))
        if len(rows) > MAX_WARNINGS:
            parts.append(f"<p>{len(rows) - MAX_WARNINGS} more in warnings.jsonl.</p>")
    elif (report.directory / "warnings.jsonl").exists():
        parts.append("<p>No guard fired and no evaluation warned.</p>")
    else:
        parts.append("<p>This run kept no warnings.jsonl, so nothing is known of warnings.</p>")
    return "".join(parts)


def checkpoints(report: RunReport) -> str:
    """Checkpoint folders, whether they are whole, and which is the best."""
    rows = facts.checkpoint_table(report)
    if not rows:
        return "<p>No checkpoint in this folder.</p>"
    kinds = ["damaged" if c.problem else "best" if c.best else "" for c in report.checkpoints]
    return f"<p>{text(facts.best_line(report))}</p>{table(rows, kinds)}"


def timing(report: RunReport) -> str:
    """Throughput and where the time went."""
    parts = facts.time_parts(report)
    total = sum(seconds for _, seconds in parts)
    bar = ""
    if total:
        spans = "".join(
            f'<span class="c{i % COLOURS}" style="flex:{max(seconds, 0.0) / total:.5f} 0 0" '
            f'title="{text(label)}: {seconds / total:.0%}"></span>'
            for i, (label, seconds) in enumerate(parts)
        )
        names = "".join(
            f'<li class="c{i % COLOURS}"><i></i>{text(label)} {seconds / total:.0%}</li>'
            for i, (label, seconds) in enumerate(parts)
        )
        bar = f'<div class="bar">{spans}</div><ul class="legend">{names}</ul><br>'
    return f"{bar}{definitions(facts.time_rows(report))}<br>"


def reproduce(report: RunReport) -> str:
    """The command, and the resolved configuration."""
    command, recorded = report.command
    note = "" if recorded else "<p>The run recorded no command; its resolved configuration does the same:</p>"
    config = yaml.safe_dump(dict(report.config), sort_keys=False, allow_unicode=True) if report.config else ""
    folded = f"<details><summary>Resolved configuration</summary><pre>{text(config)}</pre></details>" if config else ""
    return f"{note}<pre>{text(command)}</pre>{folded}"


def lacks(report: RunReport) -> str:
    """What could not be said."""
    if not report.missing:
        return "<p>Nothing: every file of a run was there and readable.</p>"
    return "<ul>" + "".join(f"<li>{text(line)}</li>" for line in report.missing) + "</ul>"

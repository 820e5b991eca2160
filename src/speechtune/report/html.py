"""The report as one HTML page, with style, curves, pictures and sound inside; it loads nothing from anywhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from string import Template

import yaml

from speechtune import __version__
from speechtune.report import facts
from speechtune.report.plots import COLOURS, SOLID, Panel, evaluation_panels, svg, throughput_panels, training_panels
from speechtune.report.read_run import FINISHED, UNFINISHED, RunReport
from speechtune.report.sections import Block, Definitions, Listing, Note, Table, comparison, not_comparable, sections
from speechtune.report.sound import AudioBudget, samples

ASSETS = resources.files("speechtune") / "assets" / "report"
BADGES = {FINISHED: "finished", UNFINISHED: "unfinished"}
SHORT_CELL = 20  # characters that always stay on one line: a narrow screen scrolls the table


def page(reports: Sequence[RunReport], budget: AudioBudget | None = None) -> str:
    """The page for one run or several; `budget` limits the sound on it."""
    budget = budget or AudioBudget()
    body = one_run(reports[0], budget) if len(reports) == 1 else several_runs(reports, budget)
    script = (ASSETS / "report.js").read_text(encoding="utf-8")
    # Only this script may run, and nothing may be fetched, whatever the texts of a data set hold.
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
    """Text from data, escaped."""
    return escape(str(value), quote=True)


def one_run(report: RunReport, budget: AudioBudget) -> str:
    """Body for a single run."""
    parts = [  # anchor, title, content
        ("curves", "Training", plots(training_panels([report]))),
        ("evaluation", "Evaluation", evaluation([report])),
        ("samples", "Samples", samples([report], budget)),
        ("what", "What was trained on what", identity(report)),
        *text_sections(report, plots(throughput_panels([report]))),
    ]
    head = (
        f"<h1>{text(report.name)}</h1>"
        f'<p>{badge(report)} <span class="faint">{text(report.directory)}</span></p>{stop_notice(report)}'
        f"{key_figures(report)}"
    )
    return body(head, parts)


def several_runs(reports: Sequence[RunReport], budget: AudioBudget) -> str:
    """Body for a comparison: what differs, final figures, curves laid over one another, then each run."""
    parts = [
        *((anchor, title, "".join(map(block, blocks))) for anchor, title, blocks in comparison(reports)),
        ("curves", "Training", plots(training_panels(reports))),
        ("evaluation", "Evaluation", evaluation(reports)),
        ("samples", "Samples", samples(reports, budget)),
        ("time", "Throughput", plots(throughput_panels(reports))),
        ("runs", "Each run", "".join(map(details_of, reports))),
    ]
    warning = not_comparable(reports)
    badges = "".join(
        f'<li class="c{i % COLOURS}"><i></i>{text(report.name)} {badge(report)}</li>'
        for i, report in enumerate(reports)
    )
    notice = block(Note(warning, "warnings")) if warning else ""
    return body(f'<h1>{len(reports)} runs compared</h1><ul class="legend">{badges}</ul>{notice}', parts)


def body(head: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """Head, links to the sections (anchor, title, content), and the sections."""
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in sections)
    parts = "".join(
        f'<section id="{anchor}"><h2>{title}</h2>{content}</section>' for anchor, title, content in sections
    )
    return f'<header><p class="faint">speechtune report</p>{head}<nav>{links}</nav></header>{parts}'


def badge(report: RunReport) -> str:
    """The state of a run, coloured."""
    return f'<span class="badge {BADGES.get(report.state, "stopped")}">{text(report.state)}</span>'


def details_of(report: RunReport) -> str:
    """One run of a comparison, folded."""
    parts = "".join(f"<h3>{title}</h3>{content}" for _, title, content in text_sections(report))
    summary = f"<summary>{text(report.name)}</summary>"
    return f'<details class="run">{summary}{stop_notice(report)}{identity(report)}{parts}</details>'


def text_sections(report: RunReport, throughput: str = "") -> list[tuple[str, str, str]]:
    """The sections of `facts`, with what only a page shows: bar and plots of the time, and the configuration."""
    before, after = {"time": time_bar(report)}, {"time": f"<br>{throughput}", "again": configuration(report)}
    return [
        (anchor, title, before.get(anchor, "") + "".join(map(block, blocks)) + after.get(anchor, ""))
        for anchor, title, blocks in sections(report)
    ]


def block(content: Block) -> str:
    """One block of text."""
    match content:
        case Note(note, kind):
            return f'<p class="{kind}">{text(note)}</p>' if kind else f"<p>{text(note)}</p>"
        case Definitions(rows):
            return f'<dl class="facts">{"".join(f"<dt>{text(n)}</dt><dd>{text(v)}</dd>" for n, v in rows)}</dl>'
        case Listing(lines, is_code):
            if is_code:
                return "<pre>" + "\n".join(map(text, lines)) + "</pre>"
            return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>"
        case Table(rows, kinds):
            return table(rows, kinds)


def key_figures(report: RunReport) -> str:
    """Key figures as cards."""
    rows = facts.headline(report)
    cells = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in rows)
    return f'<dl class="figures">{cells}</dl>'


def table(rows: Sequence[Sequence[str]], classes: Sequence[str] = ()) -> str:
    """A table that scrolls by itself on a narrow screen; the first row names the columns."""
    head = "".join(_cell("th", cell) for cell in rows[0])
    lines = "".join(
        f'<tr class="{kind}">{"".join(_cell("td", cell) for cell in row)}</tr>'
        for row, kind in zip(rows[1:], classes or [""] * (len(rows) - 1), strict=True)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(tag: str, value: str) -> str:
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
    parameters = f"<h3>Parameters</h3>{table(rows)}" if rows else ""
    data = f"<h3>Data</h3>{block(Definitions(facts.data_rows(report)))}"
    what = block(Definitions(facts.identity_rows(report)))
    return f'<div class="columns">{what}<div>{data}<br>{parameters}</div></div>'


def stop_notice(report: RunReport) -> str:
    """Why a run stopped, if a guard stopped it."""
    return "" if report.state in BADGES else block(Note(facts.state_line(report), "stop"))


def time_bar(report: RunReport) -> str:
    """The shares of the time, as a bar with a legend."""
    parts = facts.time_parts(report)
    total = sum(seconds for _, seconds in parts)
    if not total:
        return ""
    spans = names = ""
    for i, (label, seconds) in enumerate(parts):
        share, colour = seconds / total, f'class="c{i % COLOURS}"'
        spans += f'<span {colour} style="flex:{max(share, 0.0):.5f} 0 0" title="{text(label)}: {share:.0%}"></span>'
        names += f"<li {colour}><i></i>{text(label)} {share:.0%}</li>"
    return f'<div class="bar">{spans}</div><ul class="legend">{names}</ul><br>'


def configuration(report: RunReport) -> str:
    """The resolved configuration, folded."""
    if not report.config:
        return ""
    config = yaml.safe_dump(dict(report.config), sort_keys=False, allow_unicode=True)
    return f"<details><summary>Resolved configuration</summary><pre>{text(config)}</pre></details>"

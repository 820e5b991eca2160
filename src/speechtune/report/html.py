"""The report as one HTML page, with style, curves, pictures and sound inside; it loads nothing from anywhere."""

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from string import Template

import yaml

from speechtune import __version__
from speechtune.report import facts
from speechtune.report.plots import Plot, evaluation_plots, throughput_plots, training_plots
from speechtune.report.read_run import FINISHED, UNFINISHED, RunReport
from speechtune.report.sections import Block, Definitions, Listing, Note, Table, comparison, not_comparable, sections
from speechtune.report.sound import AudioBudget, samples

ASSETS = resources.files("speechtune") / "assets" / "report"
BADGES = {FINISHED: "finished", UNFINISHED: "unfinished"}
COLOURS = 8  # variables --c0 to --c7 of the style sheet
SHORT_CELL = 20  # characters that always stay on one line: a narrow screen scrolls the table
FOLDED = {"curves": "The curves as a table", "evaluation": "All evaluations as a table"}

Parts = list[tuple[str, str, str]]
"""Anchor, title and content of each section."""


def page(reports: Sequence[RunReport], budget: AudioBudget | None = None) -> str:
    """The page for one run or several; `budget` limits the sound on it."""
    budget = budget or AudioBudget()
    head, parts = one_run(reports[0], budget) if len(reports) == 1 else several_runs(reports, budget)
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in parts)
    content = "".join(f'<section id="{anchor}"><h2>{title}</h2>{content}</section>' for anchor, title, content in parts)
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
        body=f'<header><p class="faint">speechtune report</p>{head}<nav>{links}</nav></header>{content}',
    )


def text(value: object) -> str:
    """Text from data, escaped."""
    return escape(str(value), quote=True)


def one_run(report: RunReport, budget: AudioBudget) -> tuple[str, Parts]:
    """Head and sections of the page on a single run."""
    figures = definitions(facts.headline(report), "figures", "<div>{}</div>")
    head = (
        f"<h1>{text(report.name)}</h1>"
        f'<p>{badge(report)} <span class="faint">{text(report.directory)}</span></p>{stop_notice(report)}{figures}'
    )
    before = {
        "curves": plots(training_plots([report])),
        "evaluation": plots(evaluation_plots([report])),
        "time": time_bar(report) + plots(throughput_plots([report])),
    }
    parts = text_parts(report, before)
    parts.insert(2, ("samples", "Samples", samples([report], budget)))
    return head, parts


def several_runs(reports: Sequence[RunReport], budget: AudioBudget) -> tuple[str, Parts]:
    """Head and sections of a comparison: what differs, final figures, curves laid over one another, then each run."""
    parts = [
        *((anchor, title, "".join(map(block, blocks))) for anchor, title, blocks in comparison(reports)),
        ("curves", "Training", plots(training_plots(reports))),
        ("evaluation", "Evaluation", plots(evaluation_plots(reports))),
        ("samples", "Samples", samples(reports, budget)),
        ("time", "Throughput", plots(throughput_plots(reports))),
        ("runs", "Each run", "".join(map(details_of, reports))),
    ]
    warning = not_comparable(reports)
    badges = [f"{text(report.name)} {badge(report)}" for report in reports]
    notice = block(Note(warning, "warnings")) if warning else ""
    return f"<h1>{len(reports)} runs compared</h1>{legend(badges)}{notice}", parts


def details_of(report: RunReport) -> str:
    """One run of a comparison, folded."""
    parts = "".join(
        f"<h3>{title}</h3>{content}" for _, title, content in text_parts(report, {"time": time_bar(report)})
    )
    return f'<details class="run"><summary>{text(report.name)}</summary>{stop_notice(report)}{parts}</details>'


def text_parts(report: RunReport, before: dict[str, str]) -> Parts:
    """The sections of text, after what only a page shows in them; the resolved configuration is folded below."""
    parts = []
    for anchor, title, blocks in sections(report):
        content = "".join(map(block, blocks))
        if anchor in FOLDED and content:
            content = f"<details><summary>{FOLDED[anchor]}</summary>{content}</details>"
        if anchor == "again" and report.config:
            config = yaml.safe_dump(dict(report.config), sort_keys=False, allow_unicode=True)
            content += f"<details><summary>Resolved configuration</summary><pre>{text(config)}</pre></details>"
        parts.append((anchor, title, before.get(anchor, "") + content))
    return parts


def block(content: Block) -> str:
    """One block of text."""
    match content:
        case Note(note, kind):
            return f'<p class="{kind}">{text(note)}</p>'
        case Definitions(rows):
            return definitions(rows, "facts", "{}")
        case Listing(lines, is_code):
            if is_code:
                return "<pre>" + "\n".join(map(text, lines)) + "</pre>"
            return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>"
        case Table(rows, kinds):
            return table(rows, kinds) if rows else ""


def definitions(rows: facts.Rows, kind: str, around: str) -> str:
    """Names with their values, each pair inside the tags of `around`."""
    pairs = "".join(around.format(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>") for name, value in rows)
    return f'<dl class="{kind}">{pairs}</dl>'


def table(rows: Sequence[Sequence[str]], kinds: Sequence[str]) -> str:
    """A table that scrolls by itself on a narrow screen; the first row names the columns."""
    lines = []
    for row, kind in zip(rows, ["", *(kinds or [""] * (len(rows) - 1))], strict=True):
        tag = "td" if lines else "th"
        cells = (f'<{tag} class="{"short" if len(c) <= SHORT_CELL else ""}">{text(c)}</{tag}>' for c in row)
        lines.append(f'<tr class="{kind}">{"".join(cells)}</tr>')
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def legend(items: Sequence[str]) -> str:
    """Names (HTML) with the colours of their curves or parts."""
    lines = (f'<li class="c{i % COLOURS}"><i></i>{item}</li>' for i, item in enumerate(items))
    return f'<ul class="legend">{"".join(lines)}</ul>'


def plots(drawn: Sequence[Plot]) -> str:
    """Plots side by side, as many as fit; the script draws them from their data."""
    empty = '<ul class="legend"></ul><svg class="plot" viewBox="0 0 440 250" role="img"></svg><p class="reading"></p>'
    figures = (
        f'<figure class="panel" data-plot="{text(json.dumps(plot))}"><h3>{text(plot.title)}</h3>{empty}</figure>'
        for plot in drawn
    )
    return f'<div class="plots">{"".join(figures)}</div>' if drawn else "<p>Nothing recorded.</p>"


def badge(report: RunReport) -> str:
    """The state of a run, coloured."""
    return f'<span class="badge {BADGES.get(report.state, "stopped")}">{text(report.state)}</span>'


def stop_notice(report: RunReport) -> str:
    """Why a run stopped, if a guard stopped it."""
    return "" if report.state in BADGES else block(Note(facts.state_line(report), "stop"))


def time_bar(report: RunReport) -> str:
    """The shares of the time, as a bar with a legend."""
    parts = facts.time_parts(report)
    total = sum(seconds for _, seconds in parts)
    if not total:
        return ""
    names = [f"{text(label)} {seconds / total:.0%}" for label, seconds in parts]
    spans = "".join(
        f'<span class="c{i % COLOURS}" style="flex:{max(seconds / total, 0.0):.5f} 0 0" title="{names[i]}"></span>'
        for i, (_, seconds) in enumerate(parts)
    )
    return f'<div class="bar">{spans}</div>{legend(names)}<br>'

"""The report as Markdown: the same facts without pictures and sound, for a pull request or a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from speechtune.report import facts
from speechtune.report.read_run import RunReport, section
from speechtune.training.tracking import flatten

CURVE_ROWS = 12
"""Steps of the training curve that are written out, evenly spread."""


def markdown(reports: Sequence[RunReport]) -> str:
    """The whole text for one run or several."""
    if len(reports) == 1:
        return "\n".join(_one_run(reports[0], "#")) + "\n"
    lines = [f"# {len(reports)} runs compared", ""]
    warning = facts.not_comparable(reports)
    if warning:
        lines += [plain(warning), ""]
    names = ["", *(report.name for report in reports)]
    lines += ["## What differs", "", *_table([names, *facts.differences(reports)])]
    lines += ["## Final figures", "", *_table([names, *facts.final_figures(reports)])]
    for report in reports:
        lines += _one_run(report, "##")
    return "\n".join(lines) + "\n"


def plain(value: object) -> str:
    """Text from data on one line, without meaning for Markdown or HTML."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escape(" ".join(str(value).split()), quote=False))


def _one_run(report: RunReport, level: str) -> list[str]:
    lines = [f"{level} {plain(report.name)}", "", plain(facts.state_line(report)) + ".", ""]
    for title, rows in (
        ("What was trained on what", facts.identity_rows(report)),
        ("Data", facts.data_rows(report)),
    ):
        lines += [f"{level}# {title}", "", *(f"- {plain(name)}: {plain(value)}" for name, value in rows), ""]
    parameters = facts.parameter_rows(report)
    if parameters:
        lines += _table([("part", "base parameters", "trainable"), *parameters])
    lines += [f"{level}# Training", "", *_table(_training_table(report)), *_non_finite(report)]
    lines += [f"{level}# Evaluation", "", *_table(facts.evaluation_table(report))]
    lines += [f"{level}# Guards and warnings", "", *_warnings(report), ""]
    checkpoints = facts.checkpoint_table(report)
    lines += [f"{level}# Checkpoints", "", *([facts.best_line(report), ""] if checkpoints else [])]
    lines += _table(checkpoints)
    lines += [f"{level}# Throughput and time", ""]
    lines += [*(f"- {plain(name)}: {plain(value)}" for name, value in facts.time_rows(report)), ""]
    lines += [f"{level}# The same again", "", *_command(report)]
    lines += [f"{level}# What this report lacks", "", *(f"- {plain(line)}" for line in report.missing or ["nothing"])]
    return [*lines, ""]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    if len(rows) < 2:
        return ["Nothing recorded." if not rows else "No difference.", ""]
    lines = ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]


def _training_table(report: RunReport) -> list[list[str]]:
    steps = report.steps
    if not steps:
        return []
    heads = list(section(steps[-1], "losses"))
    names = ["step", "loss", *(f"losses/{head}" for head in heads), "learning_rate", "grad_norm"]
    count = min(CURVE_ROWS, len(steps))
    chosen = sorted({round(i * (len(steps) - 1) / max(1, count - 1)) for i in range(count)})
    flat = [{"step": steps[i]["step"], **flatten(steps[i])} for i in chosen]
    return [
        [name.replace("losses/", "loss, ").replace("_", " ") for name in names],
        *([facts.figure(values.get(name)) for name in names] for values in flat),
    ]


def _non_finite(report: RunReport) -> list[str]:
    broken = report.non_finite
    return [f"{len(broken)} step(s) with a loss or norm not finite, the first at {broken[0]}.", ""] if broken else []


def _warnings(report: RunReport) -> list[str]:
    if report.warnings:
        return [
            f"- step {plain(w.get('step', '?'))}, {plain(w.get('kind', ''))}: {plain(w.get('message', ''))}"
            for w in report.warnings
        ]
    kept = (report.directory / "warnings.jsonl").exists()
    return ["None." if kept else "This run kept no warnings.jsonl, so nothing is known of warnings."]


def _command(report: RunReport) -> list[str]:
    command, recorded = report.command
    note = [] if recorded else ["The run recorded no command; its resolved configuration does the same:", ""]
    return [*note, *("    " + line for line in command.splitlines()), ""]

"""The report as Markdown, without pictures and sound, for a pull request or a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from speechtune.report import facts
from speechtune.report.read_run import RunReport
from speechtune.report.sections import (
    Block,
    Definitions,
    Listing,
    Note,
    Section,
    Table,
    comparison,
    not_comparable,
    sections,
)


def markdown(reports: Sequence[RunReport]) -> str:
    """The text for one run or several."""
    if len(reports) == 1:
        return "\n".join(_one_run(reports[0], "#"))
    lines = [f"# {len(reports)} runs compared", ""]
    warning = not_comparable(reports)
    lines += [plain(warning), ""] if warning else []
    for section in comparison(reports):
        lines += _section(section, "##")
    for report in reports:
        lines += _one_run(report, "##")
    return "\n".join(lines)


def plain(value: object) -> str:
    """Text from data on one line, without meaning for Markdown or HTML."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escape(" ".join(str(value).split()), quote=False))


def _one_run(report: RunReport, level: str) -> list[str]:
    parts = [
        Section("what", "What was trained on what", [Definitions(facts.identity_rows(report))]),
        Section("data", "Data", [Definitions(facts.data_rows(report)), Table(facts.parameter_rows(report))]),
        Section("curves", "Training", [Table(facts.training_table(report))]),
        Section("evaluation", "Evaluation", [Table(facts.evaluation_table(report))]),
        *sections(report),
    ]
    lines = [f"{level} {plain(report.name)}", "", plain(facts.state_line(report)) + ".", ""]
    return [*lines, *(line for part in parts for line in _section(part, level + "#"))]


def _section(section: Section, level: str) -> list[str]:
    blocks = [line for block in section.blocks for line in _block(block)]
    return [f"{level} {section.title}", "", *(blocks or ["Nothing recorded.", ""])]


def _block(block: Block) -> list[str]:
    match block:
        case Note(text):
            return [plain(text), ""]
        case Definitions(rows):
            return [*(f"- {plain(name)}: {plain(value)}" for name, value in rows), ""]
        case Listing(texts, is_code):
            return [*(f"    {text}" if is_code else f"- {plain(text)}" for text in texts), ""]
        case Table(rows) if rows:
            lines = ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows]
            return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:], ""]
        case _:
            return []

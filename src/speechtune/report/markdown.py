"""The report as Markdown, without pictures and sound, for a pull request or a terminal."""

import re
from collections.abc import Iterator, Sequence
from html import escape

from speechtune.report.facts import state_line
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
    warning = not_comparable(reports)
    lines = [f"# {len(reports)} runs compared", "", *([plain(warning), ""] if warning else [])]
    lines += [line for part in comparison(reports) for line in _section(part, "##")]
    lines += [line for report in reports for line in _one_run(report, "##")]
    return "\n".join(lines)


def plain(value: object) -> str:
    """Text from data on one line, without meaning for Markdown or HTML."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escape(" ".join(str(value).split()), quote=False))


def _one_run(report: RunReport, level: str) -> Iterator[str]:
    yield from (f"{level} {plain(report.name)}", "", plain(state_line(report)) + ".", "")
    for part in sections(report):
        yield from _section(part, level + "#")


def _section(section: Section, level: str) -> list[str]:
    lines = [line for block in section.blocks for line in _block(block)]
    return [f"{level} {section.title}", "", *(lines or ["Nothing recorded.", ""])]


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

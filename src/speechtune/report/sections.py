"""The text of a report, arranged once: sections of notes, rows and tables, which page and Markdown render."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from speechtune.report import facts
from speechtune.report.facts import change, figure, identity_rows, measure_label, megabytes, progress, time_rows
from speechtune.report.read_run import GUARD, RunReport, section
from speechtune.training.tracking import flatten

MAX_WARNINGS = 200
SHORT_HASH = 16  # characters of a hash where runs stand side by side
SAME_MEANING = ("family", "hash of the base's weights", "hash of the data")  # else losses cannot be compared


class Block(NamedTuple):
    """A part of a section: a paragraph, names with values, rows of a table after a row of names, or lines.

    `kind` and `row_kinds` are classes on the page, of a note and of a table's rows.
    """

    form: Literal["note", "facts", "table", "list", "code"]
    content: str | Sequence[str] | Sequence[Sequence[str]]
    kind: str = ""
    row_kinds: Sequence[str] = ()


class Section(NamedTuple):
    """A part of a report under a title; `anchor` is its name in links."""

    anchor: str
    title: str
    blocks: Sequence[Block]


SAMPLES = Section("samples", "Samples", [])
PAGE_SECTIONS = (  # what a page draws after the text of a comparison
    Section("curves", "Training", []),
    Section("evaluation", "Evaluation", []),
    SAMPLES,
    Section("time", "Throughput", []),
    Section("runs", "Each run", []),
)


def sections(report: RunReport) -> list[Section]:
    """The text on one run."""
    command, recorded = report.command
    lines = Block("code", command.splitlines())
    no_command = Block("note", "The run recorded no command; this one trains by its resolved configuration:")
    data = [Block("facts", facts.data_rows(report)), *_table(facts.parameter_rows(report))]
    nothing = Block("note", "Nothing: every file of a run was there and readable.")
    return [
        Section("curves", "Training", _table(facts.training_table(report))),
        Section("evaluation", "Evaluation", _table(facts.evaluation_table(report))),
        Section("what", "What was trained on what", [Block("facts", identity_rows(report))]),
        Section("data", "Data and parameters", data),
        Section("guards", "Guards and warnings", _guards(report)),
        Section("checkpoints", "Checkpoints", _checkpoints(report)),
        Section("time", "Throughput and time", [Block("facts", time_rows(report))]),
        Section("again", "Run it again", [lines] if recorded else [no_command, lines]),
        Section("missing", "What is missing", [Block("list", report.missing) if report.missing else nothing]),
    ]


def _table(rows: Sequence[Sequence[str]]) -> list[Block]:
    return [Block("table", rows)] if rows else []


def _guards(report: RunReport) -> list[Block]:
    blocks: list[Block] = []
    if broken := report.non_finite:
        shown = ", ".join(map(str, broken[:10])) + (" ..." if len(broken) > 10 else "")
        blocks.append(Block("note", f"{len(broken)} step(s) with a loss or norm not finite: {shown}", "warnings"))
    if report.warnings:
        warnings = report.warnings[:MAX_WARNINGS]
        rows = [(figure(w.get("step")), str(w.get("kind", "")), str(w.get("message", ""))) for w in warnings]
        kinds = ["damaged" if kind == GUARD else "" for _, kind, _ in rows]
        blocks.append(Block("table", [("step", "kind", "message"), *rows], row_kinds=kinds))
        if len(report.warnings) > MAX_WARNINGS:
            blocks.append(Block("note", f"{len(report.warnings) - MAX_WARNINGS} more in warnings.jsonl."))
    elif (report.directory / "warnings.jsonl").exists():
        blocks.append(Block("note", "No guard fired and no evaluation warned."))
    else:
        blocks.append(Block("note", "This run kept no warnings.jsonl, so nothing is known of warnings."))
    return blocks


def _checkpoints(report: RunReport) -> list[Block]:
    if not report.checkpoints:
        return [Block("note", "No checkpoint in this folder.")]
    rows = [["checkpoint", "size", "evaluation loss", "checked", ""]]
    for c in report.checkpoints:
        checked = f"DAMAGED: {c.damage}" if c.damage else c.checked
        rows.append([c.name, megabytes(c.num_bytes), figure(c.eval_loss), checked, "best" if c.best else ""])
    kinds = ["damaged" if c.damage else "best" if c.best else "" for c in report.checkpoints]
    return [Block("note", _best_line(report)), Block("table", rows, row_kinds=kinds)]


def _best_line(report: RunReport) -> str:
    """Which checkpoint is the best one, and whether it is still there."""
    best, value = report.best_step, report.trainer_state.get("best_value")
    if best is None:
        return "Without an evaluation after step 0 no checkpoint can be called the best; the last one is the newest."
    metric = str(section(report.config, "evaluate").get("best_metric", "loss"))
    name = measure_label("eval_loss" if metric == "loss" else metric)
    by = "the lowest evaluation loss recorded" if value is None else f"{name} {figure(value)}"
    there = any(c.name == f"checkpoint-{best}" for c in report.checkpoints)
    return f"Best: checkpoint-{best}, {by}" + ("." if there else "; it is not in the folder.")


def comparison(reports: Sequence[RunReport]) -> list[Section]:
    """What differs between runs, and their final figures, side by side."""
    names = ["", *(report.name for report in reports)]
    differing = [row for row in _side_by_side(map(_options, reports)) if len(set(row[1:])) > 1]
    figures = _side_by_side(map(_final_figures, reports)) + _side_by_side(dict(time_rows(r)) for r in reports)
    same = Block("note", "The runs have the same configuration.")
    return [
        Section("differences", "What differs", _table([names, *differing]) if differing else [same]),
        Section("figures", "Final figures", _table([names, *figures])),
    ]


def not_comparable(reports: Sequence[RunReport]) -> str | None:
    """A warning where the losses of these runs do not measure the same."""
    identities = [dict(identity_rows(report)) for report in reports]
    differing = [name for name in SAME_MEANING if len({identity[name] for identity in identities} - {"-"}) > 1]
    return f"The runs differ in {', '.join(differing)}: compare their losses with care." if differing else None


def _side_by_side(columns: Iterable[Mapping[str, str]]) -> list[list[str]]:
    """One row per name: the name, then a value per run."""
    columns = list(columns)
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, "-") for column in columns)] for name in names]


def _options(report: RunReport) -> dict[str, str]:
    """Options by dotted names, and in brackets the facts of a run in which it may differ from others."""
    wanted = {*SAME_MEANING[1:], "precision", "hardware", "versions", "samples per optimizer step"}
    rows = [(name, value) for name, value in identity_rows(report) if name in wanted]
    compared = {f"({name})": value[:SHORT_HASH] if name.startswith("hash") else value for name, value in rows}
    return _flat_config(report.config) | compared


def _flat_config(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The resolved configuration as dotted names and text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat_config(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "-" if value is None else str(value)
    return flat


def _final_figures(report: RunReport) -> dict[str, str]:
    """Last losses and measures of a run; a measure after the base's and an arrow where that is known."""
    column = {"state": report.state, "steps": f"{report.last_step:,}"}
    for name, value in flatten(report.steps[-1]).items() if report.steps else ():
        if name == "loss" or name.startswith("losses/"):
            column[f"{measure_label(name)}, last step"] = figure(value)
    zero_shot_only = [record["step"] for record in report.evaluations] == [0]
    for name, base, value in progress(report):
        suffix = " (zero-shot)" if zero_shot_only else "" if base is None else " (zero-shot → last)"
        column[measure_label(name) + suffix] = change(base, value)
    return column | {"best step": figure(report.best_step)}

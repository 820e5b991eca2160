"""The text of a report, arranged once: sections of notes, rows and tables, which page and Markdown render."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from speechtune.report import facts
from speechtune.report.facts import Rows, change, figure, identity_rows, measure_label, megabytes, progress, time_rows
from speechtune.report.read_run import GUARD, RunReport, section
from speechtune.training.tracking import flatten

MAX_WARNINGS = 200
SHORT_HASH = 16  # characters of a hash where runs stand side by side
SAME_MEANING = ("family", "hash of the base's weights", "hash of the data")  # else losses cannot be compared


class Note(NamedTuple):
    """A paragraph; `kind` is its class on the page."""

    text: str
    kind: str = ""


class Definitions(NamedTuple):
    """Names with their values."""

    rows: Rows


class Table(NamedTuple):
    """Rows of cells after a row of names; `kinds` are the rows' classes on the page."""

    rows: Sequence[Sequence[str]]
    kinds: Sequence[str] = ()


class Listing(NamedTuple):
    """Lines one below the other; a command where `is_code`."""

    lines: Sequence[str]
    is_code: bool = False


Block = Note | Definitions | Table | Listing


class Section(NamedTuple):
    """A part of a report under a title; `anchor` is its name in links."""

    anchor: str
    title: str
    blocks: Sequence[Block]


def sections(report: RunReport) -> list[Section]:
    """The text on one run."""
    command, recorded = report.command
    note = [] if recorded else [Note("The run recorded no command; this one trains by its resolved configuration:")]
    nothing = Note("Nothing: every file of a run was there and readable.")
    data = [Definitions(facts.data_rows(report)), Table(facts.parameter_rows(report))]
    return [
        Section("curves", "Training", [Table(facts.training_table(report))]),
        Section("evaluation", "Evaluation", [Table(facts.evaluation_table(report))]),
        Section("what", "What was trained on what", [Definitions(identity_rows(report))]),
        Section("data", "Data and parameters", data),
        Section("guards", "Guards and warnings", _guards(report)),
        Section("checkpoints", "Checkpoints", _checkpoints(report)),
        Section("time", "Throughput and time", [Definitions(time_rows(report))]),
        Section("again", "Run it again", [*note, Listing(command.splitlines(), is_code=True)]),
        Section("missing", "What is missing", [Listing(report.missing) if report.missing else nothing]),
    ]


def _guards(report: RunReport) -> list[Block]:
    blocks: list[Block] = []
    broken = report.non_finite
    if broken:
        shown = ", ".join(map(str, broken[:10])) + (" ..." if len(broken) > 10 else "")
        blocks.append(Note(f"{len(broken)} step(s) with a loss or norm not finite: {shown}", "warnings"))
    if report.warnings:
        shown_warnings = report.warnings[:MAX_WARNINGS]
        rows = [(figure(w.get("step")), str(w.get("kind", "")), str(w.get("message", ""))) for w in shown_warnings]
        kinds = ["damaged" if kind == GUARD else "" for _, kind, _ in rows]
        blocks.append(Table([("step", "kind", "message"), *rows], kinds))
        if len(report.warnings) > MAX_WARNINGS:
            blocks.append(Note(f"{len(report.warnings) - MAX_WARNINGS} more in warnings.jsonl."))
    elif (report.directory / "warnings.jsonl").exists():
        blocks.append(Note("No guard fired and no evaluation warned."))
    else:
        blocks.append(Note("This run kept no warnings.jsonl, so nothing is known of warnings."))
    return blocks


def _checkpoints(report: RunReport) -> list[Block]:
    if not report.checkpoints:
        return [Note("No checkpoint in this folder.")]
    rows = [["checkpoint", "size", "evaluation loss", "checked", ""]]
    for c in report.checkpoints:
        checked = f"DAMAGED: {c.damage}" if c.damage else c.checked
        rows.append([c.name, megabytes(c.num_bytes), figure(c.eval_loss), checked, "best" if c.best else ""])
    kinds = ["damaged" if c.damage else "best" if c.best else "" for c in report.checkpoints]
    return [Note(_best_line(report)), Table(rows, kinds)]


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
    differing = _differences(reports)
    differs = Table([names, *differing]) if differing else Note("The runs have the same configuration.")
    return [
        Section("differences", "What differs", [differs]),
        Section("figures", "Final figures", [Table([names, *_final_figures(reports)])]),
    ]


def not_comparable(reports: Sequence[RunReport]) -> str | None:
    """A warning where the losses of these runs do not measure the same."""
    differing = [
        name for name in SAME_MEANING if len({dict(identity_rows(report))[name] for report in reports} - {"-"}) > 1
    ]
    return f"The runs differ in {', '.join(differing)}: compare their losses with care." if differing else None


def _differences(reports: Sequence[RunReport]) -> list[list[str]]:
    """Options and facts in which runs differ, one row each: name, then a value per run."""
    columns = [{**_flat_config(r.config), **{f"({name})": value for name, value in _compared(r)}} for r in reports]
    return [row for row in _side_by_side(columns) if len(set(row[1:])) > 1]


def _compared(report: RunReport) -> Rows:
    wanted = {*SAME_MEANING[1:], "precision", "hardware", "versions", "samples per optimizer step"}
    rows = [(name, value) for name, value in identity_rows(report) if name in wanted]
    return [(name, value[:SHORT_HASH] if name.startswith("hash") else value) for name, value in rows]


def _flat_config(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The resolved configuration as dotted names and text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat_config(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = "-" if value is None else str(value)
    return flat


def _final_figures(reports: Sequence[RunReport]) -> list[list[str]]:
    """Final figures side by side: name, then a value per run."""
    results: list[dict[str, str]] = []
    for report in reports:
        column = {"state": report.state, "steps": f"{report.last_step:,}"}
        if report.steps:
            last = flatten(report.steps[-1])
            wanted = [name for name in last if name == "loss" or name.startswith("losses/")]
            column |= {f"{measure_label(name)}, last step": figure(last[name]) for name in wanted}
        results.append({**column, **_evaluated(report), "best step": figure(report.best_step)})
    return _side_by_side(results) + _side_by_side([dict(time_rows(report)) for report in reports])


def _side_by_side(columns: Sequence[Mapping[str, str]]) -> list[list[str]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, "-") for column in columns)] for name in names]


def _evaluated(report: RunReport) -> dict[str, str]:
    """Each measure's last value, after the base's and an arrow where that is known."""
    zero_shot_only = [record["step"] for record in report.evaluations] == [0]
    column = {}
    for name, base, value in progress(report):
        suffix = " (zero-shot)" if zero_shot_only else "" if base is None else " (zero-shot → last)"
        column[measure_label(name) + suffix] = change(base, value)
    return column

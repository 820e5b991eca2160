"""What a page shows of a run while it goes on, read from its folder."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import pandas as pd

from speechtune.errors import ConfigError
from speechtune.report.facts import figure, headline, measure_label, state_line
from speechtune.report.facts import progress as measures
from speechtune.report.plots import downsample
from speechtune.report.read_run import UNFINISHED, RunReport, curve, names_in
from speechtune.studio.processes import end_of_log, find_process
from speechtune.studio.workspace import Workspace

COLUMNS = ("step", "value", "curve")


class Progress(NamedTuple):
    """State and key figures as Markdown; curves as rows of step, value and curve; guards; samples; scores; log."""

    state: str
    losses: pd.DataFrame | None
    evaluation: pd.DataFrame | None
    warnings: list[tuple[int, str, str]]
    samples: list[tuple[str, str]]
    scores: list[tuple[str, str, str]]
    log: str


def read_progress(name: str | None, workspace: Workspace) -> Progress:
    """How far a run is. A run whose process has only just begun has no files yet.

    Raises ConfigError: there is no such run.
    """
    run = workspace.run(name)
    process = find_process(run)
    log = end_of_log(run)
    at_work = f"process {process.pid} is at work" if process else "no process is at work"
    try:
        report = workspace.report(name, verify=False)
    except ConfigError:
        state = f"**{name}**: {at_work}; nothing is written yet" + ("" if process else ": see what it printed")
        return Progress(state, None, None, [], [], [], log)
    figures = [f"{label}: **{value}**" for label, value in headline(report)]
    resume = " Resume goes on from its last checkpoint." if not process and report.state == UNFINISHED else ""
    return Progress(
        f"**{name}**: {state_line(report)}; {at_work}.{resume}\n\n" + " · ".join(figures),
        _table(_curves(report.steps, ["loss", *(f"losses/{head}" for head in names_in(report.steps, "losses"))])),
        _table(_curves(report.evaluations, _evaluation_names(report))),
        [(int(w.get("step") or 0), str(w.get("kind", "")), str(w.get("message", ""))) for w in report.warnings],
        _samples(report),
        [(measure_label(label), figure(base), figure(value)) for label, base, value in measures(report)],
        log,
    )


def _evaluation_names(report: RunReport) -> list[str]:
    heads = names_in(report.evaluations, "eval_losses")
    return ["eval_loss", *(f"eval_losses/{head}" for head in heads)]


def _curves(records: list[dict[str, Any]], names: Sequence[str]) -> Iterable[tuple[float, float, str]]:
    for name in names:
        points = curve(records, name)
        for step, *values in downsample(points) if points else ():
            if step is not None and values and values[0] is not None:
                yield step, values[0], measure_label(name)


def _table(rows: Iterable[tuple[float, float, str]]) -> pd.DataFrame | None:
    found = list(rows)
    return pd.DataFrame(found, columns=list(COLUMNS)) if found else None


def _samples(report: RunReport) -> list[tuple[str, str]]:
    """Generated samples and the recordings they are to be like, with what each one is."""
    found = []
    for prompt in report.prompts:
        for clip in prompt.clips:
            if clip.path is not None:
                what = "recording" if clip.step is None else "base" if clip.step == 0 else f"step {clip.step}"
                found.append((f"{prompt.text} ({what})", str(clip.path)))
    return found


def checkpoints(report: RunReport) -> list[tuple[str, str, str, str]]:
    """Checkpoints of a run: name, evaluation loss, whether it is the best, whether it is intact."""
    return [
        (c.name, "" if c.eval_loss is None else f"{c.eval_loss:.4f}", "best" if c.best else "", c.damage or c.checked)
        for c in report.checkpoints
    ]

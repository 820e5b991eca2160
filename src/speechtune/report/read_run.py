"""Reads a run directory into one `RunReport`; files that are missing or broken are listed, and cost only their part."""

import contextlib
import json
import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import yaml

from speechtune.audio import file_name
from speechtune.errors import ConfigError
from speechtune.storage.verified_folder import STATE_NAME, find_checkpoints, verify_folder

MAX_HASHED_BYTES = 4 * 2**30
"""Largest checkpoint that is hashed for a report, 4 GiB; of a larger one only the files' sizes are compared."""

MAX_STEP = 2**53  # beyond it a float, which a plot needs, cannot tell steps apart
GUARD = "guard"  # `kind` in warnings.jsonl of what stopped the run
RATES = ("audio_seconds_per_second", "tokens_per_second", "data_wait_share")
FINISHED, UNFINISHED, STOPPED = "finished", "unfinished", "stopped by a guard"

# file, what is not known without it
EXPECTED = {
    "config.yaml": "the configuration",
    "metrics.jsonl": "curves",
    "run_info.json": "versions, hardware, data statistics, parameters, command",
    "warnings.jsonl": "guards that fired and warnings of evaluations",
    "samples/prompts.jsonl": "generated samples",
}

Curve = list[tuple[int, float | None]]
"""(step, value); None stands for NaN and infinity."""


class CheckpointFacts(NamedTuple):
    """One checkpoint folder; `damage` is empty where its files are as they were written, as far as `checked` says."""

    name: str
    num_bytes: int
    checked: str
    damage: str
    eval_loss: float | None
    best: bool


class Clip(NamedTuple):
    """A recording (`step` None) or an answer to a prompt (`step` 0: the base's); `path` is None without audio."""

    step: int | None
    path: Path | None
    scores: Mapping[str, Any]


class Prompt(NamedTuple):
    """One prompt with all that was recorded or generated for it: the reference first, then by step."""

    id: str
    text: str
    speaker: str
    language: str
    clips: tuple[Clip, ...]


@dataclass(frozen=True)
class RunReport:
    """The content of a run directory. Mappings are empty where the file is missing; `missing` says what that costs."""

    name: str
    directory: Path
    config: Mapping[str, Any]
    info: Mapping[str, Any]
    summary: Mapping[str, Any]
    trainer_state: Mapping[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    warnings: list[dict[str, Any]]
    checkpoints: list[CheckpointFacts]
    prompts: list[Prompt]
    missing: list[str]

    @property
    def last_step(self) -> int:
        """The last step that was recorded."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def total_steps(self) -> int | None:
        """Steps the run is to take, if anything says so."""
        total = self.trainer_state.get("total_steps") or section(self.config, "train").get("max_steps")
        return total if isinstance(total, int) else None

    @property
    def state(self) -> str:
        """`FINISHED`, `STOPPED` or `UNFINISHED`; a summary is written last, and only by a run that got to its end."""
        total = self.total_steps
        if self.summary and (total is None or not self.steps or self.last_step >= total):
            return FINISHED
        return STOPPED if self.stop_reasons else UNFINISHED

    @property
    def stop_reasons(self) -> list[str]:
        """Messages of guards after which no further step was recorded; earlier ones were resumed from."""
        guards = [entry for entry in self.warnings if entry.get("kind") == GUARD]
        return [str(e.get("message", "")) for e in guards if (number(e.get("step")) or math.inf) >= self.last_step]

    @property
    def best_step(self) -> int | None:
        """Step of the best evaluation, as the run kept it, or else the lowest recorded evaluation loss after step 0."""
        best = self.trainer_state.get("best_step")
        if isinstance(best, int):
            return best
        losses = [(loss, step) for step, loss in curve(self.evaluations, "eval_loss") if step > 0 and loss is not None]
        return min(losses)[1] if losses else None

    @property
    def non_finite(self) -> list[int]:
        """Steps whose loss, or gradient norm, is NaN or infinite."""
        return [
            record["step"]
            for record in self.steps
            if any(name in record and number(record[name]) is None for name in ("loss", "grad_norm"))
        ]

    @property
    def command(self) -> tuple[str, bool]:
        """The command that makes this run again, and whether the run recorded it."""
        recorded = self.summary.get("reproduce") or self.info.get("command")
        if isinstance(recorded, list):
            return shlex.join(str(part) for part in recorded), True
        if recorded:
            return str(recorded), True
        return f"speechtune train {shlex.quote(str(self.directory / 'config.yaml'))} output_dir=NEW_FOLDER", False

    def throughput(self) -> dict[str, float]:
        """Medians over the steps (the first is left out: it warms up), and the mean share of waiting for data."""
        rates: dict[str, float] = {}
        for name in RATES:
            values = [value for _, value in curve(self.steps, name)[1:] if value is not None]
            if values:
                rates[name] = fmean(values) if name == "data_wait_share" else median(values)
        return rates


def short_names(directories: Sequence[Path]) -> list[str]:
    """What runs are called: the folder's name, with its parent's if it is called as all are, or the full path."""
    paths = [directory.resolve() for directory in directories]
    names = [f"{p.parent.name}/{p.name}" if p.name in {"run", "output"} else p.name for p in paths]
    return names if len(set(names)) == len(names) else [str(directory) for directory in directories]


def read_run(directory: Path, name: str | None = None, *, verify: bool = True) -> RunReport:
    """Read a run directory, finished or not; `name` is what the report calls it.

    Without `verify` nothing is read of the checkpoints, and `checkpoints` stays empty.

    Raises ConfigError: it is no run directory.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such folder; name a run's output_dir")
    if not any((directory / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise ConfigError(f"{directory}: holds neither config.yaml nor metrics.jsonl; name a run's output_dir")
    missing = [
        f"{file}: not there, so nothing on {what}" for file, what in EXPECTED.items() if not (directory / file).exists()
    ]

    def read(path: Path) -> list[dict[str, Any]]:
        return _read_objects(path, directory, missing)

    def read_one(file: str) -> dict[str, Any]:
        return next(iter(read(directory / file)), {})

    records = read(directory / "metrics.jsonl")
    records = [r for r in records if isinstance(r.get("step"), int) and 0 <= r["step"] <= MAX_STEP]
    evaluations = [record for record in records if "eval_loss" in record or "scores" in record]
    checkpoints = find_checkpoints(directory)
    state = read_one(STATE_NAME)
    if not state and checkpoints:
        state = read_one(f"{checkpoints[-1][1].name}/{STATE_NAME}")
    report = RunReport(
        name=name or short_names([directory])[0],
        directory=directory,
        config=read_one("config.yaml"),
        info=read_one("run_info.json"),
        summary=read_one("summary.json"),
        trainer_state=state,
        steps=[record for record in records if "eval_loss" not in record and "scores" not in record],
        evaluations=evaluations,
        warnings=read(directory / "warnings.jsonl"),
        checkpoints=[],
        prompts=_read_prompts(directory / "samples", read),
        missing=missing,
    )
    if not report.summary:
        reason = "the run has not come to its end" if report.state == UNFINISHED else "the run was stopped"
        missing.append(f"summary.json: not there ({reason}), so nothing on the proof that the adapter moved")
    elif not isinstance(report.summary.get("time"), Mapping):
        missing.append("summary.json has no `time`: nothing on where the time went beyond waiting for data")
    if not evaluations:
        missing.append("no evaluation recorded: nothing on unseen data, and no line of the zero-shot base")
    elif evaluations[0]["step"] != 0:
        missing.append("no evaluation of the zero-shot base (step 0) to compare with")
    if verify:
        report.checkpoints.extend(_checkpoint_facts(report, step, path) for step, path in checkpoints)
    return report


def number(value: object) -> float | None:
    """A finite number, or None for everything else; JSON knows NaN, pages and strict readers do not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of more digits than a float holds
        return None


def _read_objects(path: Path, root: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Objects of a JSONL file, or the one of a JSON or YAML file; `missing` gets what cannot be read."""
    name, in_lines = path.relative_to(root), path.suffix == ".jsonl"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        missing.append(f"{name}: cannot be read: {error.strerror}")
        return []
    parts = [line for line in text.split("\n") if line.strip()] if in_lines else [text]
    objects = []
    for part in parts:
        with contextlib.suppress(ValueError, RecursionError, yaml.YAMLError):
            value = yaml.safe_load(part) if path.suffix == ".yaml" else json.loads(part)
            objects += [value] if isinstance(value, dict) else []
    if num_left_out := len(parts) - len(objects):
        what = f"{num_left_out} line(s) left out that are no JSON object" if in_lines else "holds no mapping"
        missing.append(f"{name}: {what}")
    return objects


def section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A nested mapping, empty where there is none."""
    inner = values.get(name)
    return inner if isinstance(inner, Mapping) else {}


def curve(records: Iterable[dict[str, Any]], name: str) -> Curve:
    """One measurement by step, `losses/audio` for a nested one; what was not measured (null) is left out."""
    group, _, key = name.rpartition("/")
    holders = ((record["step"], section(record, group) if group else record) for record in records)
    return [(step, number(values[key])) for step, values in holders if values.get(key) is not None]


def names_in(records: Iterable[dict[str, Any]], group: str) -> list[str]:
    """Keys of a nested mapping over all records, in order of appearance."""
    return list(dict.fromkeys(str(key) for record in records for key in section(record, group)))


def _read_prompts(samples: Path, read: Callable[[Path], list[dict[str, Any]]]) -> list[Prompt]:
    folders = {path.name.removeprefix("step-"): path for path in samples.glob("step-*") if path.is_dir()}
    steps = sorted((int(step), path) for step, path in folders.items() if step.isdecimal())
    scores = {step: {str(row.get("id")): row for row in read(path / "scores.jsonl")} for step, path in steps}
    prompts = []
    for row in read(samples / "prompts.jsonl"):
        prompt_id = str(row.get("id"))
        sound = f"{file_name(prompt_id)}.wav"
        reference = _inside(samples, samples / "reference" / sound)
        clips = [Clip(None, reference, {})] if reference else []
        for step, folder in steps:
            path, values = _inside(samples, folder / sound), scores[step].get(prompt_id, {})
            if path or values:
                clips.append(Clip(step, path, values))
        texts = (str(row.get(key) or "") for key in ("text", "speaker", "language"))
        prompts.append(Prompt(prompt_id, *texts, clips=tuple(clips)))
    return prompts


def _inside(root: Path, path: Path) -> Path | None:
    """The file, if it exists under `root`: a link must not bring other files into a report."""
    try:
        return path if path.is_file() and path.resolve().is_relative_to(root.resolve()) else None
    except (OSError, ValueError):  # a name that is too long
        return None


def _checkpoint_facts(report: RunReport, step: int, path: Path) -> CheckpointFacts:
    num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    sizes_only = num_bytes > MAX_HASHED_BYTES
    limit = f"sizes only (over {MAX_HASHED_BYTES / 2**30:.0f} GiB, not hashed here)"
    try:
        damage = [f"{issue.source}: {issue.message}" for issue in verify_folder(path, sizes_only=sizes_only)]
    except OSError as error:  # a folder without permission must not cost the rest of the report
        damage = [str(error)]
    checked = f"intact: {limit if sizes_only else 'all bytes compared with their hashes'}"
    eval_loss = dict(curve(report.evaluations, "eval_loss")).get(step)
    return CheckpointFacts(path.name, num_bytes, checked, "; ".join(damage), eval_loss, step == report.best_step)

"""Pronunciation data by the row: the hub's copy of Speechocean762, and rows that name task and answer.

Samples are as `speechtune.tasks.pronunciation.targets` describes them; every issue is collected, none is raised.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from speechtune.config import DataConfig
from speechtune.data.arrow import arrow_rows, columns, left_out, parquet_files, parquet_splits
from speechtune.data.layouts import find_layout, iterate_rows
from speechtune.data.row_parser import Context, ReadResult, read_rows
from speechtune.data.rows import Place, Row, Split
from speechtune.data.speechocean_labels import LabelReader, check_score, read_person, utterance
from speechtune.errors import ManifestError
from speechtune.tasks.pronunciation.phones import PHONES, UNKNOWN
from speechtune.tasks.pronunciation.targets import FIELDS, TASKS, Task
from speechtune.types import Pronunciation, Sample

_LABELS = {"audio", "text", "words", "accuracy"}


def is_hub_copy(path: Path) -> bool:
    """Whether `path` is a parquet file, or a folder of them without metadata.json, with labels of pronunciation.

    Raises ManifestError: a parquet file cannot be read; ModuleNotFoundError: pyarrow is not installed.
    """
    if not parquet_files(path) or os.path.isfile(path / "metadata.json"):
        return False
    return columns(Place(path, (*parquet_splits(path), "train")[0])) >= _LABELS


def is_task_file(path: Path) -> bool:
    """Whether the first object of a file has `task` or `target`, and is no row of voice cloning.

    Raises ManifestError: it has, but its folder is named, from which the split cannot be told.
    """
    try:
        _, place = find_layout(Place(path))
        if not place.path.is_file() or place.path.suffix in (".parquet", ".arrow"):
            return False
        values = (row.value for row in iterate_rows(place))
        keys: set[str] = next((set(value) for value in values if isinstance(value, dict)), set())
    except ManifestError:  # raised again, with its advice, by the reader of manifests
        return False
    has_tasks = bool(keys & {"task", "target"}) and not keys & {"messages", "audio_file"}
    if has_tasks and place.path != path:
        raise ManifestError(f"{path}: holds rows with tasks; name the file in it that is meant: {place.path}")
    return has_tasks


def read_hub_copy(path: Path, split: Split, config: DataConfig) -> ReadResult:
    """Read one split of `mispeech/speechocean762`: a folder with parquet files, or one such file.

    A file that does not name its split belongs to the one asked for. Needs pyarrow. Audio is not checked.
    """
    place = Place(path, split)
    result = read_labelled(path, arrow_rows(place), split, config)
    result.notes.extend(left_out(place))
    return result


def read_labelled(path: Path, rows: Iterable[Row], split: Split, config: DataConfig) -> ReadResult:
    """Read rows with the fields of `mispeech/speechocean762`; the id is the stem of the audio's path, if it has one."""

    def read(context: Context) -> Sample | None:
        return _hub_sample(context, split)

    return read_rows(path, rows, config, read, lambda row: _hub_id(row, split))


def read_tasks(path: Path, config: DataConfig) -> ReadResult:
    """Read rows {audio, text, task, target} with optional id, speaker, age and gender, without touching the audio."""
    return read_rows(path, iterate_rows(Place(path)), config, _task_row)


def _hub_id(row: Row, split: Split) -> str:
    audio = row.value.get("audio") if isinstance(row.value, dict) else None
    path = audio.get("path") if isinstance(audio, Mapping) else audio
    stem = PurePosixPath(path).stem if isinstance(path, str) else ""
    return stem if stem.strip() else f"{split}-{row.number}"


def _hub_sample(context: Context, split: Split) -> Sample | None:
    value = context.row.value
    text = context.text(context.optional_text(value, "text") or "", "the text", "missing_text")
    named = context.audio(value, ("audio",))
    speaker = context.text(context.optional_text(value, "speaker") or "", "the speaker", "missing_speaker")
    person = read_person(context, value)
    context.notes += [f"{split}: utterances without {name}" for name in ("age", "gender") if name not in person]
    words = _listed(context, value.get("words"), "words")
    labels = None
    if words is not None:
        entry = {**value, "words": [_word(context, word) for word in words]}
        labels = LabelReader(context, split, "the row").read(entry, text)
    if context.issues or labels is None:
        return None
    return utterance(context, text, named and named[0], speaker, replace(labels, **person))


def _listed(context: Context, value: Any, what: str) -> list[Any] | None:
    """A list of objects, also where `datasets` made one object of lists out of it; None, with an issue, if that fails.

    What is neither counts as empty, which the reader of labels reports.
    """
    if not isinstance(value, Mapping):
        return value if isinstance(value, list) else []
    lengths = {len(column) if isinstance(column, list) else -1 for column in value.values()}
    if len(lengths) != 1 or -1 in lengths:
        context.issue("bad_field", f"{what!r} is neither a list nor an object of lists of one length")
        return None
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


def _word(context: Context, word: object) -> object:
    if not isinstance(word, Mapping):
        return word
    errors = word.get("mispronunciations")
    if not isinstance(errors, Mapping):
        return word
    return {**word, "mispronunciations": _listed(context, errors, "mispronunciations") or []}


def _task_row(context: Context) -> Sample | None:
    value = context.row.value
    text = context.text(context.optional_text(value, "text") or "", "the text")
    named = context.audio(value, ("audio",))
    speaker = context.optional_text(value, "speaker")
    if speaker is not None:
        context.text(speaker, "the speaker")
    person = read_person(context, value)
    task: Task | None = next((task for task in TASKS if task == value.get("task")), None)
    if task is None:
        context.issue("unknown_task", f"'task' {value.get('task')!r:.40} is none of {', '.join(TASKS)}")
        return None
    target = _target(context, task, value.get("target"))
    if context.issues or named is None:
        return None
    sample = utterance(context, text, named[0], speaker, Pronunciation(task, target, **person))
    return sample if named[1] is None else replace(sample, declared_seconds=(named[1],))


def _target(context: Context, task: Task, target: object) -> dict[str, Any]:
    """The answer of a row, checked; after an issue what is returned does not matter."""
    if isinstance(target, str):
        try:
            target = json.loads(target)
        except (ValueError, RecursionError) as error:
            context.issue("bad_target", f"'target' is a text, but not valid JSON: {error}")
            return {}
    if not isinstance(target, dict):
        context.issue("bad_target", f"'target' is neither an object nor its JSON text but {target!r:.60}")
        return {}
    fields = FIELDS[task]
    if absent := [name for name in fields if name not in target]:
        context.issue("missing_key", f"'target' of {task} has no {', '.join(map(repr, absent))}")
    if more := [name for name in target if name not in fields]:
        context.issue("unknown_key", f"'target' of {task} has the key(s) {', '.join(map(repr, more)):.100} too many")
    given = {name: target[name] for name in fields if name in target}
    if task == "APA":
        scores = {name: check_score(context, f"{name!r} of the target", item) for name, item in given.items()}
        return {name: round(score) for name, score in scores.items() if score is not None}
    return {name: _transcript(context, name, item) for name, item in given.items()}


def _transcript(context: Context, name: str, value: object) -> str:
    what = f"{name!r} of the target"
    if not isinstance(value, str):
        context.issue("bad_target", f"{what} is not a text but {value!r:.60}")
        return ""
    context.text(value, what)
    if name != "phoneme_transcript":
        return value
    labels = value.split()
    for label in dict.fromkeys(labels):
        if label not in PHONES and label != UNKNOWN:
            reason = f"{label!r:.40} is neither one of the 39 ARPAbet phones without stress digit nor {UNKNOWN}"
            context.issue("unknown_phone", f"{what}: {reason}")
    return " ".join(labels)

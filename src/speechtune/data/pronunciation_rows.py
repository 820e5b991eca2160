"""Pronunciation data by the row: the hub's copy of Speechocean762, and plain JSONL that names task and answer.

Samples are as `speechtune.tasks.pronunciation.targets` describes them; every issue is collected, none is raised.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from speechtune.audio import MAX_INLINE_BYTES
from speechtune.config import DataConfig
from speechtune.data.row_parser import Context, ReadResult, read_rows
from speechtune.data.rows import Row, iterate_rows
from speechtune.data.speechocean_labels import SPLITS, LabelReader, Split, check_score, read_person, utterance
from speechtune.errors import ManifestError, printable
from speechtune.tasks.pronunciation.phones import PHONES, UNKNOWN
from speechtune.tasks.pronunciation.targets import FIELDS, TASKS, Task
from speechtune.types import AudioRef, Pronunciation, Sample

_HUB_PLACES = ("*.parquet", "data/*.parquet", "train/*.parquet", "test/*.parquet")
_HUB_FIELDS = ("audio", "text", "words", "accuracy")
_FIRST_WORD = re.compile("[A-Za-z]+")
_BATCH_ROWS = 64  # with inline clips of some 120 kB each


def hub_files(path: Path) -> dict[Split | None, list[Path]]:
    """The parquet files of a folder, or the one file, by split; None where neither file nor its folder names one."""
    paths = [path]
    if path.suffix != ".parquet":
        paths = sorted({file for place in _HUB_PLACES for file in path.glob(place)})
    result: dict[Split | None, list[Path]] = {}
    for file in filter(os.path.isfile, paths):
        begin = _FIRST_WORD.match(file.name)
        names = (begin[0] if begin else "", file.parent.name)
        named: list[Split] = [split for name in names for split in SPLITS if split == name]
        result.setdefault(named[0] if named else None, []).append(file)
    return result


def is_hub_copy(path: Path) -> bool:
    """Whether `path` is a parquet file, or a folder with parquet files of a split and no metadata.json."""
    if path.suffix == ".parquet" and os.path.isfile(path):
        return True
    return not os.path.isfile(path / "metadata.json") and any(hub_files(path).get(split) for split in SPLITS)


def is_assessment_jsonl(path: Path) -> bool:
    """Whether the first object of a file has `task` or `target`, and is no row of voice cloning."""
    if not os.path.isfile(path):
        return False
    try:
        values = (row.value for row in iterate_rows(path))
        keys: set[str] = next((set(value) for value in values if isinstance(value, dict)), set())
    except ManifestError:  # raised again, with its advice, by the reader of manifests
        return False
    return bool(keys & {"task", "target"}) and not keys & {"messages", "audio_file"}


def read_hub_copy(path: Path, split: Split, config: DataConfig) -> ReadResult:
    """Read one split of `mispeech/speechocean762`: a folder with parquet files, or one such file.

    A file that does not name its split belongs to the one asked for. Needs pyarrow. Audio is not checked.
    """
    files = hub_files(path)
    own = files.get(split) or (files.get(None) if path.suffix == ".parquet" else None)
    if not own:
        raise ManifestError(f"{path}: holds no parquet file of the split {split!r}, such as data/{split}-*.parquet")
    result = _read_hub(path, _parquet_rows(own), config, split)
    if own is not files.get(None) and (others := files.get(None)):
        names = ", ".join(printable(file.name) for file in others)
        result.notes.append(f"parquet files that name neither train nor test are left out: {names:.200}")
    return result


def read_hub_rows(
    rows: Iterable[Mapping[str, Any]],
    split: Split,
    config: DataConfig,
    folder: Path = Path(),
    source: str = "rows",
) -> ReadResult:
    """Read rows with the fields of `mispeech/speechocean762`, as `datasets` gives them without decoding the audio.

    The id is the stem of the audio's path, else "<split>-<row>". Paths without bytes are resolved against `folder`;
    messages cite "`source`:row".
    """
    values = (dict(row) if isinstance(row, Mapping) else row for row in rows)
    numbered = (Row(number, f"{source}:{number}", value) for number, value in enumerate(values, 1))
    return _read_hub(Path(source), numbered, config, split, folder)


def read_assessment_jsonl(path: Path, config: DataConfig) -> ReadResult:
    """Read rows {audio, text, task, target} with optional id, speaker, age and gender, without touching the audio."""
    return read_rows(path, iterate_rows(path), config, _task_row)


def _parquet_rows(files: Iterable[Path]) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    for file in files:
        line = 0
        try:
            with parquet.ParquetFile(file) as table:
                absent = [name for name in _HUB_FIELDS if name not in table.schema_arrow.names]
                if absent:
                    reason = f"has no column {', '.join(map(repr, absent))}: is it mispeech/speechocean762?"
                    raise ManifestError(f"{file}: {reason}")
                for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                    for value in batch.to_pylist():
                        number, line = number + 1, line + 1
                        yield Row(number, f"{file}:{line}", value)
        except (pyarrow.ArrowException, ValueError, OSError) as error:
            raise ManifestError(f"{file}: cannot be read as parquet: {error}") from None


def _read_hub(
    path: Path, rows: Iterable[Row], config: DataConfig, split: Split, folder: Path | None = None
) -> ReadResult:
    def read(context: Context) -> Sample | None:
        return _hub_sample(context, split)

    return read_rows(path, rows, config, read, lambda row: _hub_id(row, split), folder)


def _hub_id(row: Row, split: Split) -> str:
    audio = row.value.get("audio") if isinstance(row.value, dict) else None
    path = audio.get("path") if isinstance(audio, Mapping) else audio
    stem = PurePosixPath(path).stem if isinstance(path, str) else ""
    return stem if stem.strip() else f"{split}-{row.number}"


def _hub_sample(context: Context, split: Split) -> Sample | None:
    value = context.row.value
    text = context.text(context.optional_text(value, "text") or "", "the text", "missing_text")
    audio = _hub_audio(context, value.get("audio"))
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
    return utterance(context, text, audio, speaker, replace(labels, **person))


def _hub_audio(context: Context, audio: object) -> AudioRef | None:
    if not isinstance(audio, Mapping) or not {"bytes", "path"} & audio.keys():
        if audio is None or isinstance(audio, str):
            audio = {"path": audio}
        else:
            reason = f"'audio' holds neither 'bytes' nor 'path' but {type(audio).__name__}"
            context.issue("missing_audio", f"{reason}; cast the column with Audio(decode=False)")
            return None
    data = audio.get("bytes")
    if data is None:
        path = audio.get("path")
        if not isinstance(path, str) or not path:
            context.issue("missing_audio", "'audio' holds neither bytes nor a path")
            return None
        named = context.audio({"audio_url": path})
        return None if named is None else named[0]
    if not isinstance(data, bytes):
        context.issue("bad_field", f"'bytes' of the audio is not bytes but {type(data).__name__}")
    elif len(data) > MAX_INLINE_BYTES:
        context.issue("too_large", f"the audio exceeds the limit of {MAX_INLINE_BYTES} bytes; put it into a file")
    else:
        return AudioRef(data=data)
    return None


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
    named = context.audio(value, "audio")
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

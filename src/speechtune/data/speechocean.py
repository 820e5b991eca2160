"""Speechocean762 in its official layout -> `Sample`s with the labels of pronunciation, every issue collected.

The corpus (Zhang et al., Interspeech 2021, arXiv 2104.01378; OpenSLR 101) scores read English by hand: utterances 0-10,
words 0-10, phones 0-2, and for a phone scored below 0.5 what was said in its place.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from speechtune.config import DataConfig
from speechtune.data.audio_checks import check_audio, find_long_clips
from speechtune.data.quarantine import ReadResult
from speechtune.data.row_parser import Context
from speechtune.data.rows import Row
from speechtune.data.speechocean_labels import AGE, GENDERS, LabelReader, Split, read_raters
from speechtune.errors import Issue, ManifestError, printable
from speechtune.types import AudioRef, Sample

SCORES_FILE = Path("resource", "scores.json")
RATERS_FILE = Path("resource", "scores-detail.json")
"""Scores of the single raters, which the official release has and its copies often lack."""


_TABLES = {"text": "missing_text", "wav.scp": "missing_audio", "utt2spk": "missing_speaker"}
_KEY = re.compile(r'"([^"\\]*)"\s*:\s*\{')
_NOT_TEXT = re.compile("[\ud800-\udfff\0]")


_Tables = Mapping[str, Mapping[str, tuple[str, int]]]  # file -> key -> (value, line)
_Details = Mapping[str, Mapping[str, Any]]  # speaker -> what is known of the person


def is_speechocean(path: Path) -> bool:
    """Whether `path` is a folder laid out like Speechocean762."""
    return os.path.isfile(path / SCORES_FILE)


def read_speechocean(folder: Path, split: Split, config: DataConfig, headers: bool = True) -> ReadResult:
    """Read one split of a Speechocean762 folder; utterances with issues give no sample.

    Rows count from 1 within the split. `headers` also opens every clip, for missing files and durations out of bounds.

    Raises:
        ManifestError: not such a folder, or `scores.json` is no JSON object.
    """
    source = _read_scores(folder / SCORES_FILE)
    reader = _SplitReader(folder, split, config, source)
    samples = reader.read()
    if headers:
        check = check_audio(samples, config)
        reader.issues += check.issues + find_long_clips(samples, check.durations, config)
        bad = {issue.row for issue in reader.issues}
        samples = [sample for sample in samples if sample.row not in bad]
    notes = [f"{text} ({count})" for text, count in reader.notes.items()]
    return ReadResult(samples, reader.issues, notes, reader.num_rows)


@dataclass(slots=True)
class _Scores:
    """`scores.json`: its utterances, the line each begins at, and keys that stand twice in one object."""

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]
    doubled: frozenset[str]

    def source(self, utterance: str) -> str:
        return f"{self.path}:{self.lines.get(utterance, 1)}"


def _read_scores(path: Path) -> _Scores:
    doubled: set[str] = set()

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(items)
        if len(values) < len(items):
            doubled.update(key for key, count in Counter(key for key, _ in items).items() if count > 1)
        return values

    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text, object_pairs_hook=pairs)
    except OSError as error:
        reason = "is this the folder of Speechocean762, with train, test and resource in it?"
        raise ManifestError(f"{path}: cannot be read: {error.strerror}; {reason}") from None
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ManifestError(f"{path}: expected an object with the utterance ids as keys, found {type(values).__name__}")
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        for found in _KEY.finditer(line):
            lines.setdefault(found[1], number)
    return _Scores(path, values, lines, frozenset(doubled))


@dataclass(slots=True)
class _SplitReader:
    """The tables of one split, and the issues and notes found so far."""

    folder: Path
    split: Split
    config: DataConfig
    scores: _Scores
    issues: list[Issue] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    num_rows: int = 0
    raters: _Scores | None = None

    def read(self) -> list[Sample]:
        self._open_raters()
        tables = {name: self._table(name, required=True) for name in _TABLES}
        people = {name: self._table(name, required=False) for name in ("spk2age", "spk2gender")}
        order = list(dict.fromkeys(key for table in tables.values() for key in table))
        self.num_rows = len(order)
        if not order:
            self._file_issue(f"{self.folder / self.split / 'text'}:1", "empty_manifest", "holds no utterances")
        speakers = dict.fromkeys(value for value, _ in tables["utt2spk"].values())
        details = {speaker: self._details(speaker, people) for speaker in speakers}
        for key in sorted(self.scores.doubled - self.scores.values.keys()):
            self._file_issue(f"{self.scores.path}:1", "duplicate_key", f"an object holds the key {key!r:.60} twice")
        spoilt = {issue.sample_id for issue in self.issues}  # which of two lines is right is not ours to say
        samples: list[Sample] = []
        for number, utterance in enumerate(order, 1):
            name = next(name for name in tables if utterance in tables[name])
            source = f"{self.folder / self.split / name}:{tables[name][utterance][1]}"
            context = Context(Row(number, source), printable(utterance), self.folder, self.config)
            sample = self._utterance(context, utterance, tables, details)
            self.issues += context.issues
            if sample is not None and context.sample_id not in spoilt:
                samples.append(sample)
                self.notes.update(context.notes)
        return samples

    def _open_raters(self) -> None:
        path = self.folder / RATERS_FILE
        if os.path.exists(path):
            try:
                found = _read_scores(path)
            except ManifestError as error:  # the labels are whole without it
                self.notes[f"no scores of single raters: {error}"] += 1
                return
            if inner := sorted(found.doubled - found.values.keys()):  # in which utterances is not known
                self.notes[f"no scores of single raters: {path}: an object holds the key {inner[0]!r:.60} twice"] += 1
            else:
                self.raters = found

    def _file_issue(self, source: str, code: str, message: str, sample_id: str = "-") -> None:
        self.issues.append(Issue(source, printable(sample_id), code, printable(message)))

    def _table(self, name: str, required: bool) -> dict[str, tuple[str, int]]:
        """Key -> (value, line) of one table; the first of doubled lines counts, and the others are issues."""
        path = self.folder / self.split / name
        table: dict[str, tuple[str, int]] = {}
        try:
            # surrogateescape: a byte that is not UTF-8 becomes an issue of its line
            content = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        except FileNotFoundError:
            if required:
                self._file_issue(f"{path}:1", "missing_table", "no such file; every split needs it")
            else:
                self.notes[f"{self.split}/{name} is missing: not known of any speaker"] += 1
            return table
        except OSError as error:
            self._file_issue(f"{path}:1", "missing_table", f"cannot be read: {error.strerror}")
            return table
        for number, line in enumerate(content.split("\n"), 1):
            key, *rest = line.split(None, 1) or [""]
            if not key:
                continue
            if _NOT_TEXT.search(line):
                reason = "the line holds bytes that are not UTF-8, or NUL"
                self._file_issue(f"{path}:{number}", "bad_unicode", reason, key)
            elif not rest:
                self._file_issue(f"{path}:{number}", "bad_line", "a line is an id, a tab or blank, and a value", key)
            elif key in table:
                reason = f"the id already stands in line {table[key][1]}"
                self._file_issue(f"{path}:{number}", "duplicate_id", reason, key)
            else:
                table[key] = (rest[0].strip(), number)
        return table

    def _details(self, speaker: str, people: _Tables) -> dict[str, Any]:
        """Age in years and gender of a speaker, as far as they are given."""
        details: dict[str, Any] = {}
        for name, table in people.items():
            key = name.removeprefix("spk2")
            if speaker not in table:
                if table:
                    self.notes[f"{self.split}: speakers without {key}"] += 1
                continue
            value, line = table[speaker]
            sound = value.lower() in GENDERS if key == "gender" else AGE.fullmatch(value) is not None
            if sound:
                details[key] = value.lower() if key == "gender" else int(value)
            else:
                wanted = "m or f" if key == "gender" else "a number of years"
                source = f"{self.folder / self.split / name}:{line}"
                self._file_issue(source, "bad_field", f"speaker {speaker}: {key} {value!r:.40} is not {wanted}")
        return details

    def _utterance(self, context: Context, utterance: str, tables: _Tables, details: _Details) -> Sample | None:
        for name, code in _TABLES.items():
            if utterance not in tables[name]:
                context.issue(code, f"no sound line of {self.split}/{name} is for it")
        row = context.row
        text = tables["text"].get(utterance, ("", 0))[0]
        if text:
            context.text(text, "the text")
        audio = None
        if utterance in tables["wav.scp"]:
            place, line = tables["wav.scp"][utterance]
            context.row = Row(row.number, f"{self.folder / self.split / 'wav.scp'}:{line}")
            audio = _audio(context, place)
        context.row = Row(row.number, self.scores.source(utterance))
        if utterance in self.scores.doubled:
            context.issue("duplicate_id", "scores.json holds this utterance twice")
        entry = self.scores.values.get(utterance)
        labels = LabelReader(context, self.split, "scores.json").read(entry, text)
        context.row = row
        if context.issues or labels is None:
            return None
        raters: dict[str, list[float]] = {}
        if self.raters is not None:
            doubled = utterance in self.raters.doubled  # which of the two is right is not ours to say
            entry = None if doubled else self.raters.values.get(utterance)
            raters = read_raters(context, self.split, entry, text)
        speaker = tables["utt2spk"][utterance][0]
        labels = replace(labels, raters=raters, **details[speaker])
        return Sample(
            context.sample_id,
            text,
            audio,
            speaker=speaker,
            language="en",
            source=row.source,
            row=row.number,
            pronunciation=labels,
        )


def _audio(context: Context, place: str) -> AudioRef | None:
    """The clip of a line of wav.scp: relative to the dataset's folder, else to the current one."""
    if place.endswith("|"):
        context.issue("bad_path", f"{place!r:.80} is a command; commands are not run, give a path")
        return None
    named = context.audio({"audio_url": place})
    if named is None or named[0].path is None or os.path.isfile(named[0].path):
        return None if named is None else named[0]
    here = Context(context.row, context.sample_id, Path.cwd(), context.config)
    other = here.path(place)
    return AudioRef(other) if other is not None and os.path.isfile(other) else named[0]

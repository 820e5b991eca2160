"""Speechocean762 in its official layout -> `Sample`s with the labels of pronunciation, every issue collected.

The corpus (Zhang et al., Interspeech 2021, arXiv 2104.01378; OpenSLR 101) scores read English by hand: utterances 0-10,
words 0-10, phones 0-2, and for a phone scored below 0.5 what was said in its place.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from speechtune.config import DataConfig
from speechtune.data.row_parser import NOT_TEXT, Context, ReadResult, read_rows
from speechtune.data.rows import Row, Split
from speechtune.data.speechocean_labels import LabelReader, read_person, read_raters, utterance
from speechtune.errors import Issue, ManifestError, printable
from speechtune.types import AudioRef, Sample

SCORES_FILE = Path("resource", "scores.json")
RATERS_FILE = Path("resource", "scores-detail.json")
"""Scores of the single raters, which the official release has and most copies do not."""

_TABLES = {"text": "missing_text", "wav.scp": "missing_audio", "utt2spk": "missing_speaker"}
_KEY = re.compile(r'"([^"\\]*)"\s*:\s*\{')

_Tables = Mapping[str, Mapping[str, tuple[str, int]]]  # file -> key -> (value, line)
_Details = Mapping[str, Mapping[str, Any]]  # speaker -> what is known of the person


def is_speechocean(path: Path) -> bool:
    """Whether `path` is a folder laid out like Speechocean762."""
    return os.path.isfile(path / SCORES_FILE)


def read_speechocean(folder: Path, split: Split, config: DataConfig) -> ReadResult:
    """Read one split of a Speechocean762 folder; utterances with issues give no sample.

    Rows count from 1 within the split. Audio is not checked.

    Raises ManifestError: not such a folder, or `scores.json` is no JSON object.
    """
    return _SplitReader(folder, split, config, _read_scores(folder / SCORES_FILE)).read()


@dataclass(slots=True)
class _Scores:
    """`scores.json`: its utterances, the line each begins at, and keys that stand in one object more than once."""

    path: Path
    values: dict[str, Any]
    lines: dict[str, int]
    duplicates: frozenset[str]

    def source(self, utterance: str) -> str:
        return f"{self.path}:{self.lines.get(utterance, 1)}"


def _read_scores(path: Path) -> _Scores:
    duplicates: set[str] = set()

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(items)
        if len(values) < len(items):
            duplicates.update(key for key, count in Counter(key for key, _ in items).items() if count > 1)
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
        for match in _KEY.finditer(line):
            lines.setdefault(match[1], number)
    return _Scores(path, values, lines, frozenset(duplicates))


@dataclass(slots=True)
class _SplitReader:
    """The tables of one split, and the issues and notes found so far."""

    folder: Path
    split: Split
    config: DataConfig
    scores: _Scores
    issues: list[Issue] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    raters: _Scores | None = None

    def read(self) -> ReadResult:
        self._open_raters()
        tables = {name: self._table(name, required=True) for name in _TABLES}
        people = {name: self._table(name, required=False) for name in ("spk2age", "spk2gender")}
        order = list(dict.fromkeys(key for table in tables.values() for key in table))
        speakers = dict.fromkeys(value for value, _ in tables["utt2spk"].values())
        details = {speaker: self._details(speaker, people) for speaker in speakers}
        for key in sorted(self.scores.duplicates - self.scores.values.keys()):
            self._file_issue(f"{self.scores.path}:1", "duplicate_key", f"an object holds the key {key!r:.60} twice")
        spoilt = {issue.sample_id for issue in self.issues}  # which of two lines is right cannot be known

        def rows() -> Iterator[Row]:
            for number, key in enumerate(order, 1):
                name = next(name for name in tables if key in tables[name])
                yield Row(number, f"{self.folder / self.split / name}:{tables[name][key][1]}", {"utterance": key})

        def read(context: Context) -> Sample | None:
            sample = self._utterance(context, context.row.value["utterance"], tables, details)
            return None if context.sample_id in spoilt else sample

        text = self.folder / self.split / "text"
        result = read_rows(text, rows(), self.config, read, lambda row: row.value["utterance"], self.folder)
        notes = [f"{text} ({count})" for text, count in self.notes.items()]
        return replace(result, issues=self.issues + result.issues, notes=notes + result.notes)

    def _open_raters(self) -> None:
        path = self.folder / RATERS_FILE
        if os.path.exists(path):
            try:
                raters = _read_scores(path)
            except ManifestError as error:  # the labels are complete without it
                self.notes[f"no scores of single raters: {error}"] += 1
                return
            if inner := sorted(raters.duplicates - raters.values.keys()):  # in which utterances is not known
                self.notes[f"no scores of single raters: {path}: an object holds the key {inner[0]!r:.60} twice"] += 1
            else:
                self.raters = raters

    def _file_issue(self, source: str, code: str, message: str, sample_id: str = "-") -> None:
        self.issues.append(Issue(source, printable(sample_id), code, printable(message)))

    def _table(self, name: str, required: bool) -> dict[str, tuple[str, int]]:
        """Key -> (value, line) of one table; of lines with one key the first counts, and the others are issues."""
        path = self.folder / self.split / name
        table: dict[str, tuple[str, int]] = {}
        try:
            # surrogateescape: a byte that is not UTF-8 becomes an issue of its line
            content = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
        except FileNotFoundError:
            if required:
                self._file_issue(f"{path}:1", "missing_table", "no such file; every split needs it")
            else:
                self.notes[f"{self.split}/{name} is missing: known of no speaker"] += 1
            return table
        except OSError as error:
            self._file_issue(f"{path}:1", "missing_table", f"cannot be read: {error.strerror}")
            return table
        for number, line in enumerate(content.split("\n"), 1):
            key, *rest = line.split(None, 1) or [""]
            if not key:
                continue
            if NOT_TEXT.search(line):
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
            if speaker in table:
                value, line = table[speaker]
                source = f"{self.folder / self.split / name}:{line}"
                context = Context(Row(0, source), "-", self.folder, self.config)
                details |= read_person(context, {key: value}, f"speaker {speaker}: ")
                self.issues += context.issues
            elif table:
                self.notes[f"{self.split}: speakers without {key}"] += 1
        return details

    def _utterance(self, context: Context, key: str, tables: _Tables, details: _Details) -> Sample | None:
        for name, code in _TABLES.items():
            if key not in tables[name]:
                context.issue(code, f"{self.split}/{name} has no valid line for it")
        row = context.row
        text = tables["text"].get(key, ("", 0))[0]
        if text:
            context.text(text, "the text")
        audio = None
        if key in tables["wav.scp"]:
            place, line = tables["wav.scp"][key]
            context.row = Row(row.number, f"{self.folder / self.split / 'wav.scp'}:{line}")
            audio = _audio(context, place)
        context.row = Row(row.number, self.scores.source(key))
        if key in self.scores.duplicates:
            context.issue("duplicate_id", "scores.json holds this utterance twice")
        entry = self.scores.values.get(key)
        labels = LabelReader(context, self.split, "scores.json").read(entry, text)
        context.row = row
        if context.issues or labels is None:
            return None
        raters: dict[str, list[float]] = {}
        if self.raters is not None:
            duplicate = key in self.raters.duplicates  # which of the two is right cannot be known
            entry = None if duplicate else self.raters.values.get(key)
            raters = read_raters(context, self.split, entry, text)
        speaker = tables["utt2spk"][key][0]
        return utterance(context, text, audio, speaker, replace(labels, raters=raters, **details[speaker]))


def _audio(context: Context, place: str) -> AudioRef | None:
    """The clip of a line of wav.scp: relative to the dataset's folder, else to the current one."""
    named = context.audio({"audio_url": place})
    if named is None or named[0].path is None or os.path.isfile(named[0].path):
        return None if named is None else named[0]
    here = Context(context.row, context.sample_id, Path.cwd(), context.config)
    other = here.path(place)
    return AudioRef(other) if other is not None and os.path.isfile(other) else named[0]

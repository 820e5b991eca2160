"""Rows of tables: a row a line, with a header (CSV, TSV) or without one (the lists of many trainers)."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from speechtune.data.plain_rows import AUDIO, AUDIO_SUFFIXES, OTHER_SUFFIXES, REFERENCE_AUDIO, TEXT, is_clip
from speechtune.data.rows import UNREADABLE_REST, Place, Row

_FOLDERS = ("", "wavs", "clips", "wav", "audio", "audios")
"""Where the clips of a table lie, beside it."""
_LINES = 200  # of a list, from which the meaning of its columns is told
_LINE_END = re.compile(r"\r\n|\r|\n")


def first_lines(place: Place, count: int = 1) -> list[list[str]]:
    """The fields of the first lines of a file that are not empty."""
    lines = [line for line in _LINE_END.split(place.head) if line.strip()] or [""]
    return [[field.strip().strip('"') for field in line.split(_delimiter(place))] for line in lines[:count]]


def is_table(place: Place) -> bool:
    """Whether a file begins with a header that names a column of clips or of texts."""
    (names,) = first_lines(place)
    return len(names) > 1 and not {*AUDIO, *TEXT}.isdisjoint(_lower(names)) and not any(map(is_clip, names))


def is_list(place: Place) -> bool:
    """Whether a file begins with a clip, or with the id of one and a vertical bar, and goes on with its text."""
    ((clip, *others),) = first_lines(place)
    by_id = _delimiter(place) == "|" and (_found(place.path.parent, clip, "", "") or any(map(is_clip, others[1:-1])))
    return bool(others and (is_clip(clip) or by_id))


def table_rows(place: Place) -> Iterator[Row]:
    """Rows of a table with a header; clips are looked for beside it and in the usual folders.

    Where no column is called as clips usually are, the first one counts as theirs if its first value leads to one.
    """
    header, *rows = first_lines(place, 2)
    names = _lower(header)
    if rows and {*AUDIO}.isdisjoint(names) and _found(place.path.parent, rows[0][0], "", ""):
        names[0] = "audio"
    return _rows(place, names, is_header=True)


def list_rows(place: Place) -> Iterator[Row]:
    """Rows of a list without header: audio|text, audio|text|normalised, audio|text|speaker, audio|speaker|text,
    audio|text|normalised|seconds, audio|speaker|language|text with any more, or those of seed-tts-eval.
    """
    lines = first_lines(place, _LINES)
    return _rows(place, _columns([fields for fields in lines if len(fields) == len(lines[0])]), is_header=False)


def _lower(names: Sequence[str]) -> list[str]:
    return [name.lower() for name in names]


def _columns(lines: Sequence[Sequence[str]]) -> list[str]:
    def blanks(column: int) -> bool:
        return any(" " in fields[column] for fields in lines)

    width = len(lines[0])
    if width == 2:
        return ["audio", "text"]
    if width == 3:
        if blanks(1) != blanks(2):  # a speaker has none
            return ["audio", "text", "speaker"] if blanks(1) else ["audio", "speaker", "text"]
        return ["audio", "text", "normalized_text"]
    if is_clip(lines[0][2]):  # of seed-tts-eval
        return ["audio" if width == 4 else "id", "ref_text", "ref_audio", "text", "audio"]
    if all(re.fullmatch(r"[\d.]+", fields[3]) for fields in lines):
        return ["audio", "text", "normalized_text", "seconds"]
    return ["audio", "speaker", "language", "text"] + [""] * (width - 4)


def _delimiter(place: Place) -> str:
    line = _LINE_END.split(place.head.lstrip("\r\n"), maxsplit=1)[0]
    return next((mark for mark in "\t|" if mark in line), max(",;", key=line.count))


def _rows(place: Place, names: Sequence[str], is_header: bool) -> Iterator[Row]:
    path, delimiter = place.path, _delimiter(place)
    clips = {next((name for name in kind if name in names), "") for kind in (AUDIO, REFERENCE_AUDIO)}
    quoting = csv.QUOTE_NONE if delimiter in "\t|" else csv.QUOTE_MINIMAL  # a text may begin with a quotation mark
    number, usual = 0, ("", ".wav")
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
        while True:
            source = f"{path}:{lines.line_num + 1}"
            try:
                fields = next(lines, None)
            except csv.Error as error:
                yield Row(number + 1, source, None, UNREADABLE_REST, f"not a row of a table: {error}")
                return
            if fields is None:
                return
            if not any(map(str.strip, fields)):
                continue
            if is_header:
                is_header = False
                continue
            number += 1
            value = dict(zip(names, map(str.strip, fields), strict=False))
            if any(map(str.strip, fields[len(names) :])):
                reason = f"{len(fields)} fields, but {len(names)} columns: does a text hold {delimiter!r}?"
                yield Row(number, source, None, "bad_row", reason, delimiter.join(fields))
                continue
            for name in [name for name in clips if value.get(name)]:
                usual = _found(path.parent, value[name], *usual) or usual
                value[name] = _clip(value[name], *usual)
            yield Row(number, source, {k: _number(v) if k in ("duration", "offset") else v for k, v in value.items()})


def _found(folder: Path, name: str, *usual: str) -> tuple[str, str] | None:
    """Folder and ending that lead from `name` to a clip; those that did last are tried first."""
    endings = ("",) if is_clip(name) else ("", *AUDIO_SUFFIXES, *OTHER_SUFFIXES)
    ways = [usual, *((place, ending) for place in _FOLDERS for ending in endings)]
    return next((way for way in ways if name and os.path.isfile(folder / _clip(name, *way))), None)


def _clip(name: str, place: str, ending: str) -> str:
    return os.path.join(place, name if is_clip(name) else name + ending)


def _number(text: str) -> float | str:
    try:
        return float(text or "nan")
    except ValueError:
        return text

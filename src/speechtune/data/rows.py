"""What a manifest is read from and into: places and rows; and the rows of JSON files, streamed with line numbers."""

import json
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar

from speechtune.errors import ManifestError

MAX_ROW_CHARS = 256 * 2**20
"""Longest row of a JSON file, in characters; a longer one counts as malformed."""
UNREADABLE_REST = "unreadable_rest"
"""Code of an issue after which the rows behind it are unknown; quarantine cannot help."""

_CHUNK_CHARS = 2**20
_SPACE = re.compile(r"[ \t\n\r]*")
_TOP_LEVEL_LIST = re.compile(r'"(samples|messages)"\s*:\s*\[')
Value = TypeVar("Value", bound=Hashable)

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


@dataclass(frozen=True)
class Place:
    """A file or folder to be read, and the split that is wanted where it holds several."""

    path: Path
    split: Split = "train"

    @cached_property
    def head(self) -> str:
        """The beginning of the file; "" for a folder. Bytes that are not UTF-8 are surrogates."""
        if not self.path.is_file():
            return ""
        try:
            with self.path.open("rb") as file:
                return file.read(2**16).decode("utf-8-sig", errors="surrogateescape")
        except OSError as error:
            raise ManifestError(f"{self.path}: cannot be read: {error.strerror}") from None


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in the file; `value` is None where it cannot be parsed and `reason` says why.

    `code` classifies the reason; `raw` is the unparsed text where there is one line of it.
    """

    number: int
    source: str
    value: Any = None
    code: str = ""
    reason: str = ""
    raw: str = ""


class Shared:
    """Keeps one of equal values: most clips stand in two rows of a manifest, a system message in every row."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}

    def __call__(self, value: Value) -> Value:
        """The first value equal to `value`."""
        return self._kept.setdefault(value, value)


def json_rows(place: Place) -> Iterator[Row]:
    """Rows of a JSON list, of JSONL, of one or several objects, or of the list `samples` of an object."""
    path, head = place.path, place.head.lstrip()
    try:
        # surrogateescape: a byte that is not UTF-8 becomes an issue of its row instead of ending the read
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            top_list = _TOP_LEVEL_LIST.search(head)
            if head[:1] == "[":
                yield from _Scanner(file, path).list_rows()
            elif path.name == "metadata.json" or (top_list and top_list[1] == "samples"):
                yield from _Scanner(file, path).member_rows("samples")
            elif path.suffix in (".jsonl", ".ndjson") or _is_json(head.partition("\n")[0]):
                yield from _line_rows(file, path)
            else:
                yield from _Scanner(file, path).object_rows()
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None


def _decoder() -> json.JSONDecoder:
    # NaN and Infinity are what pandas writes for an absent value
    return json.JSONDecoder(parse_constant=lambda _: None)


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _line_rows(file: TextIO, path: Path) -> Iterator[Row]:
    decoder = _decoder()
    number = 0
    for line_number, line in enumerate(file, 1):
        if not line.strip():
            continue
        number += 1
        source = f"{path}:{line_number}"
        try:
            yield Row(number, source, decoder.decode(line.strip(" \t\r\n")))
        except (ValueError, RecursionError) as error:
            yield Row(number, source, None, "invalid_json", f"not valid JSON: {_reason(error)}", line.rstrip("\r\n"))


class _Scanner:
    """Decodes one JSON value after the other out of a growing buffer, so that a list is never in memory all at once."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._decoder = _decoder()
        self._buffer = ""
        self._at = 0
        self._counted = 0  # newlines before this position of the buffer are in _line
        self._line = 1
        self._ended = False

    def list_rows(self) -> Iterator[Row]:
        """Rows of a JSON list that is the file."""
        row = Row(0, "")
        for row in self._list():
            yield row
        if not row.reason and self._peek():
            yield self._broken(row.number + 1, "there is more text after the end of the list")

    def object_rows(self) -> Iterator[Row]:
        """Rows of a file that holds one JSON object, or several one after the other."""
        number = 0
        while self._peek():
            number += 1
            yield (row := self._row(number))
            if row.reason:
                return

    def member_rows(self, name: str) -> Iterator[Row]:
        """Rows of the list `name` of the JSON object that makes up the file."""
        self._at = 1 if self._peek() == "{" else 0
        while self._peek() == '"':
            key = self._row(1)
            if key.reason or self._peek() != ":":
                yield self._broken(1, key.reason or "expected ':'")
                return
            self._at += 1
            if key.value == name and self._peek() == "[":
                yield from self._list()
                return
            value = self._row(1)
            if value.reason:
                yield value
                return
            if self._peek() == ",":
                self._at += 1
        yield self._broken(1, f"holds no list {name!r} at its top level")

    def _list(self) -> Iterator[Row]:
        self._peek()
        self._at += 1
        number = 0
        if self._peek() == "]":
            self._at += 1
            return
        while True:
            number += 1
            yield (row := self._row(number))
            if row.reason:
                return
            separator = self._peek()
            if separator not in (",", "]"):
                reason = f"expected ',' or ']', found {separator!r}" if separator else "the list is cut off: no ']'"
                yield self._broken(number + 1, reason)
                return
            self._at += 1
            if separator == "]":
                return

    def _row(self, number: int) -> Row:
        self._peek()
        source = self._source()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                # cut off at the buffer's end, or wrong for good?
                cut_off = error.msg.startswith("Unterminated string") or error.pos > len(self._buffer) - 16
                if self._ended or not cut_off or len(self._buffer) - self._at > MAX_ROW_CHARS:
                    return self._broken(number, _reason(error))
            except (ValueError, RecursionError) as error:
                return self._broken(number, _reason(error))
            else:
                if end < len(self._buffer) or self._ended:
                    self._at = end
                    return Row(number, source, value)
            self._more()

    def _broken(self, number: int, reason: str) -> Row:
        text = f"not valid JSON: {reason}; the rest of the file cannot be read"
        return Row(number, self._source(), None, UNREADABLE_REST, text)

    def _source(self) -> str:
        self._line += self._buffer.count("\n", self._counted, self._at)
        self._counted = self._at
        return f"{self._path}:{self._line}"

    def _peek(self) -> str:
        """Skip white space and return the next character, "" at the end of the file."""
        while True:
            match = _SPACE.match(self._buffer, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if self._ended:
                return ""
            self._more()

    def _more(self) -> None:
        self._source()
        rest = self._buffer[self._at :]
        chunk = self._file.read(max(_CHUNK_CHARS, len(rest)))
        self._ended = not chunk
        self._buffer = rest + chunk
        self._at = self._counted = 0


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)

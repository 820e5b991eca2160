"""Rows -> samples, whatever their layout: the loop over the rows, and the checks of texts, paths and URLs in one."""

import base64
import binascii
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from speechtune.audio import MAX_INLINE_BYTES
from speechtune.config import DataConfig
from speechtune.data.rows import Row, Shared
from speechtune.errors import Issue, printable
from speechtune.types import AudioRef, Clip, Sample

NOT_TEXT = re.compile("[\ud800-\udfff\0]")
"""Lone surrogates, which stand for bytes that are not UTF-8, and NUL."""
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]*\|>")
AUDIO_PARTS = ("audio_url", "audio", "input_audio", "path", "url")
"""Fields of an audio part of a message that may hold the clip."""
SPEAKER = ("speaker", "speaker_id", "spk", "spk_id", "speaker_name", "client_id")
LANGUAGE = ("language", "lang", "locale")
"""Names of the fields for speaker and language, in the order they are looked for."""
Spoken = tuple[AudioRef, float | None, str]
"""A clip, its declared duration in seconds, and what is said in it."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+)://|(file|data):", re.IGNORECASE)


def text_issues(text: str, what: str, empty: str = "empty_text") -> Iterator[tuple[str, str]]:
    """Code and message of whatever keeps a text from being spoken; `what` names it, `empty` is the code of no text."""
    if not text.strip():
        yield empty, f"{what} is empty"
    if token := _SPECIAL_TOKEN.search(text):
        yield "special_token", f"{what} holds the control token {token[0]!r}, which would enter the prompt"
    if NOT_TEXT.search(text):
        yield "bad_unicode", f"{what} holds bytes that are not UTF-8, lone surrogates or NUL"


@dataclass(slots=True)
class Context:
    """One row on its way to a `Sample`: where it stands, what is allowed, and the issues found so far."""

    row: Row
    sample_id: str
    folder: Path
    config: DataConfig
    shared: Shared = field(default_factory=Shared)
    issues: list[Issue] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def issue(self, code: str, message: str) -> None:
        """Record an issue of this row."""
        self.issues.append(Issue(self.row.source, self.sample_id, code, printable(message), self.row.number))

    def text(self, text: str, what: str, code: str = "empty_text") -> str:
        """Check a text and return it unchanged, byte for byte."""
        for issue in text_issues(text, what, code):
            self.issue(*issue)
        return text

    def optional_text(self, values: Mapping[str, Any], *names: str) -> str | None:
        """First of the named fields that holds a text or a number; None where all are absent."""
        for name in names:
            value = values.get(name)
            if isinstance(value, str) and value:
                return value
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                return str(value)
            if value not in (None, "") and value == value:
                self.issue("bad_field", f"{name!r} is not a text but {value!r:.60}")
        return None

    def number(self, values: Mapping[str, Any], name: str) -> float | None:
        """A field as finite number; None where absent or NaN."""
        value = values.get(name)
        if value is None or value != value:
            return None
        try:
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
        except OverflowError:
            pass
        self.issue("bad_field", f"{name!r} is not a number but {value!r:.60}")
        return None

    def path(self, text: str, *also_within: Path) -> str | None:
        """Resolve a path of the manifest, confined to `audio_root` where that is set."""
        try:
            encoded = os.fsencode(text)
        except UnicodeEncodeError:
            encoded = b"\0"
        if b"\0" in encoded:
            self.issue("bad_path", f"{text!r} holds a NUL character or a lone surrogate")
            return None
        joined = os.path.join(self.folder, text)
        place, name = os.path.split(joined)
        path = os.path.join(_real_folder(place), name)
        if name in ("", ".", "..") or os.path.islink(path):
            path = os.path.realpath(joined)
        named = self.config.audio_root
        if named is None:
            return path
        roots = [_real_folder(str(root)) for root in (*(named if isinstance(named, tuple) else (named,)), *also_within)]
        if not any(path == root or path.startswith(os.path.join(root, "")) for root in roots):
            self.issue("outside_root", f"{text!r} leads to {path}, outside data.audio_root ({roots[0]})")
            return None
        return path

    def audio(
        self, part: Mapping[str, Any], names: Sequence[str] = AUDIO_PARTS
    ) -> tuple[AudioRef, float | None] | None:
        """The clip in the first of the named fields, and its declared duration in seconds where no segment is meant."""
        duration, offset = self.number(part, "duration"), self.number(part, "offset")
        if duration is not None and duration <= 0:
            self.issue("bad_duration", f"the declared duration {duration:g} s is not above 0")
            return None
        if offset is not None and offset < 0:
            self.issue("bad_offset", f"the offset {offset:g} s is negative")
            return None
        # a duration without offset describes the file; with an offset it cuts a segment out of it
        segment = {} if offset is None else {"offset_seconds": offset, "duration_seconds": duration}
        declared = duration if offset is None else None
        place = self._place(part, names)
        if place is None or isinstance(place, bytes):
            return None if place is None else (AudioRef(data=place, **segment), declared)
        if url := _URL.match(place):
            scheme = (url[1] or url[2]).lower()
            if scheme not in ("http", "https"):
                self.issue("url_refused", f"{place!r:.100}: scheme {scheme!r} is refused; give a path")
            elif not self.config.allow_urls:
                self.issue("url_refused", f"{place!r:.100}: URLs are refused; download it, or set data.allow_urls=true")
            else:
                return AudioRef(url=place, **segment), declared
            return None
        if place.endswith("|"):
            self.issue("bad_path", f"{place!r:.80} is a command; commands are not run, give a path")
            return None
        path = self.path(place)
        return None if path is None else (self.shared(AudioRef(path=path, **segment)), declared)

    def _place(self, part: Mapping[str, Any], names: Sequence[str]) -> str | bytes | None:
        """The path, URL or bytes that an audio field holds; None, with an issue, where there is none."""
        name = first_name(part, names)
        value = part[name] if name else None
        if isinstance(value, Mapping):  # {"bytes", "path"} of datasets, {"data", "format"} and {"url"} of chat services
            part, name = value, first_name(value, ("bytes", "data", "url", "path"))
            value = part[name] if name else None
            if name is None and "array" in part:
                self.issue("missing_audio", "the audio is decoded; cast the column with Audio(decode=False)")
                return None
        if value is None or value == "placeholder":
            name = "raw_audio"
            if (value := self.optional_text(part, name)) is None:
                self.issue("missing_audio", f"no audio: neither {names[0]!r} nor 'raw_audio' is given")
                return None
        if name in ("raw_audio", "data") and isinstance(value, str):
            return self._decoded(value, name)
        if name == "bytes" or isinstance(value, bytes):
            return self._sized(value, str(name))
        place = self.optional_text({str(name): value}, str(name))
        head, comma, text = (place or "").partition(",")
        if comma and head.lower().startswith("data:") and head.lower().endswith(";base64"):
            return self._decoded(text, "data:")
        return place

    def _sized(self, value: object, name: str) -> bytes | None:
        if not isinstance(value, bytes):
            self.issue("bad_field", f"{name!r} of the audio is not bytes but {type(value).__name__}")
        elif len(value) > MAX_INLINE_BYTES:
            self.issue("too_large", f"{name!r} exceeds the limit of {MAX_INLINE_BYTES} bytes; put it into a file")
        else:
            return value
        return None

    def _decoded(self, text: str, name: str) -> bytes | None:
        try:
            return self._sized(base64.b64decode(text, validate=True), name)
        except (binascii.Error, ValueError) as error:
            self.issue("bad_base64", f"{name!r} is not valid base64: {error}")
            return None


def first_name(values: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of the names whose field holds something: not None, NaN or ""."""
    for name in names:  # called several times a row
        if (value := values.get(name)) is not None and value != "" and value == value:
            return name
    return None


@lru_cache(maxsize=4096)
def _real_folder(path: str) -> str:
    return os.path.realpath(path)


def make_sample(
    context: Context,
    clips: list[Spoken],
    value: Mapping[str, Any],
    misc: Mapping[str, Any] | None = None,
    system: str | None = None,
    scene: str | None = None,
    borrows: bool = False,
) -> Sample | None:
    """Build the sample out of (audio, declared duration, text), the target first."""
    audio, _, text = clips[0]
    speaker = context.optional_text(value, *SPEAKER) or _text(misc or {}, *SPEAKER)
    language = context.optional_text(value, *LANGUAGE) or _text(misc or {}, *LANGUAGE)
    for name, given in (("speaker", speaker), ("language", language)):
        if given is not None and NOT_TEXT.search(given):
            context.issue("bad_unicode", f"{name!r} holds lone surrogates or NUL")
    if context.issues:
        return None
    one = context.shared
    durations = tuple(declared for _, declared, _ in clips)
    seconds = one(durations) if any(durations) else ()
    references = tuple(Clip(ref, one(spoken)) for ref, _, spoken in clips[1:])
    system, scene, speaker, language, text = map(one, (system, scene, speaker, language, text))
    name, source, row = context.sample_id, context.row.source, context.row.number
    return Sample(name, text or "", audio, references, system, scene, speaker, language, source, row, seconds, borrows)


def _text(values: Mapping[str, Any], *names: str) -> str | None:
    return next((values[name] for name in names if isinstance(values.get(name), str) and values[name]), None)


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What a data file holds: samples, the issues of the other rows, and notes with counts."""

    samples: list[Sample]
    issues: list[Issue]
    notes: list[str]
    num_rows: int


def read_rows(
    path: Path,
    rows: Iterable[Row],
    config: DataConfig,
    read: Callable[[Context], Sample | None],
    name: Callable[[Row], str] | None = None,
    folder: Path | None = None,
) -> ReadResult:
    """Read each row of the data file or folder `path`; rows with issues give no sample.

    Args:
        path: where the rows stand.
        rows: its rows.
        config: limits.
        read: reads a row whose value is an object; issues go to the context.
        name: the id of a row; None takes the one it gives itself, else the name of `path` and its number.
        folder: what paths in the rows are relative to; None takes that of `path`.
    """
    stem = path.resolve().name if path.is_dir() else path.stem
    folder = folder or (path if path.is_dir() else path.parent)
    samples: list[Sample] = []
    issues: list[Issue] = []
    notes: Counter[str] = Counter()
    first_row: dict[str, int] = {}
    num_rows, shared = 0, Shared()
    for row in rows:
        num_rows += 1
        context = Context(row, printable(name(row) if name else _row_id(row, stem)), folder, config, shared)
        sample = None
        if row.reason or not isinstance(row.value, dict):
            reason = row.reason or f"a row is an object, found {type(row.value).__name__}"
            context.issue(row.code or "bad_row", reason)
        else:
            sample = read(context)
        first = first_row.setdefault(context.sample_id, row.number)
        if first != row.number:
            context.issue("duplicate_id", f"the id is already taken by row {first}")
        issues += context.issues
        if sample is not None and not context.issues:
            samples.append(sample)
            notes.update(context.notes)
    if num_rows == 0:
        issues.append(Issue(f"{path}:1", "-", "empty_manifest", "holds no rows"))
    return ReadResult(samples, issues, [f"{text} ({count})" for text, count in notes.items()], num_rows)


def _row_id(row: Row, stem: str) -> str:
    value = row.value if isinstance(row.value, dict) else {}
    misc = value.get("misc")
    for given in (value.get("id"), misc.get("id") if isinstance(misc, dict) else None):
        if (isinstance(given, str) and given.strip()) or (isinstance(given, int) and not isinstance(given, bool)):
            return str(given)
    return f"{stem}-{row.number}"

"""Rows -> `Sample`: one reader per format; every fault of a row goes to the row's context, none is raised."""

from __future__ import annotations

import base64
import binascii
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from speechtune.audio import MAX_INLINE_BYTES
from speechtune.config import DataConfig
from speechtune.families.base import AudioRef, Clip, Sample
from speechtune.rows import Fault, Row, RowFacts, Shared, printable

INSTRUCTION = "Please generate speech for given text in reference audio's voice:"
"""What the original pipeline writes before the target text in the user's message."""
MAX_TRANSCRIPT_BYTES = 2**20
"""Largest transcript file read, 1 MiB."""

_NOT_TEXT = re.compile("[\ud800-\udfff\0]")
_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]*\|>")
_METADATA_KEYS = {"id", "audio_file", "transcript_file", "transcript", "text", "duration", "offset", "speaker_id"} | {
    "speaker", "language", "ref_audio_file", "ref_transcript", "ref_text", "ref_transcript_file"
}  # fmt: skip
_RESERVED = ("row", "layout", "declared_seconds", "reference_from")  # what we put into Sample.extra ourselves
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+)://|(file|data):", re.IGNORECASE)
_SCENE = re.compile(r"<\|scene_desc_start\|>\n?(.*?)\n?<\|scene_desc_end\|>", re.DOTALL)
_AUDIO_TAG = re.compile(r"<audio>\n?")

_Spoken = tuple[AudioRef, float | None, str]  # clip, declared duration in seconds, what is said


@dataclass(slots=True)
class Context:
    """One row on its way to a `Sample`: where it stands, what is allowed, and the faults found so far."""

    row: Row
    sample_id: str
    folder: Path
    config: DataConfig
    shared: Shared = field(default_factory=Shared)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def fault(self, code: str, message: str) -> None:
        """Record a fault of this row."""
        self.faults.append(Fault(self.row.source, self.sample_id, code, printable(message), self.row.number))

    def text(self, text: str, what: str, code: str = "empty_text") -> str:
        """Check a text and return it unchanged, byte for byte."""
        if not text.strip():
            self.fault(code, f"{what} is empty")
        if found := _SPECIAL_TOKEN.search(text):
            self.fault("special_token", f"{what} holds the control token {found[0]!r}, which would enter the prompt")
        if _NOT_TEXT.search(text):
            self.fault("bad_unicode", f"{what} holds bytes that are not UTF-8, lone surrogates or NUL")
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
                self.fault("bad_field", f"{name!r} is not a text but {value!r:.60}")
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
        self.fault("bad_field", f"{name!r} is not a number but {value!r:.60}")
        return None

    def path(self, text: str, *also_within: Path) -> str | None:
        """Resolve a path of the manifest, confined to `audio_root` where that is set."""
        try:
            encoded = os.fsencode(text)
        except UnicodeEncodeError:
            encoded = b"\0"
        if b"\0" in encoded:
            self.fault("bad_path", f"{text!r} holds a NUL character or a lone surrogate")
            return None
        joined = os.path.join(self.folder, text)
        place, name = os.path.split(joined)
        path = os.path.join(_real_folder(place), name)
        if name in ("", ".", "..") or os.path.islink(path):
            path = os.path.realpath(joined)
        if self.config.audio_root is None:
            return path
        roots = [_real_folder(str(root)) for root in (self.config.audio_root, *also_within)]
        if not any(path == root or path.startswith(os.path.join(root, "")) for root in roots):
            self.fault("outside_root", f"{text!r} leads to {path}, outside data.audio_root ({roots[0]})")
            return None
        return path

    def audio(self, part: Mapping[str, Any], url_key: str = "audio_url") -> tuple[AudioRef, float | None] | None:
        """The clip an audio part names, and its declared duration in seconds where no segment is meant."""
        duration, offset = self.number(part, "duration"), self.number(part, "offset")
        if duration is not None and duration <= 0:
            self.fault("bad_duration", f"the declared duration {duration:g} s is not above 0")
            return None
        if offset is not None and offset < 0:
            self.fault("bad_offset", f"the offset {offset:g} s is negative")
            return None
        # a duration without offset describes the file; with an offset it cuts a segment out of it
        segment = {} if offset is None else {"offset_seconds": offset, "duration_seconds": duration}
        declared = duration if offset is None else None
        place = self.optional_text(part, url_key)
        if place is None or place == "placeholder":
            data = self._inline(part, url_key)
            return None if data is None else (AudioRef(data=data, **segment), declared)
        if url := _URL.match(place):
            scheme = (url[1] or url[2]).lower()
            if scheme not in ("http", "https"):
                self.fault("url_refused", f"{place!r:.100}: scheme {scheme!r} is refused; give a path")
            elif not self.config.allow_urls:
                self.fault("url_refused", f"{place!r:.100}: URLs are refused; download it, or set data.allow_urls=true")
            else:
                return AudioRef(url=place, **segment), declared
            return None
        path = self.path(place)
        return None if path is None else (self.shared(AudioRef(path=path, **segment)), declared)

    def _inline(self, part: Mapping[str, Any], url_key: str) -> bytes | None:
        text = self.optional_text(part, "raw_audio")
        if text is None:
            self.fault("missing_audio", f"no audio: neither {url_key!r} nor 'raw_audio' is given")
            return None
        if len(text) > MAX_INLINE_BYTES * 4 // 3 + 4:
            self.fault("too_large", f"'raw_audio' exceeds the limit of {MAX_INLINE_BYTES} bytes; put it into a file")
            return None
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            self.fault("bad_base64", f"'raw_audio' is not valid base64: {error}")
            return None


def read_row(context: Context) -> Sample | None:
    """Turn a row into a sample; None, with faults in the context, where it cannot be."""
    row, value = context.row, context.row.value
    if row.problem:
        context.fault(row.code, row.problem)
        return None
    if not isinstance(value, dict):
        context.fault("bad_row", f"a row is an object, found {type(value).__name__}")
        return None
    if value.get("messages") is not None:
        return chatml_sample(context, value)
    if "audio_file" in value:
        return metadata_sample(context, value)
    keys = ", ".join(map(repr, list(value)[:8])) or "none"
    context.fault("unknown_format", f"holds neither 'messages' (ChatML, ms-swift) nor 'audio_file'; its keys: {keys}")
    return None


def metadata_sample(context: Context, value: dict[str, Any]) -> Sample | None:
    """Read one entry of metadata.json, or one wav/txt pair."""
    clips: list[_Spoken] = []
    text = _transcript(context, value, "the transcript", "empty_text", ("transcript", "text"), "transcript_file")
    if (named := context.audio(value, "audio_file")) is not None:
        clips.append((*named, text))
    if context.optional_text(value, "ref_audio_file") is not None:
        keys = ("ref_transcript", "ref_text")
        text = _transcript(context, value, "the reference's text", "no_reference_text", keys, "ref_transcript_file")
        if (named := context.audio({"audio_url": value["ref_audio_file"]})) is not None:
            clips.append((*named, text))
    if context.faults:
        return None
    extra = {key: item for key, item in value.items() if item is not None and key not in _METADATA_KEYS}
    return _sample(context, clips, value, extra, "folder")


def chatml_sample(context: Context, value: dict[str, Any]) -> Sample | None:
    """Read a ChatML row of the original pipeline, a native user/assistant row, or an ms-swift row."""
    messages, misc = value["messages"], value.get("misc")
    if not isinstance(messages, list) or not messages:
        context.fault("bad_row", "'messages' is not a list of messages")
        return None
    if misc is not None and misc == misc and not isinstance(misc, dict):
        context.fault("bad_field", f"'misc' is not an object but {misc!r:.60}")
    misc = misc if isinstance(misc, dict) else {}
    turns = _turns(context, messages, value.get("audios"))
    if context.faults:
        return None
    system, scene = None, None
    if turns[0].role == "system":
        system, scene = _system(context, turns[0])
    body = turns[1:] if turns[0].role == "system" else turns
    roles = [turn.role for turn in body]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        found = ", ".join(turn.role for turn in turns[:12])
        context.fault("wrong_roles", f"expected [system,] user, assistant, ... ending in assistant; found {found}")
        return None
    _check_start_index(context, value, len(messages) - 1)
    clips: list[_Spoken] = []
    for index in range(0, len(body), 2):
        clips += _pair(context, body[index], body[index + 1], misc if index == len(body) - 2 else {})
    if context.faults:
        return None
    extra = {k: item for k, item in misc.items() if item is not None and not k.endswith("_transcript") and k != "id"}
    return _sample(context, [clips[-1], *clips[:-1]], value, extra, "chatml", system, scene)


@dataclass(slots=True)
class _Turn:
    role: str
    where: str
    parts: list[str | tuple[AudioRef, float | None]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def audios(self) -> list[tuple[AudioRef, float | None]]:
        return [part for part in self.parts if not isinstance(part, str)]


def _turns(context: Context, messages: list[Any], audios: Any) -> list[_Turn]:
    turns: list[_Turn] = []
    paths: list[Any] | None = None
    if audios is not None and audios == audios:
        paths = list(audios) if isinstance(audios, list) else [audios]
        contents = [message.get("content") for message in messages if isinstance(message, dict)]
        tags = sum(len(_AUDIO_TAG.findall(content)) for content in contents if isinstance(content, str))
        if tags != len(paths):
            # never pair them up all the same: every later clip would sit under the wrong text
            context.fault("audio_count", f"{tags} <audio> tag(s) in the messages, but {len(paths)} entries in 'audios'")
            return turns
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            context.fault("wrong_roles", f"{where}: role {role!r:.40}; expected system, user or assistant")
            continue
        turns.append(turn := _Turn(role, where))
        content = message.get("content")
        if isinstance(content, str) and paths is not None:
            texts = _AUDIO_TAG.split(content)
            content = [texts[0]]
            for text in texts[1:]:
                content += [{"type": "audio", "audio_url": paths.pop(0)}, text]
        for part in content if isinstance(content, list) else [content]:
            _add_part(context, turn, part)
    return turns


def _add_part(context: Context, turn: _Turn, part: Any) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, str):
        turn.parts.append(part)
    elif kind == "text" and isinstance(part.get("text"), str):
        turn.parts.append(part["text"])
    elif kind == "audio":
        if (clip := context.audio(part)) is not None:
            turn.parts.append(clip)
    elif part is None or kind == "text":
        context.fault("bad_part", f"{turn.where}: holds no text")
    else:
        context.fault("bad_part", f"{turn.where}: a part is a text or has type 'text' or 'audio'; found {part!r:.60}")


def _system(context: Context, turn: _Turn) -> tuple[str | None, str | None]:
    if turn.audios:
        context.fault("bad_part", f"{turn.where}: audio in the system message is not supported; give it as reference")
    text, scene = turn.text, None
    if found := _SCENE.search(text):
        scene = context.text(found[1], "the scene")
        before, after = text[: found.start()].rstrip(), text[found.end() :].strip()
        text = "\n\n".join(filter(None, (before, after)))
    return (context.text(text, "the system message") if text.strip() else None), scene


def _check_start_index(context: Context, value: dict[str, Any], last: int) -> None:
    start = context.number(value, "start_index")
    if start is not None and start > last:
        reason = f"'start_index' {start:g} points past messages[{last}], the last assistant message, which is trained"
        context.fault("bad_start_index", reason)


def _pair(context: Context, user: _Turn, assistant: _Turn, misc: Mapping[str, Any]) -> list[_Spoken]:
    """References of the user's message, then the assistant's clip with the text spoken in it."""
    if len(assistant.audios) != 1:
        found = f"{len(assistant.audios)} audio parts, expected one" if assistant.audios else "holds no audio part"
        context.fault("missing_audio", f"{assistant.where} (assistant): {found}")
        return []
    target = context.optional_text(misc, "target_transcript")
    spoken = target or (assistant.text if assistant.text.strip() else None)
    references: list[_Spoken] = []
    tail = ""
    for part in user.parts:
        if isinstance(part, str):
            tail += part
        else:
            references.append((*part, tail))
            tail = ""
    if len(references) == 1:
        ref, declared, text = references[0]
        if not text and spoken is not None and not tail.startswith(INSTRUCTION) and tail != spoken:
            text, tail = tail, ""  # ms-swift: "<audio>transcript"
        references[0] = (ref, declared, context.optional_text(misc, "ref_transcript") or text)
    asked = tail.removeprefix(INSTRUCTION).removeprefix(" ") if tail.startswith(INSTRUCTION) else tail
    if spoken is None:
        spoken = asked
        if references and asked == tail and tail:
            context.notes.append("target text taken as it stands after the reference audio, without the instruction")
    elif not references and target is None and asked.strip() != spoken.strip():
        reason = f"the user's text {asked!r:.50} and the assistant's text {spoken!r:.50} differ: which one is spoken?"
        context.fault("text_conflict", f"{user.where}: {reason}")
    for _, _, text in references:
        context.text(text, f"{user.where}: the reference's text", "no_reference_text")
    context.text(spoken, f"{assistant.where}: the text spoken in the audio")
    return [*references, (*assistant.audios[0], spoken)]


def _sample(
    context: Context,
    clips: list[_Spoken],
    value: Mapping[str, Any],
    extra: dict[str, Any],
    layout: str,
    system: str | None = None,
    scene: str | None = None,
) -> Sample | None:
    """Build the sample out of (audio, declared duration, text), the target first."""
    audio, _, text = clips[0]
    if any(ref == audio for ref, _, _ in clips[1:]):
        context.fault("target_is_reference", f"the target is its own reference ({audio}): the model would copy it")
    speaker = context.optional_text(value, "speaker", "speaker_id") or _text(extra, "speaker", "speaker_id")
    language = context.optional_text(value, "language") or _text(extra, "language")
    for name, given in (("speaker", speaker), ("language", language)):
        if given is not None and _NOT_TEXT.search(given):
            context.fault("bad_unicode", f"{name!r} holds lone surrogates or NUL")
    if context.faults:
        return None
    one = context.shared
    alike: dict[str, Any] = {key: item for key, item in extra.items() if key not in _RESERVED} | {"layout": layout}
    if any(declared is not None for _, declared, _ in clips):
        alike["declared_seconds"] = tuple(declared for _, declared, _ in clips)
    facts = RowFacts(context.row.number, one.mapping(alike))
    references = tuple(Clip(ref, one(spoken)) for ref, _, spoken in clips[1:])
    system, scene, speaker, language, text = map(one, (system, scene, speaker, language, text))
    return Sample(
        context.sample_id, text or "", audio, references, system, scene, speaker, language, context.row.source, facts
    )


def _text(values: Mapping[str, Any], *names: str) -> str | None:
    return next((values[name] for name in names if isinstance(values.get(name), str) and values[name]), None)


def _transcript(
    context: Context, value: dict[str, Any], what: str, code: str, inline: tuple[str, ...], file_key: str
) -> str:
    """The text given inline or in a file, checked; after a fault what is returned does not matter."""
    if (text := context.optional_text(value, *inline)) is not None:
        return context.text(text, what, code)
    if (name := context.optional_text(value, file_key)) is None:
        context.fault(code, f"{what} is missing: expected {file_key!r} or {' or '.join(map(repr, inline))}")
        return ""
    if (path := context.path(name, context.folder)) is None:
        return ""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_TRANSCRIPT_BYTES:
            context.fault("bad_transcript", f"{path}: not a text file of at most {MAX_TRANSCRIPT_BYTES} bytes")
            return ""
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        context.fault("missing_text", f"{path}: cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        context.fault("bad_unicode", f"{path}: not UTF-8 at byte {error.start}")
    else:
        # the line end closes the file, it is not spoken
        return context.text(re.sub(r"\r?\n\Z", "", text), f"{what} in {path}", code)
    return ""


@lru_cache(maxsize=4096)
def _real_folder(path: str) -> str:
    return os.path.realpath(path)

"""Rows -> `Sample`: one reader per format; every issue of a row goes to the row's context, none is raised."""

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from speechtune.data.row_parser import NOT_TEXT, Context
from speechtune.types import AudioRef, Clip, Sample

INSTRUCTION = "Please generate speech for given text in reference audio's voice:"
"""What the original pipeline writes before the target text in the user's message."""
MAX_TRANSCRIPT_BYTES = 2**20
"""Largest transcript file read, 1 MiB."""


_SCENE = re.compile(r"<\|scene_desc_start\|>\n?(.*?)\n?<\|scene_desc_end\|>", re.DOTALL)
_AUDIO_TAG = re.compile(r"<audio>\n?")

_Spoken = tuple[AudioRef, float | None, str]  # clip, declared duration in seconds, what is said


def read_row(context: Context) -> Sample | None:
    """Turn a row into a sample; None, with issues in the context, where it cannot be."""
    value = context.row.value
    if value.get("messages") is not None:
        return chatml_sample(context, value)
    if "audio_file" in value:
        return metadata_sample(context, value)
    keys = ", ".join(map(repr, list(value)[:8])) or "none"
    context.issue("unknown_format", f"holds neither 'messages' (ChatML, ms-swift) nor 'audio_file'; its keys: {keys}")
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
    if context.issues:
        return None
    sample = _sample(context, clips, value)
    return replace(sample, borrows_reference=True) if sample is not None and not sample.references else sample


def chatml_sample(context: Context, value: dict[str, Any]) -> Sample | None:
    """Read a ChatML row of the original pipeline, a native user/assistant row, or an ms-swift row."""
    messages, misc = value["messages"], value.get("misc")
    if not isinstance(messages, list) or not messages:
        context.issue("bad_row", "'messages' is not a list of messages")
        return None
    if misc is not None and misc == misc and not isinstance(misc, dict):
        context.issue("bad_field", f"'misc' is not an object but {misc!r:.60}")
    misc = misc if isinstance(misc, dict) else {}
    turns = _turns(context, messages, value.get("audios"))
    if context.issues:
        return None
    system, scene = None, None
    if turns[0].role == "system":
        system, scene = _system(context, turns[0])
    body = turns[1:] if turns[0].role == "system" else turns
    roles = [turn.role for turn in body]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        given = ", ".join(turn.role for turn in turns[:12])
        context.issue("wrong_roles", f"expected [system,] user, assistant, ... ending in assistant; found {given}")
        return None
    _check_start_index(context, value, len(messages) - 1)
    clips: list[_Spoken] = []
    for index in range(0, len(body), 2):
        clips += _pair(context, body[index], body[index + 1], misc if index == len(body) - 2 else {})
    if context.issues:
        return None
    return _sample(context, [clips[-1], *clips[:-1]], value, misc, system, scene)


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
            context.issue("audio_count", f"{tags} <audio> tag(s) in the messages, but {len(paths)} entries in 'audios'")
            return turns
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            context.issue("wrong_roles", f"{where}: role {role!r:.40}; expected system, user or assistant")
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
        context.issue("bad_part", f"{turn.where}: holds no text")
    else:
        context.issue("bad_part", f"{turn.where}: a part is a text or has type 'text' or 'audio'; found {part!r:.60}")


def _system(context: Context, turn: _Turn) -> tuple[str | None, str | None]:
    if turn.audios:
        context.issue("bad_part", f"{turn.where}: audio in the system message is not supported; give it as reference")
    text, scene = turn.text, None
    if match := _SCENE.search(text):
        scene = context.text(match[1], "the scene")
        before, after = text[: match.start()].rstrip(), text[match.end() :].strip()
        text = "\n\n".join(filter(None, (before, after)))
    return (context.text(text, "the system message") if text.strip() else None), scene


def _check_start_index(context: Context, value: dict[str, Any], last: int) -> None:
    start = context.number(value, "start_index")
    if start is not None and start > last:
        reason = f"'start_index' {start:g} points past messages[{last}], the last assistant message, which is trained"
        context.issue("bad_start_index", reason)


def _pair(context: Context, user: _Turn, assistant: _Turn, misc: Mapping[str, Any]) -> list[_Spoken]:
    """References of the user's message, then the assistant's clip with the text spoken in it."""
    if len(assistant.audios) != 1:
        given = f"{len(assistant.audios)} audio parts, expected one" if assistant.audios else "holds no audio part"
        context.issue("missing_audio", f"{assistant.where} (assistant): {given}")
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
        context.issue("text_conflict", f"{user.where}: {reason}")
    for _, _, text in references:
        context.text(text, f"{user.where}: the reference's text", "no_reference_text")
    context.text(spoken, f"{assistant.where}: the text spoken in the audio")
    return [*references, (*assistant.audios[0], spoken)]


def _sample(
    context: Context,
    clips: list[_Spoken],
    value: Mapping[str, Any],
    misc: Mapping[str, Any] | None = None,
    system: str | None = None,
    scene: str | None = None,
) -> Sample | None:
    """Build the sample out of (audio, declared duration, text), the target first."""
    audio, _, text = clips[0]
    if any(ref == audio for ref, _, _ in clips[1:]):
        context.issue("target_is_reference", f"the target is its own reference ({audio}): the model would copy it")
    speaker = context.optional_text(value, "speaker", "speaker_id") or _text(misc or {}, "speaker", "speaker_id")
    language = context.optional_text(value, "language") or _text(misc or {}, "language")
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
    return Sample(name, text or "", audio, references, system, scene, speaker, language, source, row, seconds)


def _text(values: Mapping[str, Any], *names: str) -> str | None:
    return next((values[name] for name in names if isinstance(values.get(name), str) and values[name]), None)


def _transcript(
    context: Context, value: dict[str, Any], what: str, code: str, inline: tuple[str, ...], file_key: str
) -> str:
    """The text given inline or in a file, checked; after an issue what is returned does not matter."""
    if (text := context.optional_text(value, *inline)) is not None:
        return context.text(text, what, code)
    if (name := context.optional_text(value, file_key)) is None:
        context.issue(code, f"{what} is missing: expected {file_key!r} or {' or '.join(map(repr, inline))}")
        return ""
    if (path := context.path(name, context.folder)) is None:
        return ""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_TRANSCRIPT_BYTES:
            context.issue("bad_transcript", f"{path}: not a text file of at most {MAX_TRANSCRIPT_BYTES} bytes")
            return ""
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        context.issue("missing_text", f"{path}: cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        context.issue("bad_unicode", f"{path}: not UTF-8 at byte {error.start}")
    else:
        # the line end closes the file, it is not spoken
        return context.text(re.sub(r"\r?\n\Z", "", text), f"{what} in {path}", code)
    return ""

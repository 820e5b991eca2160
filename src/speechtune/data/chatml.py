"""Rows of chats -> `Sample`; every issue of a row goes to the row's context, none is raised."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from speechtune.data.row_parser import AUDIO_PARTS, Context, Spoken, first_name, make_sample
from speechtune.data.text_checks import alike, plain
from speechtune.types import AudioRef, Sample

INSTRUCTION = "Please generate speech for given text in reference audio's voice:"
"""What the original pipeline writes before the target text in the user's message."""
_SCENE = re.compile(r"<\|scene_desc_start\|>\n?(.*?)\n?<\|scene_desc_end\|>", re.DOTALL)
_AUDIO_TAG = re.compile(r"<audio>\n?")
_AUDIO_KINDS = ("audio", "audio_url", "input_audio")
_ROLES = {"human": "user", "gpt": "assistant"}


def chat_messages(value: Mapping[str, Any]) -> Any:
    """The messages of a row, also those of a ShareGPT row or of one with query and response; None without any."""
    if (messages := value.get("messages")) is not None:
        return messages
    if isinstance(turns := value.get("conversations"), list):
        messages = [
            {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": turn.get("value")}
            if isinstance(turn, dict) and (role := turn.get("from")) is not None
            else turn
            for turn in turns
        ]
    elif "response" in value and "query" in value:
        history = value.get("history")
        pairs = [*(history if isinstance(history, list) else ()), (value.get("query"), value["response"])]
        sides = [side for pair in pairs for side in (pair if isinstance(pair, list | tuple) else [pair])]
        messages = [{"role": ("user", "assistant")[n % 2], "content": side} for n, side in enumerate(sides)]
    if messages and value.get("system"):
        messages.insert(0, {"role": "system", "content": value["system"]})
    return messages


def chatml_sample(context: Context, value: Mapping[str, Any]) -> Sample | None:
    """Read a row with messages, by audio parts or by `<audio>` tags, see `chat_messages`."""
    messages, misc = chat_messages(value), value.get("misc")
    if not isinstance(messages, list) or not messages:
        context.issue("bad_row", "'messages' is not a list of messages")
        return None
    if misc is not None and misc == misc and not isinstance(misc, dict):
        context.issue("bad_field", f"'misc' is not an object but {misc!r:.60}")
    misc = misc if isinstance(misc, dict) else {}
    turns = _turns(context, messages, value)
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
    clips: list[Spoken] = []
    for index in range(0, len(body), 2):
        clips += _pair(context, body[index], body[index + 1], misc if index == len(body) - 2 else {})
    if context.issues:
        return None
    return make_sample(context, [clips[-1], *clips[:-1]], value, misc, system, scene)


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


def _turns(context: Context, messages: list[Any], value: Mapping[str, Any]) -> list[_Turn]:
    turns: list[_Turn] = []
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    tags = sum(len(_AUDIO_TAG.findall(content)) for content in contents if isinstance(content, str))
    name = first_name(value, ("audios", "audio") if tags else ("audios",))
    audios = value[name] if name else []
    paths = list(audios) if isinstance(audios, list) else [audios]
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
        if isinstance(content, str) and tags:
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
    elif kind in ("text", None) and isinstance(part, dict) and isinstance(part.get("text"), str):
        turn.parts.append(part["text"])
    elif kind in _AUDIO_KINDS or (kind is None and isinstance(part, dict) and first_name(part, AUDIO_PARTS)):
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


def _check_start_index(context: Context, value: Mapping[str, Any], last: int) -> None:
    start = context.number(value, "start_index")
    if start is not None and start > last:
        reason = f"'start_index' {start:g} points past messages[{last}], the last assistant message, which is trained"
        context.issue("bad_start_index", reason)


def _pair(context: Context, user: _Turn, assistant: _Turn, misc: Mapping[str, Any]) -> list[Spoken]:
    """References of the user's message, then the assistant's clip with the text spoken in it."""
    if len(assistant.audios) != 1:
        given = f"{len(assistant.audios)} audio parts, expected one" if assistant.audios else "holds no audio part"
        context.issue("missing_audio", f"{assistant.where} (assistant): {given}")
        return []
    target = context.optional_text(misc, "target_transcript")
    spoken = target or (assistant.text if assistant.text.strip() else None)
    if target and assistant.text.strip() and plain(target) != plain(assistant.text):
        if not alike(target, assistant.text):
            reason = f"the assistant's text {assistant.text!r:.50} and target_transcript {target!r:.50} differ"
            context.issue("text_conflict", f"{assistant.where}: {reason}: which one is spoken?")
        context.notes.append("assistant's text differs from target_transcript, which is taken")
    references: list[Spoken] = []
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

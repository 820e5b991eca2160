"""Rows -> `Sample`, whatever their keys: chats, and plain rows of a clip and its text; issues go to the context."""

import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from speechtune.data.chatml import chat_messages, chatml_sample
from speechtune.data.row_parser import Context, Spoken, first_name, make_sample
from speechtune.types import Sample

AUDIO = (
    "audio_file", "audio", "audio_filepath", "audio_path", "file_name", "filename", "wav", "wav_path", "wav_file",
    "wav_filename", "path", "file",
)  # fmt: skip
TEXT = ("normalized_text", "text_normalized", "transcript", "text", "transcription", "sentence")
REFERENCE_AUDIO = ("ref_audio_file", "ref_audio", "reference", "reference_audio", "ref_wav", "prompt_wav")
REFERENCE_TEXT = ("ref_transcript", "ref_text", "reference_text", "prompt_text")
"""Names that fields of a plain row go by, in the order they are looked for: what is spoken before what is written."""
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".au")
"""Files that are taken for clips that can be read."""
OTHER_SUFFIXES = (".m4a", ".aac", ".mp4", ".wma", ".webm", ".amr")
"""Files that are taken for clips that must be converted first."""
MAX_TRANSCRIPT_BYTES = 2**20
"""Largest transcript file read, 1 MiB."""
_TIMED_LINE = re.compile(r"\s*[\d.]+\s+[\d.]+\s+\S+\s*")


def read_row(context: Context) -> Sample | None:
    """Turn a row into a sample; None, with issues in the context, where it cannot be."""
    value = context.row.value
    if chat_messages(value) is not None:
        return chatml_sample(context, value)
    if not value.keys().isdisjoint(AUDIO):
        return plain_sample(context, value)
    context.issue("unknown_format", f"no audio is named; {advice(value)}")
    return None


def advice(value: Mapping[str, Any]) -> str:
    """Which keys or columns to rename so that a row can be read."""
    known = {"audio": AUDIO, "text": (*TEXT, "transcript_file")}
    texts = {key: item for key, item in value.items() if isinstance(item, str) and not is_clip(item)}
    clips = [key for key, item in value.items() if is_clip(item) or (isinstance(item, dict) and "bytes" in item)]
    longest = sorted(texts, key=lambda key: -len(texts[key]))
    renamed = [
        f"{found[0]!r} to {name!r}"
        for name, found in (("audio", clips), ("text", longest))
        if found and value.keys().isdisjoint(known[name])
    ]
    keys = ", ".join(map(repr, list(value)[:8])) or "none"
    what = f"rename {' and '.join(renamed)}" if renamed else "expected 'messages', or 'audio' and 'text'"
    if lists := [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]:
        what = f"rename {lists[0]!r} to 'samples' if it holds the rows"
    elif value and all(isinstance(item, dict) for item in value.values()):
        what = "write its values as a list if they are the rows"
    return f"{what}; its keys: {keys}"


def is_clip(value: object) -> bool:
    """Whether a value ends as the name of a file with audio does."""
    return isinstance(value, str) and value.lower().endswith(AUDIO_SUFFIXES + OTHER_SUFFIXES)


def plain_sample(context: Context, value: Mapping[str, Any]) -> Sample | None:
    """Read a row that names a clip and its text, and may name a reference."""
    clips: list[Spoken] = []
    text = _transcript(context, value, "the transcript", TEXT, "transcript_file")
    if text is None and not context.issues:
        reason = f"the transcript is missing: expected {'transcript_file'!r} or 'text'; {advice(value)}"
        context.issue("empty_text", reason)
    if (named := context.audio(value, AUDIO)) is not None:
        clips.append((*named, text or ""))
    if (name := first_name(value, REFERENCE_AUDIO)) is not None:
        # a reference without text gets that of the row whose clip it is, see `manifest.name_references`
        spoken = _transcript(context, value, "the reference's text", REFERENCE_TEXT, "ref_transcript_file")
        if (named := context.audio({"audio": value[name]})) is not None:
            clips.append((*named, spoken or ""))
    if context.issues:
        return None
    return make_sample(context, clips, value, borrows=len(clips) == 1)


def _transcript(
    context: Context, value: Mapping[str, Any], what: str, inline: Sequence[str], file_key: str
) -> str | None:
    """The text given inline or in a file, checked; None where neither is; after an issue it does not matter."""
    code = "no_reference_text" if inline is REFERENCE_TEXT else "empty_text"
    if (text := context.optional_text(value, *inline)) is not None:
        return context.text(text, what, code)
    if (name := context.optional_text(value, file_key)) is None:
        return None
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
        context.issue("bad_unicode", f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8")
    else:
        if path.endswith(".lab") and text.strip() and all(map(_TIMED_LINE.fullmatch, text.strip().split("\n"))):
            context.issue("bad_transcript", f"{path}: holds times and labels; write the text that is spoken")
        # the line end closes the file, it is not spoken
        return context.text(re.sub(r"\r?\n\Z", "", text), f"{what} in {path}", code)
    return ""

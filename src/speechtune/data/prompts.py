"""Rows of a file that ask for something: what is to be spoken and in whose voice, or which recording is to be heard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from speechtune.audio import InvalidAudioError, audio_info
from speechtune.config import DataConfig
from speechtune.data.chatml import read_row
from speechtune.data.row_parser import Context
from speechtune.data.rows import Row, iterate_rows
from speechtune.errors import Issue, ManifestError, printable
from speechtune.types import AudioRef, Clip, Sample


def read_prompts(path: Path, config: DataConfig) -> list[Sample]:
    """Read rows {"id"?, "text", "reference"?, "reference_text"?, "system"?, "scene"?}, or a training manifest's rows.

    Raises:
        ManifestError: every issue, with file and line.
    """
    return _read(path, config, "text", _prompt)


def read_recordings(path: Path, config: DataConfig) -> list[Sample]:
    """Read rows {"audio", "text"?, "id"?, "offset"?, "duration"?}, or a training manifest's rows with their targets.

    Raises:
        ManifestError: every issue, with file and line.
    """
    return _read(path, config, None, _recording)


def _read(path: Path, config: DataConfig, key: str | None, read_plain: Callable[..., Sample]) -> list[Sample]:
    folder = path if path.is_dir() else path.parent
    samples, issues = [], []
    for row in iterate_rows(path):
        context = Context(row, f"{printable(path.stem)}-{row.number}", folder, config)
        value = row.value
        plain = isinstance(value, dict) and not {"messages", "audio_file"} & value.keys() and key in {None, *value}
        sample = read_plain(context, value) if plain else read_row(context)
        issues += context.issues
        if sample is not None and not context.issues:
            samples.append(sample)
    if issues or not samples:
        lines = "\n".join(f"  {issue}" for issue in issues) or "  holds no rows"
        raise ManifestError(f"{path}: {len(issues)} issue(s) in its rows\n{lines}", tuple(issues))
    return samples


def _recording(context: Context, value: dict[str, Any]) -> Sample:
    text = context.optional_text(value, "text")
    if text is not None:
        context.text(text, "the text")
    named = context.audio(value, "audio")
    name, row = context.optional_text(value, "id"), context.row
    return Sample(
        name or context.sample_id,
        text or "",
        named[0] if named else None,
        source=row.source,
        row=row.number,
        declared_seconds=(named[1],) if named and named[1] is not None else (),
    )


def _prompt(context: Context, value: dict[str, Any]) -> Sample:
    text = context.text(context.optional_text(value, "text") or "", "the text")
    references = []
    if value.get("reference"):
        clip = context.audio(value, "reference")
        spoken = context.text(context.optional_text(value, "reference_text") or "", "the reference's text")
        if clip is not None:
            references.append(Clip(clip[0], spoken))
    return Sample(
        id=context.optional_text(value, "id") or context.sample_id,
        text=text,
        audio=None,
        references=tuple(references),
        system=context.optional_text(value, "system"),
        scene=context.optional_text(value, "scene"),
        source=context.row.source,
    )


FIELDS = "utt|prompt_text|prompt_wav|target_text, with |target_wav where there is a recording of the target"
FOLDERS = frozenset({"en", "zh"})
"""Folders of seed-tts-eval's test sets, named by language."""


def read_seed_list(path: Path, config: DataConfig | None = None, language: str | None = None) -> list[Sample]:
    """Read a list; wavs are named relative to it. Unlike the original's scripts it leaves out no missing wav.

    Args:
        path: the list, such as `en/meta.lst`.
        config: `audio_root` confines the wavs.
        language: of the texts; None takes the folder's name where that is "en" or "zh".

    Raises:
        ManifestError: every issue, with file and line: malformed lines, doubled ids, wavs that cannot be opened.
    """
    config = config or DataConfig()
    folder = path.resolve().parent
    if language is None and folder.name in FOLDERS:
        language = folder.name
    try:
        lines = path.read_bytes().decode("utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None
    samples: dict[str, Sample] = {}
    issues: list[Issue] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        context = Context(Row(number, f"{path}:{number}"), f"{printable(path.stem)}-{number}", folder, config)
        sample = _sample(context, line.strip(), language)
        if sample is not None and sample.id in samples:
            context.issue("doubled_id", f"the id {sample.id!r} stands in {samples[sample.id].source} already")
        issues += context.issues
        if sample is not None and not context.issues:
            samples[sample.id] = sample
    if issues or not samples:
        listed = "\n".join(f"  {issue}" for issue in issues) or "  holds no lines"
        raise ManifestError(f"{path}: {len(issues)} issue(s) in its lines\n{listed}", tuple(issues))
    return list(samples.values())


def _sample(context: Context, line: str, language: str | None) -> Sample | None:
    fields = [part.strip() for part in line.split("|")]
    if len(fields) not in (4, 5) or not fields[0]:
        context.issue("bad_row", f"{len(fields)} fields; expected {FIELDS}")
        return None
    name, prompt_text, prompt_wav, text = fields[:4]
    reference = _clip(context, prompt_wav)
    target = _clip(context, fields[4]) if len(fields) == 5 else None
    context.text(prompt_text, "the prompt's text")
    context.text(text, "the target's text")
    if context.issues or reference is None:
        return None
    clips = (Clip(reference, prompt_text),)
    row = context.row
    return Sample(name, text, target, clips, language=language, source=row.source, row=row.number)


def _clip(context: Context, place: str) -> AudioRef | None:
    path = context.path(place)
    if path is None:
        return None
    ref = AudioRef(path)
    try:
        audio_info(ref)
    except InvalidAudioError as issue:
        context.issue(issue.code, str(issue))
    return ref

"""Rows of a file that ask for something: what is to be spoken and in whose voice, or which recording is to be heard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from speechtune.config import DataConfig
from speechtune.errors import ManifestError
from speechtune.families.base import Clip, Sample
from speechtune.readers import Context, read_row
from speechtune.rows import iterate_rows, printable


def read_prompts(path: Path, config: DataConfig) -> list[Sample]:
    """Read rows {"id"?, "text", "reference"?, "reference_text"?, "system"?, "scene"?}, or a training manifest's rows.

    Raises:
        ManifestError: every fault, with file and line.
    """
    return _read(path, config, "text", _prompt)


def read_recordings(path: Path, config: DataConfig) -> list[Sample]:
    """Read rows {"audio", "text"?, "id"?, "offset"?, "duration"?}, or a training manifest's rows with their targets.

    Raises:
        ManifestError: every fault, with file and line.
    """
    return _read(path, config, None, _recording)


def _read(path: Path, config: DataConfig, key: str | None, read_plain: Callable[..., Sample]) -> list[Sample]:
    folder = path if path.is_dir() else path.parent
    samples, faults = [], []
    for row in iterate_rows(path):
        context = Context(row, f"{printable(path.stem)}-{row.number}", folder, config)
        value = row.value
        plain = isinstance(value, dict) and not {"messages", "audio_file"} & value.keys() and key in {None, *value}
        sample = read_plain(context, value) if plain else read_row(context)
        faults += context.faults
        if sample is not None and not context.faults:
            samples.append(sample)
    if faults or not samples:
        lines = "\n".join(f"  {fault}" for fault in faults) or "  holds no rows"
        raise ManifestError(f"{path}: {len(faults)} fault(s) in its rows\n{lines}", tuple(faults))
    return samples


def _recording(context: Context, value: dict[str, Any]) -> Sample:
    text = context.optional_text(value, "text")
    if text is not None:
        context.text(text, "the text")
    named = context.audio(value, "audio")
    name, row = context.optional_text(value, "id"), context.row
    extra = {"row": row.number} | ({"declared_seconds": (named[1],)} if named and named[1] is not None else {})
    return Sample(name or context.sample_id, text or "", named[0] if named else None, source=row.source, extra=extra)


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

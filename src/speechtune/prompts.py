"""Prompts from a file: what is to be spoken, and in whose voice; no target audio is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from speechtune.config import DataConfig
from speechtune.errors import ManifestError
from speechtune.families.base import Clip, Sample
from speechtune.readers import Context, read_row
from speechtune.rows import iterate_rows


def read_prompts(path: Path, config: DataConfig) -> list[Sample]:
    """Read rows {"id"?, "text", "reference"?, "reference_text"?, "system"?, "scene"?}, or a training manifest's rows.

    Raises:
        ManifestError: every fault, with file and line.
    """
    folder = path if path.is_dir() else path.parent
    prompts, faults = [], []
    for row in iterate_rows(path):
        context = Context(row, f"{path.stem}-{row.number}", folder, config)
        value = row.value
        plain = isinstance(value, dict) and "text" in value and "messages" not in value and "audio_file" not in value
        sample = _prompt(context, value) if plain else read_row(context)
        faults += context.faults
        if sample is not None and not context.faults:
            prompts.append(sample)
    if faults or not prompts:
        lines = "\n".join(f"  {fault}" for fault in faults) or "  holds no rows"
        raise ManifestError(f"{path}: {len(faults)} fault(s) in the prompts\n{lines}", tuple(faults))
    return prompts


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

"""The verb `generate`: speak a text, or all texts of a manifest."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from speechtune.commands import check_output, print_result, require_words
from speechtune.config import DataConfig
from speechtune.data.prompts import read_prompts
from speechtune.errors import ConfigError
from speechtune.families import family_part
from speechtune.inference.generate import answer, check_references, provenance, write_output, write_outputs
from speechtune.inference.load import NO_ADAPTER, load_model, model_config, open_adapter
from speechtune.lora.prompts import as_trained
from speechtune.types import AudioRef, Clip, GenerationOptions, Sample

log = logging.getLogger("speechtune")

BASE_FAMILY = "higgs_audio_v2"  # whose small model speaks where none is named
SOUND_FILES = {".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a"}


def run_generate(
    manifest: Path | None,
    text: str | None,
    reference: Path | None,
    reference_text: str | None,
    out: Path,
    *,
    system: str | None,
    scene: str | None,
    model: str | None,
    model_options: Mapping[str, str] | None = None,
    adapter: Path | None,
    strength: float | None,
    batch_size: int,
    cache_dir: Path,
    as_json: bool,
    **generation_options: Any,
) -> int:
    """Speak into one wav or, with a manifest, into a folder of them; print what was written; 0."""
    if (manifest is None) == (text is None):
        raise ConfigError("name a manifest, or one text with --text")
    for flag, given_text in (("--text", text), ("--reference-text", reference_text)):
        require_words(flag, given_text)
    if (reference is None) != (reference_text is None):
        raise ConfigError("--reference and --reference-text belong together")
    suffix = out.suffix.lower()
    if suffix != ".wav" if manifest is None else suffix in SOUND_FILES:
        raise ConfigError(f"--out {out}: generate writes wav: name a .wav file for --text, or a folder for a manifest")
    check_output(out, folder=manifest is not None)
    if text is None:
        assert manifest is not None
        if reference is not None:
            raise ConfigError("--reference goes with --text; a manifest names its own references")
        given: dict[str, Any] = {"system": system, "scene": scene}
        given = {name: value for name, value in given.items() if value is not None}
        samples = [replace(sample, **given) for sample in read_prompts(manifest, DataConfig())]
    else:
        clips = (Clip(AudioRef(str(reference)), reference_text or ""),) if reference else ()
        samples = [Sample(out.stem, text, None, clips, system, scene, source="the command line")]
    check_references(samples)
    options = GenerationOptions(**generation_options)
    if strength is not None and adapter is None:
        raise ConfigError(NO_ADAPTER)
    stored = open_adapter(adapter, 1.0 if strength is None else strength) if adapter else None
    if model is None and stored is None:
        model, model_options = speaking_base(model_options)
    config = model_config(model, model_options, stored)
    samples = as_trained(samples, stored.directory if stored else Path(config.model.path))
    family, loaded = load_model(config, stored, ability="speak")
    origin = provenance(config, stored)
    outputs = answer(family, loaded, samples, options, cache_dir, batch_size=batch_size)
    rows = write_outputs(outputs, out, origin) if manifest else [write_output(one, out, origin) for one in outputs]
    return print_result({"outputs": rows}, [f"outputs: {row}" for row in rows], as_json)


def speaking_base(options: Mapping[str, str] | None) -> tuple[str, dict[str, str]]:
    """The small model that ships with speechtune and speaks, for a first try, with its options."""
    shipped = family_part(BASE_FAMILY, "tiny").speaking_base()
    path = shipped.pop("path")
    log.info("no --model and no --adapter: the small English model that comes with speechtune speaks")
    return path, {**shipped, **(options or {})}

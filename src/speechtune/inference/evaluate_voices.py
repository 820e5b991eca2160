"""The verb `evaluate` for voices: a base and adapters speak the same prompts, and are measured side by side."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speechtune.audio import audio_info, file_name, read_audio, write_wav
from speechtune.config import DataConfig
from speechtune.data.manifest import load_samples
from speechtune.data.prompts import read_seed_list
from speechtune.errors import ConfigError
from speechtune.family import Family, Scorers
from speechtune.inference.answer_file import AnswerFile, answerer
from speechtune.inference.generate import answer, provenance
from speechtune.inference.load import load_model, model_config, open_adapter
from speechtune.lora.files import StoredAdapter
from speechtune.tasks.voice_cloning.comparison import Comparison, compare, write_comparison
from speechtune.tasks.voice_cloning.measures import VoiceRow, measure
from speechtune.types import Audio, AudioRef, GenerationOptions, Output, Sample

log = logging.getLogger("speechtune")

BASE = "base"
OUTPUTS_NAME = "outputs.jsonl"
CHARACTERS_PER_SECOND = 15  # of read speech, roughly
CHUNK = 64  # recordings in memory while they are scored


@dataclass(frozen=True, slots=True)
class System:
    """Who speaks: a base, or a base with an adapter on it."""

    name: str
    model: str | None
    adapter: StoredAdapter | None


def systems_of(model: str | None, adapters: Sequence[Path], include_base: bool) -> list[System]:
    """The systems to compare, the base first.

    Raises:
        ConfigError: nothing to evaluate, or two adapters of the same name.
    """
    systems = [System("/".join(adapter.resolve().parts[-2:]), model, open_adapter(adapter)) for adapter in adapters]
    if include_base or not adapters:
        base = model or model_config(None, None, systems[0].adapter if systems else None).model.path
        systems.insert(0, System(BASE, base, None))
    names = [system.name for system in systems]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled:
        raise ConfigError(f"two of the adapters are called {doubled}: name each once")
    return systems


def read_voice_prompts(data: Path) -> list[Sample]:
    """Prompts with references and, where they have one, the recording of the target: a manifest or a seed-tts list."""
    return read_seed_list(data) if data.suffix == ".lst" else load_samples(data, DataConfig())


def speak_all(
    system: System,
    samples: Sequence[Sample],
    directory: Path,
    options: GenerationOptions,
    *,
    codec: str | None,
    cache_dir: Path,
    batch_size: int,
) -> Family:
    """Let a system speak all prompts into wavs of `directory`; what is there from the same system is not made again."""
    config = model_config(system.model, codec, system.adapter)
    family, loaded = load_model(config, system.adapter, ability="speak")
    identity = answerer(config, family, system.adapter) | {
        "options": str(options),
        "model": config.model.model_dump(mode="json"),
    }
    known = AnswerFile(directory / OUTPUTS_NAME, identity)
    asked = sorted((sample for sample in samples if not _is_made(known, sample, directory)), key=_prompt_length)
    by_id = {sample.id: sample for sample in asked}
    origin = provenance(config, system.adapter)
    batches = answer(family, loaded, asked, options, cache_dir, batch_size=batch_size) if asked else ()
    for output in batches:
        if output.audio is not None and len(output.audio.samples):
            write_wav(_wav(directory, output.sample_id), output.audio, origin)
        row = {"stopped": output.stopped, "tokens": output.num_tokens}
        known.add(_key(by_id[output.sample_id]), output.sample_id, json.dumps(row))
    return family


def measure_all(samples: Sequence[Sample], directory: Path, family: Family, scorers: Scorers) -> list[VoiceRow]:
    """Score what lies on disk, so that a resumed evaluation gives the same figures as one that was not stopped."""
    said = _rows(directory / OUTPUTS_NAME)
    rows: list[VoiceRow] = []
    for start in range(0, len(samples), CHUNK):
        chosen = samples[start : start + CHUNK]
        outputs = [_output(sample, said[_key(sample)], directory, family.sampling_rate) for sample in chosen]
        voices = [sample.references[0].audio if sample.references else sample.audio for sample in chosen]
        references = [_read(ref if scorers.speaker else None, family.sampling_rate) for ref in voices]
        targets = [_read(sample.audio, family.sampling_rate) for sample in chosen]
        found = measure(chosen, outputs, references, targets, scorers)
        rows += [replace(row, audio=str(_wav(directory, row.id))) for row in found]
        log.info("%d/%d scored", len(rows), len(samples))
    return rows


def evaluate_voice(
    data: Path,
    systems: Sequence[System],
    out: Path,
    scorers: Scorers,
    *,
    codec: str | None = None,
    cache_dir: Path = Path("speechtune-cache"),
    batch_size: int = 8,
    options: GenerationOptions | None = None,
) -> Comparison:
    """Speak, score and compare; writes wavs per system, metrics.json and utterances.jsonl.

    Args:
        data: manifest or list of prompts.
        systems: at least one; the first is what the others are compared with.
        out: where everything goes.
        scorers: what is measured besides stops and durations.
        codec: the base's codec; None takes the one the adapter or the family names.
        cache_dir: folder of the encoded references.
        batch_size: prompts at a time.
        options: how to sample.

    Raises:
        ConfigError: a model that does not speak.
        ManifestError: issues in the data.
    """
    samples = read_voice_prompts(data)
    options = options or GenerationOptions()
    found = {}
    for system in systems:
        directory = out / file_name(system.name)
        log.info("%s speaks %d prompts", system.name, len(samples))
        settings: dict[str, Any] = {"codec": codec, "cache_dir": cache_dir, "batch_size": batch_size}
        family = speak_all(system, samples, directory, options, **settings)
        found[system.name] = measure_all(samples, directory, family, scorers)
    comparison = compare(found, scorers)
    write_comparison(comparison, out)
    return comparison


def _key(sample: Sample) -> str:
    references = [[str(clip.audio), clip.text] for clip in sample.references]
    asked = [sample.id, sample.text, sample.system, sample.scene, references]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]


def _prompt_length(sample: Sample) -> float:
    """Roughly how long a prompt is, in seconds of speech: like beside like wastes no padding."""
    heard = sum(audio_info(clip.audio).duration_seconds for clip in sample.references)
    return heard + (len(sample.text) + sum(len(clip.text) for clip in sample.references)) / CHARACTERS_PER_SECOND


def _wav(directory: Path, sample_id: str) -> Path:
    return directory / f"{file_name(sample_id)}.wav"


def _is_made(known: AnswerFile, sample: Sample, directory: Path) -> bool:
    row = known.texts.get(_key(sample))
    return row is not None and (_wav(directory, sample.id).is_file() or not json.loads(row)["tokens"])


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return {row["key"]: json.loads(row["text"]) for row in rows}


def _output(sample: Sample, row: dict[str, Any], directory: Path, rate: int) -> Output:
    path = _wav(directory, sample.id)
    audio = read_audio(AudioRef(str(path)), rate) if path.is_file() else None
    return Output(sample.id, audio, None, row["stopped"], row["tokens"])


def _read(ref: AudioRef | None, rate: int) -> Audio | None:
    return None if ref is None else read_audio(ref, rate)

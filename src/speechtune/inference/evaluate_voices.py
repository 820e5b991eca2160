"""Evaluate voices: a base and adapters speak the same prompts, and are measured side by side."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from speechtune.audio import audio_info, file_name, read_audio, write_wav
from speechtune.config import DataConfig
from speechtune.data.manifest import load_samples
from speechtune.data.prompts import read_seed_list
from speechtune.errors import ConfigError
from speechtune.family import Family, Scorers
from speechtune.inference.answer_file import AnswerFile, model_identity
from speechtune.inference.generate import answer, check_references, provenance
from speechtune.inference.load import NO_ADAPTER, load_model, model_config, open_adapter
from speechtune.lora.files import StoredAdapter
from speechtune.lora.prompts import as_trained
from speechtune.storage.lock import locked
from speechtune.tasks.results import write_results
from speechtune.tasks.voice_cloning.comparison import Comparison, compare
from speechtune.tasks.voice_cloning.measures import VoiceRow, measure
from speechtune.types import Audio, AudioRef, GenerationOptions, Output, Sample

log = logging.getLogger("speechtune")

BASE = "base"
OUTPUTS_NAME = "outputs.jsonl"
CHARACTERS_PER_SECOND = 15  # of read speech, roughly
CHUNK = 64  # recordings in memory while they are scored


@dataclass(frozen=True, slots=True)
class System:
    """A base, or a base with an adapter on it, by name."""

    name: str
    model: str | None
    adapter: StoredAdapter | None


def systems_of(
    model: str | None, adapters: Sequence[Path], include_base: bool, strengths: Sequence[float] = ()
) -> list[System]:
    """The systems to compare, the base first; with `strengths` each adapter at each of them, as "name@strength".

    Raises ConfigError: nothing to evaluate, two adapters of the same name, or strengths of no adapter.
    """
    if strengths and not adapters:
        raise ConfigError(NO_ADAPTER)
    systems = []
    for adapter in adapters:
        name, stored = "/".join(adapter.resolve().parts[-2:]), open_adapter(adapter)
        systems += [System(f"{name}@{s:g}", model, replace(stored, strength=s)) for s in strengths]
        systems += [] if strengths else [System(name, model, stored)]
    if include_base or not adapters:
        base = model or model_config(None, None, systems[0].adapter if systems else None).model.path
        systems.insert(0, System(BASE, base, None))
    names = [system.name for system in systems]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate:
        raise ConfigError(f"two of the adapters are called {duplicate}: name each once")
    return systems


def evaluate_voices(
    data: Path,
    systems: Sequence[System],
    out: Path,
    scorers: Scorers,
    *,
    model_options: Mapping[str, str] | None = None,
    cache_dir: Path = Path("speechtune-cache"),
    batch_size: int = 8,
    options: GenerationOptions | None = None,
) -> Comparison:
    """Let all systems speak the same prompts, measure and compare; writes wavs, metrics.json and utterances.jsonl.

    Args:
        data: a manifest, or a seed-tts list, of prompts; where they have a recording of their text, for durations.
        systems: at least one; the first is what the others are compared with.
        out: where everything goes, wavs in a folder per system.
        scorers: what is measured besides stops and durations.
        model_options: as for `model_config`.
        cache_dir: folder of the encoded references.
        batch_size: prompts at a time.
        options: how to sample.

    Raises ConfigError: a model that does not speak; ManifestError: issues in the data.
    """
    samples = read_seed_list(data) if data.suffix == ".lst" else load_samples(data, DataConfig())
    check_references(samples)
    options = options or GenerationOptions()
    rows = {}
    with locked(out):
        for system in systems:
            spoken = _Spoken(out / file_name(system.name))
            log.info("%s speaks %d prompts", system.name, len(samples))
            prompts = as_trained(samples, system.adapter.directory if system.adapter else Path(system.model or ""))
            family = spoken.speak(system, prompts, options, model_options, cache_dir, batch_size)
            rows[system.name] = spoken.measure(prompts, family.sampling_rate, scorers)
        strengths = {system.name: system.adapter.strength for system in systems if system.adapter}
        comparison = replace(compare(rows, scorers), strengths=strengths)
        write_results(comparison.to_json(), comparison.rows, out)
    return comparison


@dataclass(slots=True)
class _Spoken:
    """The outputs of one system in a folder: a wav each, and a line that says how it ended."""

    directory: Path
    ends: dict[str, str] = field(default_factory=dict)
    """Key of a prompt -> JSON of `stopped` and `tokens`."""

    def speak(
        self,
        system: System,
        samples: Sequence[Sample],
        options: GenerationOptions,
        model_options: Mapping[str, str] | None,
        cache_dir: Path,
        batch_size: int,
    ) -> Family:
        """Generate all prompts; outputs that are there from the same system are kept."""
        config = model_config(system.model, model_options, system.adapter)
        family, model = load_model(config, system.adapter, ability="speak")
        identity = model_identity(config, family, system.adapter)
        identity |= {"options": str(options), "model": config.model.model_dump(mode="json")}
        answers = AnswerFile(self.directory / OUTPUTS_NAME, identity)
        self.ends = answers.texts
        asked = sorted((sample for sample in samples if not self._is_made(sample)), key=_prompt_length)
        keys = {sample.id: _key(sample) for sample in asked}
        origin = provenance(config, system.adapter)
        for output in answer(family, model, asked, options, cache_dir, batch_size=batch_size) if asked else ():
            if output.audio is not None and len(output.audio.samples):
                write_wav(self._wav(output.sample_id), output.audio, origin)
            end = json.dumps({"stopped": output.stopped, "tokens": output.num_tokens})
            answers.add(keys[output.sample_id], output.sample_id, end)
        return family

    def measure(self, samples: Sequence[Sample], rate: int, scorers: Scorers) -> list[VoiceRow]:
        """Measure the files, so that a resumed evaluation gives the same figures as one that was not stopped."""
        rows: list[VoiceRow] = []
        for start in range(0, len(samples), CHUNK):
            chosen = samples[start : start + CHUNK]
            voices = [sample.references[0].audio if sample.references else sample.audio for sample in chosen]
            references = [_read(ref if scorers.speaker else None, rate) for ref in voices]
            targets = [_read(sample.audio, rate) for sample in chosen]
            measured = measure(chosen, [self._output(sample, rate) for sample in chosen], references, targets, scorers)
            rows += [replace(row, audio=str(self._wav(row.id))) for row in measured]
            log.info("%d/%d scored", len(rows), len(samples))
        return rows

    def _wav(self, sample_id: str) -> Path:
        return self.directory / f"{file_name(sample_id)}.wav"

    def _is_made(self, sample: Sample) -> bool:
        end = self.ends.get(_key(sample))
        return end is not None and (self._wav(sample.id).is_file() or not json.loads(end)["tokens"])

    def _output(self, sample: Sample, rate: int) -> Output:
        path, end = self._wav(sample.id), json.loads(self.ends[_key(sample)])
        audio = _read(AudioRef(str(path)) if path.is_file() else None, rate)
        return Output(sample.id, audio, None, end["stopped"], end["tokens"])


def _key(sample: Sample) -> str:
    references = [[str(clip.audio), clip.text] for clip in sample.references]
    prompt = [sample.id, sample.text, sample.system, sample.scene, references]
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()[:16]


def _prompt_length(sample: Sample) -> float:
    """Rough length of a prompt in seconds of speech: batches of like lengths waste no padding."""
    recorded = sum(audio_info(clip.audio).duration_seconds for clip in sample.references)
    return recorded + (len(sample.text) + sum(len(clip.text) for clip in sample.references)) / CHARACTERS_PER_SECOND


def _read(ref: AudioRef | None, rate: int) -> Audio | None:
    return None if ref is None else read_audio(ref, rate)

"""Cases for the tests on sound: sentences, recordings, and what is heard of an output."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechtune.audio import read_audio
from speechtune.commands.demo_voice import VOICES
from speechtune.config import RunConfig
from speechtune.family import Scorers
from speechtune.inference.generate import answer
from speechtune.inference.load import load_model, open_adapter
from speechtune.tasks.voice_cloning.measures import measure
from speechtune.types import Audio, AudioRef, Clip, GenerationOptions, Output, Sample

SENTENCES = Path(__file__).parent / "sound"
MOST_ROWS = 160


@dataclass(frozen=True)
class Heard:
    """What is heard of some outputs: word error rate, share that stopped, mean similarity to the voice wanted."""

    wer: float
    stop_rate: float
    similarity: float


def lines(name: str) -> list[str]:
    """Sentences of a file beside this one."""
    return (SENTENCES / name).read_text(encoding="utf-8").splitlines()


def recording(voice: str) -> Clip:
    """A recording of a synthetic voice."""
    clips = [json.loads(line) for line in (VOICES / "synthetic.jsonl").read_text(encoding="utf-8").splitlines()]
    clip = next(clip for clip in clips if clip["speaker"] == voice)
    return Clip(AudioRef(str(VOICES / clip["audio"])), clip["text"])


def speak(config: RunConfig, adapter: Path | None, samples: Sequence[Sample]) -> list[Output]:
    """What a base, or a saved adapter on it, says."""
    family, model = load_model(config, open_adapter(adapter) if adapter else None)
    options = GenerationOptions(seed=0, max_new_tokens=MOST_ROWS)
    outputs = {o.sample_id: o for o in answer(family, model, samples, options, config.cache_dir, batch_size=20)}
    return [outputs[sample.id] for sample in samples]


def hear(outputs: Sequence[Output], samples: Sequence[Sample], voices: Sequence[Audio], ears: Scorers) -> Heard:
    """Measure outputs beside recordings of the voices they should have."""
    rows = measure(list(samples), list(outputs), list(voices), [None] * len(samples), ears)
    errors, words = (sum(getattr(row, name) or 0 for row in rows) for name in ("word_errors", "words"))
    return Heard(errors / words, float(np.mean([r.stopped for r in rows])), float(np.mean([r.sim or 0 for r in rows])))


def voice_audio(clip: Clip) -> Audio:
    """A recording at the rate of the base's codec."""
    return read_audio(clip.audio, 16_000)

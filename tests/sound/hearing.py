"""What is heard of the speaking base's outputs: words, stops and voice, and when they are bad."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechtune.audio import read_audio
from speechtune.config import RunConfig
from speechtune.family import Scorers
from speechtune.inference.generate import answer
from speechtune.inference.load import load_model, open_adapter
from speechtune.tasks.voice_cloning.measures import measure
from speechtune.types import Audio, AudioRef, Clip, GenerationOptions, Output, Sample

HERE = Path(__file__).parent
RECORDED_TEXT = "Good morning, the train to the coast leaves at nine."  # by Kokoro-82M
MOST_ROWS = 160
LEAST_STOPPED, MOST_WER, LEAST_SIMILAR = 0.85, 0.48, 0.68  # measured of the base: 1.0, 0.29, 0.73


@dataclass(frozen=True)
class Heard:
    """What is heard of some outputs: word error rate, share that stopped, mean similarity to the voice wanted."""

    wer: float
    stop_rate: float
    similarity: float

    def complaints(self, least_similar: float = LEAST_SIMILAR, most_wer: float = MOST_WER) -> set[str]:
        """Which of the three are out of bounds."""
        bad = {
            "words": self.wer > most_wer,
            "stops": self.stop_rate < LEAST_STOPPED,
            "voice": self.similarity < least_similar,
        }
        return {name for name, is_bad in bad.items() if is_bad}


def lines(name: str) -> list[str]:
    """Sentences of a file beside this one; no clip of the base's training says them."""
    return (HERE / name).read_text(encoding="utf-8").splitlines()


def recording(voice: str) -> Clip:
    """The recording of one of the voices."""
    return Clip(AudioRef(str(HERE / "voices" / f"{voice}.flac")), RECORDED_TEXT)


def speak(config: RunConfig, samples: Sequence[Sample], adapter: Path | None = None) -> list[Output]:
    """What the base says, or a saved adapter on it."""
    family, model = load_model(config, open_adapter(adapter) if adapter else None)
    options = GenerationOptions(seed=0, max_new_tokens=MOST_ROWS)
    outputs = {o.sample_id: o for o in answer(family, model, samples, options, config.cache_dir, batch_size=20)}
    return [outputs[sample.id] for sample in samples]


def hear(outputs: Sequence[Output], samples: Sequence[Sample], voices: Sequence[Audio], ears: Scorers) -> Heard:
    """Measure outputs beside recordings of the voices that they should have."""
    rows = measure(samples, outputs, voices, [None] * len(samples), ears)
    errors, words = (sum(getattr(row, name) or 0 for row in rows) for name in ("word_errors", "words"))
    return Heard(errors / words, float(np.mean([r.stopped for r in rows])), float(np.mean([r.sim or 0 for r in rows])))


def voices_of(samples: Sequence[Sample]) -> list[Audio]:
    """Each sample's reference."""
    return [read_audio(sample.references[0].audio) for sample in samples]

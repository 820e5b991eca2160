"""Scorers that answer from the audio itself, and rows, for tests of what is done with scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from speechtune.family import Scorers
from speechtune.tasks.voice_cloning.measures import VoiceRow
from speechtune.types import Audio, Output, Sample

RATE = 16_000


def tone(level: float, seconds: float = 1.0) -> Audio:
    """A tone whose loudness the fake scorers read: it stands for voice, words and quality at once."""
    times = np.arange(int(seconds * RATE)) / RATE
    return Audio((level * np.sin(440 * times)).astype(np.float32), RATE)


class FakeAsr:
    """Returns given words, chosen by loudness in tenths."""

    name = "fake asr"

    def __init__(self, words: dict[int, str], languages: frozenset[str] | None = None) -> None:
        self.words, self.languages, self.asked = words, languages, 0

    def transcribe(self, audios: Sequence[Audio], languages: Sequence[str | None]) -> list[str]:
        self.asked += len(audios)
        return [self.words[round(10 * float(np.abs(audio.samples).max()))] for audio in audios]


class FakeSpeaker:
    """A voice is its loudness as an angle: equal ones have cosine 1."""

    name = "fake speaker"

    def __init__(self) -> None:
        self.embedded = 0

    def embed(self, audios: Sequence[Audio]) -> np.ndarray:
        self.embedded += len(audios)
        angles = np.array([float(np.abs(audio.samples).max()) for audio in audios])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)


class FakeMos:
    """Rates by loudness."""

    name = "fake mos"

    def predict(self, audios: Sequence[Audio]) -> np.ndarray:
        return np.array([1 + 4 * float(np.abs(audio.samples).max()) for audio in audios])


def scorers(words: dict[int, str], languages: frozenset[str] | None = None) -> Scorers:
    """All three."""
    return Scorers(FakeAsr(words, languages), FakeSpeaker(), FakeMos())


def sample(number: int, text: str = "red green dark house", language: str | None = "en") -> Sample:
    """A prompt."""
    return Sample(f"p{number}", text, None, speaker=f"s{number % 2}", language=language)


def output(number: int, audio: Audio | None, stopped: bool = True) -> Output:
    """An answer to it."""
    return Output(f"p{number}", audio, None, stopped, 10)


def row(number: int, errors: int | None = 0, sim: float | None = 0.9, **more: object) -> VoiceRow:
    """A row of ten words."""
    words = None if errors is None else 10
    base = VoiceRow(
        id=f"p{number}",
        speaker=f"s{number % 3}",
        language="en",
        text="ten words",
        transcript=None,
        wer=None if errors is None else errors / 10,
        word_errors=errors,
        words=words,
        sim=sim,
        mos=3.0,
        stopped=True,
        seconds=1.0,
        duration_ratio=1.0,
    )
    return replace(base, **more)  # type: ignore[arg-type]

"""What pieces say: their language, text, words with times, and how sure the recogniser is."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from speechtune.errors import ConfigError
from speechtune.family import Transcriber
from speechtune.preparation.results import Result
from speechtune.tasks.voice_cloning.asr import TimedWord
from speechtune.types import Audio

LANGUAGE_PIECES = 5  # of a recording, the longest: what its language is told by


class Language(Result, frozen=True):
    """A recording's language as a code; `probability` is None where it was given."""

    code: str | None
    probability: float | None = None


class Transcript(Result, frozen=True):
    """Text of a piece; words as (text, start, end, probability), in seconds of the piece.

    `confidence`, the mean probability of the words, is None where the recogniser gives none.
    """

    text: str
    confidence: float | None = None
    words: tuple[tuple[str, float, float, float], ...] = ()


@runtime_checkable
class WordTranscriber(Protocol):
    """A recogniser that also tells languages, and words with their times."""

    def detect_language(self, audio: Audio) -> tuple[str, float]:
        """Code and probability of the language of a clip."""
        ...

    def transcribe_words(self, audio: Audio, language: str | None) -> tuple[str, list[TimedWord]]:
        """Text and words of a clip."""
        ...


def check_language(asr: Transcriber, language: str | None) -> None:
    """Raises ConfigError: the recogniser does not know the language, or cannot tell it and none is given."""
    if language is None and not isinstance(asr, WordTranscriber) and asr.languages is None:
        raise ConfigError(f"{asr.name} does not say which language it hears: name it, --language en")
    if language is not None and asr.languages is not None and language not in asr.languages:
        raise ConfigError(f"{asr.name} knows {', '.join(sorted(asr.languages))} alone, not --language {language}")


def find_language(asr: Transcriber, clips: Sequence[Audio]) -> Language:
    """The language of most of some clips of a recording, and its mean probability in these."""
    if not isinstance(asr, WordTranscriber):
        return Language(code=min(asr.languages)) if asr.languages else Language(code=None)
    votes: dict[str, list[float]] = {}
    for clip in clips:
        code, probability = asr.detect_language(clip)
        votes.setdefault(code, []).append(probability)
    if not votes:
        return Language(code=None)
    code = max(votes, key=lambda code: sum(votes[code]))
    return Language(code=code, probability=round(sum(votes[code]) / len(votes[code]), 3))


def transcribe(asr: Transcriber, audio: Audio, language: str | None) -> Transcript:
    """Text of a clip with what the recogniser can tell of it."""
    if not isinstance(asr, WordTranscriber):
        return Transcript(text=asr.transcribe([audio], [language])[0])
    text, words = asr.transcribe_words(audio, language)
    confidence = round(sum(word.probability for word in words) / len(words), 3) if words else 0.0
    rows = tuple((word.text, round(word.start, 2), round(word.end, 2), round(word.probability, 3)) for word in words)
    return Transcript(text=text, confidence=confidence, words=rows)

"""The errors a user can meet: few, and each says what happened, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class SpeechtuneError(Exception):
    """Base of every error speechtune raises on purpose.

    Attributes:
        exit_code: process exit status of the command line when the error ends it.
    """

    exit_code = 2


class ConfigError(SpeechtuneError):
    """A recipe, an override or a flag that cannot be used."""


class ManifestError(SpeechtuneError):
    """Faults of a data file; all of them are collected and raised once.

    Attributes:
        faults: every fault found, in file order.
    """

    def __init__(self, message: str, faults: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.faults = faults


class AudioError(SpeechtuneError):
    """Audio that cannot be read or must not be used."""


class AdapterError(SpeechtuneError):
    """A LoRA adapter that does not fit, is incomplete, or was never trained."""


class TrainingError(SpeechtuneError):
    """A guard stopped the run; the message names the step, the parameter and the samples."""

    exit_code = 4


class LostRankError(TrainingError):
    """Another process of the run is gone; the message names it. Started again, the run goes on from its checkpoint."""

    exit_code = 5


class CheckpointError(SpeechtuneError):
    """A checkpoint could not be written, verified or read."""

    exit_code = 3


SHOWN = 5


def some(names: Sequence[str]) -> str:
    """The first few names, and how many there are besides."""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def printable(text: str) -> str:
    """`text` with control characters and lone surrogates escaped, fit for terminals and UTF-8 files."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)

"""The errors a user can meet: few, and each says what happened, where, and what to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Issue:
    """One thing that validation found.

    Attributes:
        source: where: "file:line", a file, a tensor, an option.
        sample_id: the sample it concerns; "" for none.
        code: short, stable name of its kind, such as "missing_audio".
        message: what is wrong, and what to do about it.
        row: number of the row, from 1; 0 where there are no rows.
        severity: a "note" is nothing wrong by itself.
    """

    source: str
    sample_id: str
    code: str
    message: str
    row: int = 0
    severity: Literal["error", "warning", "note"] = "error"

    def __str__(self) -> str:
        subject = f"{self.sample_id}: " if self.sample_id else ""
        return f"{self.source}: {subject}{self.message} [{self.code}]"


class SpeechtuneError(Exception):
    """Base of every error speechtune raises on purpose.

    Attributes:
        exit_code: process exit status of the command line when the error ends it.
    """

    exit_code = 2


class ConfigError(SpeechtuneError):
    """A recipe, an override or a flag that cannot be used.

    Attributes:
        issues: of a recipe, one line for each issue, which begins with the dotted name of the option if it is of one.
    """

    def __init__(self, message: str, issues: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.issues = issues


class ManifestError(SpeechtuneError):
    """Issues of a data file; all of them are collected and raised once.

    Attributes:
        issues: every issue found, in file order.
    """

    def __init__(self, message: str, issues: tuple[Issue, ...] = ()) -> None:
        super().__init__(message)
        self.issues = issues


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

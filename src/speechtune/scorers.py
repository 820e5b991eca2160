"""Scorers of generated speech behind three small protocols: what was said, by whom, and how well it sounds.

Each comes with an optional package and is loaded when it is asked for. Weights lie in the package, in a folder, or
under a hub id that the caller names; nothing is fetched otherwise. The same audio gives the same number, alone or among
others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch

from speechtune import scorers_asr, scorers_mos, scorers_speaker, spoken_text
from speechtune.errors import ConfigError
from speechtune.families.base import Audio

Scorer = TypeVar("Scorer")


class Transcriber(Protocol):
    """Speech to text."""

    name: str
    """What it is: package, version, identity of the weights."""
    languages: frozenset[str] | None
    """Codes of the languages it knows; None for no limit."""

    def transcribe(self, audios: Sequence[Audio], languages: Sequence[str | None]) -> list[str]:
        """What is said in each clip; a language of None is found out, where the recogniser can."""
        ...


class SpeakerEncoder(Protocol):
    """Voice to vector."""

    name: str
    """What it is: package, version, identity of the weights."""

    def embed(self, audios: Sequence[Audio]) -> np.ndarray:
        """Embeddings of length 1, float32 of shape (clips, dimensions)."""
        ...

    def similarity(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosine of each pair of rows, shape (clips,)."""
        ...


class MosPredictor(Protocol):
    """Speech to a predicted mean opinion score."""

    name: str
    """What it is: package, version, identity of the weights."""

    def predict(self, audios: Sequence[Audio]) -> np.ndarray:
        """Score of each clip from 1 (bad) to 5 (excellent), float64 of shape (clips,)."""
        ...


@dataclass(frozen=True, slots=True)
class Scorers:
    """Loaded scorers; None is one that nobody asked for."""

    asr: Transcriber | None = None
    speaker: SpeakerEncoder | None = None
    mos: MosPredictor | None = None

    @property
    def names(self) -> dict[str, str]:
        """What measured what, and how texts were normalised; for reports."""
        loaded = {"asr": self.asr, "speaker": self.speaker, "mos": self.mos}
        names = {job: scorer.name for job, scorer in loaded.items() if scorer is not None}
        return names | ({"text": spoken_text.description()} if self.asr is not None else {})


ASR: dict[str, Callable[[str, str], Transcriber]] = {
    "faster-whisper": scorers_asr.FasterWhisper,
    "whisper": scorers_asr.Whisper,
    "pocketsphinx": scorers_asr.PocketSphinx,
}
SPEAKER: dict[str, Callable[[str, str], SpeakerEncoder]] = {
    "resemblyzer": scorers_speaker.Resemblyzer,
    "wavlm": scorers_speaker.WavLM,
}
MOS: dict[str, Callable[[str, str], MosPredictor]] = {
    "distillmos": scorers_mos.DistillMos,
    "dnsmos": scorers_mos.Dnsmos,
}
NEEDS_WEIGHTS = frozenset({"faster-whisper", "whisper", "wavlm"})
"""Kinds whose weights lie in a folder or under a hub id; those of the others lie in their package."""
MISSING = {
    "asr": f"no WER: no recogniser was named; for example pocketsphinx or whisper:FOLDER ({scorers_asr.INSTALL})",
    "speaker": f"no speaker similarity: no encoder was named; for example resemblyzer ({scorers_speaker.INSTALL})",
    "mos": f"no MOS: no predictor was named; for example distillmos ({scorers_mos.INSTALL})",
}
"""What a report says of a scorer that is not there."""


def load_scorers(asr: str | None, speaker: str | None, mos: str | None, *, device: str = "cpu") -> Scorers:
    """Load the scorers that the specs name.

    Args:
        asr: "faster-whisper:FOLDER_OR_ID", "whisper:FOLDER_OR_ID" (transformers) or "pocketsphinx"; None for none.
            A hub id may end in "@revision".
        speaker: "resemblyzer", "wavlm:FOLDER_OR_ID" (transformers).
        mos: "distillmos", "dnsmos".
        device: where networks run that can run elsewhere than on the CPU.

    Raises:
        ConfigError: an unknown spec, a missing package (named with the line that installs it), or weights that do not
            load.
    """
    if asr is not None:
        spoken_text.check_installed()
    return Scorers(_load(asr, ASR, device), _load(speaker, SPEAKER, device), _load(mos, MOS, device))


def what_is_missing(scorers: Scorers) -> list[str]:
    """One line per scorer that is not there: the figure it would give, and how it is had."""
    loaded = {"asr": scorers.asr, "speaker": scorers.speaker, "mos": scorers.mos}
    return [MISSING[job] for job, scorer in loaded.items() if scorer is None]


def _load(spec: str | None, known: dict[str, Callable[[str, str], Scorer]], device: str) -> Scorer | None:
    if spec is None:
        return None
    kind, colon, _ = spec.partition(":")
    if kind not in known:
        listed = ", ".join(name + (":FOLDER_OR_ID" if name in NEEDS_WEIGHTS else "") for name in known)
        raise ConfigError(f"{spec!r}: no such scorer; known are {listed}")
    if colon and kind not in NEEDS_WEIGHTS:
        raise ConfigError(f"{spec!r}: the weights of {kind} lie in its package; write {kind!r}")
    # networks draw weights before theirs are loaded; a training that listens must draw what another one draws
    with torch.random.fork_rng(devices=[]):
        return known[kind](spec, device)

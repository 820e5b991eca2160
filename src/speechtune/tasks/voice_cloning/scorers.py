"""Load the scorers of generated speech: a recogniser, a speaker encoder, a predictor of mean opinion scores.

Each comes with an optional package and is loaded when it is asked for. Weights lie in the package, in a folder, or
under a hub id that the caller names; nothing is fetched otherwise. The same audio gives the same number, alone or among
others.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

from speechtune.errors import ConfigError
from speechtune.family import MosPredictor, Scorers, SpeakerEncoder, Transcriber
from speechtune.tasks.voice_cloning import asr, mos, speaker, word_errors

Scorer = TypeVar("Scorer")

ASR: dict[str, Callable[[str, str], Transcriber]] = {
    "faster-whisper": asr.FasterWhisper,
    "whisper": asr.Whisper,
    "pocketsphinx": asr.PocketSphinx,
}
SPEAKER: dict[str, Callable[[str, str], SpeakerEncoder]] = {"resemblyzer": speaker.Resemblyzer, "wavlm": speaker.WavLM}
MOS: dict[str, Callable[[str, str], MosPredictor]] = {"distillmos": mos.DistillMos, "dnsmos": mos.Dnsmos}
NEEDS_WEIGHTS = frozenset({"faster-whisper", "whisper", "wavlm"})
"""Kinds whose weights lie in a folder or under a hub id; those of the others lie in their package."""
MISSING = {
    "asr": f"no WER: no recogniser was named; for example pocketsphinx or whisper:FOLDER ({asr.INSTALL})",
    "speaker": f"no speaker similarity: no encoder was named; for example resemblyzer ({speaker.INSTALL})",
    "mos": f"no MOS: no predictor was named; for example distillmos ({mos.INSTALL_DISTILLMOS})",
}
"""A report's line on a scorer that was not named."""


def load_scorers(asr: str | None, speaker: str | None, mos: str | None, *, device: str = "cpu") -> Scorers:
    """Load the scorers that the specs name.

    Args:
        asr: "faster-whisper:FOLDER_OR_ID", "whisper:FOLDER_OR_ID" (transformers) or "pocketsphinx"; None for none.
            A hub id may end in "@revision".
        speaker: "resemblyzer", "wavlm:FOLDER_OR_ID" (transformers).
        mos: "distillmos", "dnsmos".
        device: where networks run that can run elsewhere than on the CPU.

    Raises ConfigError: an unknown spec, a missing package (named with the line that installs it), or weights that do
    not load.
    """
    if asr is not None:
        word_errors.check_installed()
    rules = None if asr is None else word_errors.description()
    return Scorers(_load(asr, ASR, device), _load(speaker, SPEAKER, device), _load(mos, MOS, device), rules)


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
    # networks draw random weights before theirs are loaded; a training must draw the same with scorers and without
    with torch.random.fork_rng(devices=[]):
        return known[kind](spec, device)

"""Scores of Higgs Audio v2: generated speech by scorers outside the model, and codes by what was to be predicted."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from speechtune.audio import read_audio
from speechtune.families.layers.ops import IGNORE
from speechtune.family import Scorers
from speechtune.tasks.voice_cloning.measures import measure, summarise, warnings_of
from speechtune.types import Output, Sample, Scored

NUM_CODEBOOKS = 8
END_ACCURACY = "end_accuracy"
NO_END = "no end of speech stands among the targets: a model that learns from them never stops speaking"
SCORE_NAMES = {
    "wer": "min",
    "sim": "max",
    "mos": "max",
    "stop_rate": "max",
    END_ACCURACY: "max",
    **{f"codebook_accuracy_{k}": "max" for k in range(NUM_CODEBOOKS)},
}


def count_correct_codes(audio_PKV: torch.Tensor, targets_PK: torch.Tensor, eos: int) -> dict[str, tuple[int, int]]:
    """Correct targets and all targets, per codebook and of the ends of speech, of logits at P positions."""
    wanted_PK = targets_PK != IGNORE
    correct_PK = (audio_PKV.argmax(-1) == targets_PK) & wanted_PK
    end_PK = targets_PK == eos
    pairs = zip(correct_PK.sum(0).tolist(), wanted_PK.sum(0).tolist(), strict=True)
    counts = {f"codebook_accuracy_{k}": pair for k, pair in enumerate(pairs)}
    return counts | {END_ACCURACY: (int((correct_PK & end_PK).sum()), int(end_PK.sum()))}


def score_speech(samples: Sequence[Sample], outputs: Sequence[Output], scorers: Scorers, sampling_rate: int) -> Scored:
    """How intelligible, how like the reference's voice, how natural, and whether it ends; see `measures`.

    A sample without reference is compared with its own recording.
    """
    voices = [sample.references[0].audio if sample.references else sample.audio for sample in samples]
    references, targets = (
        [None if ref is None else read_audio(ref, sampling_rate) for ref in refs]
        for refs in (voices, [sample.audio for sample in samples])
    )
    rows = measure(samples, outputs, references, targets, scorers)
    return Scored(summarise(rows), [asdict(row) for row in rows])


def speech_warnings(scores: Mapping[str, float], base: Mapping[str, float]) -> list[str]:
    """See `measures.warnings_of`; and targets without an end, which no loss shows."""
    return [*([] if END_ACCURACY in scores else [NO_END]), *warnings_of(scores, base)]

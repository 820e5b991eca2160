"""Scores of Higgs Audio v2's codes by what was to be predicted."""

import torch

from speechtune.families.layers.ops import IGNORE
from speechtune.tasks.voice_cloning.measures import END_ACCURACY, score_names

SCORE_NAMES = score_names(num_codebooks=8)


def count_correct_codes(audio_PKV: torch.Tensor, targets_PK: torch.Tensor, eos: int) -> dict[str, tuple[int, int]]:
    """Correct targets and all targets, per codebook and of the ends of speech, of logits at P positions."""
    wanted_PK = targets_PK != IGNORE
    correct_PK = (audio_PKV.argmax(-1) == targets_PK) & wanted_PK
    end_PK = targets_PK == eos
    pairs = zip(correct_PK.sum(0).tolist(), wanted_PK.sum(0).tolist(), strict=True)
    counts = {f"codebook_accuracy_{k}": pair for k, pair in enumerate(pairs)}
    return counts | {END_ACCURACY: (int((correct_PK & end_PK).sum()), int(end_PK.sum()))}

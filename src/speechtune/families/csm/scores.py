"""Scores of CSM: what its codes are measured by; generated speech is measured as that of every family."""

import torch

from speechtune.tasks.voice_cloning.measures import END_ACCURACY, score_names

SCORE_NAMES = score_names(num_codebooks=32)


def count_correct_codes(
    found_PK: torch.Tensor, targets_PK: torch.Tensor, ends: torch.Tensor
) -> dict[str, tuple[int, int]]:
    """Codes found and to be found, per codebook in frames, and of the ends of speech, whose rows are `ends`.

    An end counts where the model would stop: its code in all codebooks but the last.
    """
    right_PK = found_PK == targets_PK
    is_frame_P = torch.ones(len(targets_PK), dtype=torch.bool, device=ends.device).index_fill(0, ends, False)
    num_frames = int(is_frame_P.sum())
    counts = {
        f"codebook_accuracy_{k}": (right, num_frames) for k, right in enumerate(right_PK[is_frame_P].sum(0).tolist())
    }
    return counts | {END_ACCURACY: (int(right_PK[ends][:, :-1].all(1).sum()), len(ends))}

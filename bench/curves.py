"""Training throughput of ours against the length of the samples, and against the budget of positions per batch.

Linear cost shows as a level curve; attention grows with the square of the length and bends it at the long end.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from meter import quiet
from ours import train_ours
from voices import BENCH, FRAMES_PER_SECOND, LETTERS_PER_SECOND, make_base, make_examples, write_examples

ROWS = (100, 250, 500, 1000, 2000, 4000)
TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
OTHER_POSITIONS = 100  # of the prompt beside the frames of the two clips, about
POSITIONS_PER_STEP = 4000
SHORT_ROWS = 240  # so that the least budget holds two samples


def write_rows(folder: Path, rows: int, count: int) -> Path:
    """`count` samples of about `rows` positions each."""
    data = folder / f"rows-{rows}"
    if not data.exists():
        letters = LETTERS_PER_SECOND / FRAMES_PER_SECOND
        seconds = max(0.1, (rows - OTHER_POSITIONS) / 2 / FRAMES_PER_SECOND / (1 + letters))
        write_examples(make_examples([(seconds, seconds)] * count, BENCH.codebook_size), data)
    return data


def by_length(base: Path, folder: Path, rows: int) -> float:
    """Real tokens a second on samples of about `rows` positions, steps of about the same number of positions."""
    per_step = max(1, POSITIONS_PER_STEP // rows)
    sections = {"train": {"batch_size": per_step}, "batch": {"tokens": 2 * POSITIONS_PER_STEP}}
    return train_ours(base, write_rows(folder, rows, 2 * per_step), folder, 3, **sections)[0].rate().wall


def by_tokens(base: Path, folder: Path, tokens: int) -> float:
    """Real tokens a second of steps as large as the greatest budget, cut to at most `tokens` positions a batch."""
    per_step = TOKENS[-1] // SHORT_ROWS
    sections = {"train": {"batch_size": per_step}, "batch": {"tokens": tokens}}
    return train_ours(base, write_rows(folder, SHORT_ROWS, per_step), folder, 2, **sections)[0].rate().wall


def measure(pairs: int = 5) -> dict[str, list[float]]:
    """Tokens a second at each point, the points taken in turn `pairs` times over."""
    result: dict[str, list[float]] = {}
    with quiet(), tempfile.TemporaryDirectory(prefix="speechtune-bench-") as name:
        folder = Path(name)
        base = make_base(folder / "base")
        for _ in range(pairs):
            for rows in ROWS:
                result.setdefault(f"tokens/s, samples of {rows} rows", []).append(by_length(base, folder, rows))
            for tokens in TOKENS:
                result.setdefault(f"tokens/s, {tokens} positions a batch", []).append(by_tokens(base, folder, tokens))
    return result

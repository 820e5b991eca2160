"""Training throughput of ours against the length of the samples, and against the budget of positions per batch.

Linear cost shows as a level curve; attention grows with the square of the length and bends it at the long end.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from meter import quiet
from ours import DISTRIBUTIONS, train_ours
from voices import BENCH, make_base, make_examples, write_examples

ROWS = (100, 250, 500, 1000, 2000, 4000)
TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
OTHER_POSITIONS = 130  # of the prompt beside the two clips, about
POSITIONS_PER_STEP = 4000
FRAMES_PER_SECOND = 25


def by_length(base: Path, folder: Path, rows: int) -> float:
    """Real tokens a second on samples of about `rows` positions, steps of about the same number of positions."""
    per_step = max(1, POSITIONS_PER_STEP // rows)
    seconds = max(0.2, (rows - OTHER_POSITIONS) / 2 / FRAMES_PER_SECOND)
    examples = make_examples([(seconds, seconds)] * (2 * per_step), BENCH.codebook_size)
    data = folder / f"rows-{rows}"
    if not data.exists():
        write_examples(examples, data)
    sections = {"train": {"batch_size": per_step}, "batch": {"tokens": 2 * POSITIONS_PER_STEP}}
    return train_ours(base, data, folder, 3, **sections)[0].rate().wall


def by_tokens(base: Path, folder: Path, tokens: int) -> float:
    """Real tokens a second on mixed lengths with at most `tokens` positions in a batch."""
    data = folder / "mixed"
    if not data.exists():
        write_examples(make_examples(DISTRIBUTIONS["mixed"](64), BENCH.codebook_size), data)
    sections = {"train": {"batch_size": 32}, "batch": {"tokens": tokens}}
    return train_ours(base, data, folder, 2, **sections)[0].rate().wall


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

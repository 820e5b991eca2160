"""Bootstrap intervals, permutation tests and grouping that both tasks use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95
CHUNK_ELEMENTS = 2_000_000  # indices drawn at once by the bootstrap


Row = TypeVar("Row")


Figure = TypeVar("Figure")


def to_json(result: object) -> dict[str, Any]:
    """A result dataclass as a plain dict for `json.dumps`: NaN, which JSON does not have, becomes None.

    Raises:
        TypeError: not a dataclass instance.
    """
    return _plain(asdict(cast(Any, result)))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def ratio(numerator: float, denominator: float) -> float:
    """Quotient; NaN where the denominator is zero, for then there was nothing to measure."""
    return numerator / denominator if denominator else math.nan


def parse_rate(answers: Sequence[object | None]) -> float:
    """Share of answers that could be read; NaN where there are none."""
    return ratio(sum(answer is not None for answer in answers), len(answers))


def edit_counts(references: list[str], answers: list[str]) -> tuple[int, int, int, int]:
    """Substitutions, deletions, insertions and reference tokens, summed; tokens are what spaces divide."""
    if not references:
        return 0, 0, 0, 0
    from jiwer import process_words

    found = process_words(references, answers)
    total = found.hits + found.substitutions + found.deletions
    return found.substitutions, found.deletions, found.insertions, total


def by_group(
    rows: Sequence[Row], key: Callable[[Row], object], measure: Callable[[list[Row]], Figure]
) -> dict[str, Figure]:
    """Any measure per group: by speaker, age group, gender; rows whose key is None are the group "unknown".

    Returns:
        Group name -> what `measure` says of the group's rows, in the order of names.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        value = key(row)
        groups.setdefault("unknown" if value is None else str(value), []).append(row)
    return {name: measure(groups[name]) for name in sorted(groups)}


PERMUTATIONS = 10_000
EXACT_PROMPTS = 13
"""Up to this many differing prompts all 2^n signs are tried."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its interval over `count` prompts; NaN is what is not defined.

    `p_value` is that of the difference from the first system, Holm-adjusted; None for the first system, where no two
    systems have the figure for the same prompt, and for the duration ratio.
    """

    value: float
    low: float
    high: float
    count: int
    p_value: float | None = None


def interval(
    numerators: np.ndarray, denominators: np.ndarray, median: bool, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Quotient of sums over rows (with `median` the median numerator), and its 95 % bootstrap interval."""

    def measure(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.median(a, axis=-1) if median else a.sum(axis=-1) / b.sum(axis=-1)

    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK_ELEMENTS // len(numerators))
    parts = []
    for start in range(0, resamples, chunk):
        drawn = generator.integers(0, len(numerators), size=(min(chunk, resamples - start), len(numerators)))
        parts.append(measure(numerators[drawn], denominators[drawn]))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(parts), [tail, 1 - tail])
    return Estimate(float(measure(numerators, denominators)), float(low), float(high), len(numerators))


def permutation_test(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of a sum of paired differences under random signs; exact for few prompts.

    For WER the differences are those in word errors: both systems spoke the same words, so the test is of the corpus
    WER. Drawn signs give (1 + as extreme) / (1 + drawn), which is never 0.
    """
    differences = differences[differences != 0]  # a sign changes nothing there
    if not len(differences):
        return 1.0
    extreme = abs(differences.sum()) * (1 - 1e-12)  # sums in another order may round below the same value
    count = len(differences)
    if count <= EXACT_PROMPTS:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        return float((np.abs(signs @ differences) >= extreme).mean())
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK_ELEMENTS // count)
    hits = 0
    for start in range(0, PERMUTATIONS, chunk):
        signs = 1 - 2 * generator.integers(0, 2, size=(min(chunk, PERMUTATIONS - start), count))
        hits += int((np.abs(signs @ differences) >= extreme).sum())
    return (1 + hits) / (1 + PERMUTATIONS)


def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """P-values adjusted by Holm's step-down method over all of them."""
    adjusted, largest = {}, 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, p_values[key] * (len(p_values) - rank)))
        adjusted[key] = largest
    return adjusted

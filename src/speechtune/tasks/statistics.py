"""Bootstrap intervals, permutation tests and grouping that both tasks use."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95
CHUNK_ELEMENTS = 2_000_000
"""Random numbers drawn at once, so that memory does not grow with the number of resamples."""
PERMUTATIONS = 10_000
EXACT_PROMPTS = 13
"""Up to this many differing prompts all 2^n signs are tried."""

Row = TypeVar("Row")
Figure = TypeVar("Figure")
Key = TypeVar("Key")


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

    counts = process_words(references, answers)
    total = counts.hits + counts.substitutions + counts.deletions
    return counts.substitutions, counts.deletions, counts.insertions, total


def by_group(
    rows: Sequence[Row], key: Callable[[Row], object], measure: Callable[[list[Row]], Figure]
) -> dict[str, Figure]:
    """What `measure` says of each group of rows, in the order of names; a key of None is the group "unknown"."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        value = key(row)
        groups.setdefault("unknown" if value is None else str(value), []).append(row)
    return {name: measure(groups[name]) for name in sorted(groups)}


def bootstrap_interval(
    measure: Callable[..., np.ndarray],
    *columns: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[float, float]:
    """Percentile bootstrap interval over rows (Efron & Tibshirani 1993, chapter 13); NaN without a finite figure.

    Rows are drawn with replacement, as if they were independent; several of one speaker are not quite, so the true
    interval is somewhat wider. `measure` gets resampled columns of shape (resamples, rows) and gives one figure per
    resample; resamples whose figure is not finite are left out. `chunk_elements` changes nothing but memory.
    """
    size = len(columns[0])
    generator = np.random.default_rng(seed)
    chunk = max(1, chunk_elements // max(1, size))
    parts = [np.empty(0)]
    for start in range(0, resamples if size else 0, chunk):
        drawn = generator.integers(0, size, size=(min(chunk, resamples - start), size))
        parts.append(measure(*(column[drawn] for column in columns)))
    figures = np.concatenate(parts)
    figures = figures[np.isfinite(figures)]
    if not figures.size:
        return math.nan, math.nan
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(figures, [tail, 1 - tail])
    return float(low), float(high)


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


def estimate(numerators: np.ndarray, denominators: np.ndarray, median: bool) -> Estimate:
    """Quotient of sums over rows (with `median` the median numerator), and its bootstrap interval."""

    def measure(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.median(a, axis=-1) if median else a.sum(axis=-1) / b.sum(axis=-1)

    low, high = bootstrap_interval(measure, numerators, denominators)
    return Estimate(float(measure(numerators, denominators)), low, high, len(numerators))


def permutation_test(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of a sum of paired differences under random signs; exact for few prompts.

    For WER the differences are those in word errors: both systems spoke the same words, so the test is of the corpus
    WER. Drawn signs give (1 + as extreme) / (1 + drawn), which is never 0.
    """
    differences = differences[differences != 0]  # a sign changes nothing there
    count = len(differences)
    if not count:
        return 1.0
    extreme = abs(differences.sum()) * (1 - 1e-12)  # sums in another order may round below the same value
    if count <= EXACT_PROMPTS:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
        return float((np.abs(signs @ differences) >= extreme).mean())
    generator = np.random.default_rng(seed)
    chunk = max(1, CHUNK_ELEMENTS // count)
    as_extreme = 0
    for start in range(0, PERMUTATIONS, chunk):
        signs = 1 - 2 * generator.integers(0, 2, size=(min(chunk, PERMUTATIONS - start), count))
        as_extreme += int((np.abs(signs @ differences) >= extreme).sum())
    return (1 + as_extreme) / (1 + PERMUTATIONS)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """P-values adjusted by Holm's step-down method over all of them."""
    adjusted: dict[Key, float] = {}
    largest = 0.0
    for rank, key in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        largest = max(largest, min(1.0, p_values[key] * (len(p_values) - rank)))
        adjusted[key] = largest
    return adjusted


@dataclass(frozen=True, slots=True)
class Preference:
    """Votes between two: for the first, for the second, for neither; and what they say.

    `share` is that of the first among the votes for either, `low` and `high` its exact binomial interval (Clopper and
    Pearson 1934), `p_value` that of no preference; NaN without a vote for either.
    """

    first: int
    second: int
    neither: int
    share: float
    low: float
    high: float
    p_value: float


def preference(first: int, second: int, neither: int = 0) -> Preference:
    """Interval and two-sided test of the share of votes for the first of two; votes for neither are left out."""
    if not first + second:
        return Preference(first, second, neither, *[math.nan] * 4)
    from scipy.stats import binomtest

    test = binomtest(first, first + second)
    interval = test.proportion_ci(CONFIDENCE)
    share = first / (first + second)
    return Preference(first, second, neither, share, float(interval.low), float(interval.high), float(test.pvalue))

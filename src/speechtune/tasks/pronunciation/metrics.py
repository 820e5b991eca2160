"""Figures for pronunciation answers: scores against raters, word and phone error rates, baselines and the ceiling.

Answers come in parsed; `None` is one that could not be read. Each figure is given twice: over the answers that could be
read, and over all with a stated value in place of the others. Detection of mispronunciations is in `mdd`.
scipy and jiwer come with the extra `evaluate` and are imported where they are used.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

from speechtune.tasks.pronunciation.targets import SCORE_FIELDS as FIELDS
from speechtune.tasks.statistics import CHUNK_ELEMENTS, CONFIDENCE, RESAMPLES, edit_counts, parse_rate, ratio

CONSTANT = 1e-9  # spread, relative to the size of the values, below which predictions count as one value
WORD_NORMALISATION = "NFKC, case folded; punctuation and symbols are spaces, but apostrophes inside words stay"
PHONE_NORMALISATION = "upper case, stress digits stripped, <DEL> left out"
EMPTY_ANSWER = "an empty answer: every reference token counts as deleted"


Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class FieldScores:
    """Agreement of one predicted score with its reference, over `count` utterances; NaN is what is not defined.

    Attributes:
        count: utterances.
        pcc: Pearson's correlation; NaN where predictions or references do not vary.
        pcc_low: lower end of its 95 % bootstrap interval.
        pcc_high: upper end.
        collapsed: the predictions are one constant value; `pcc` is then undefined, not 0.
        spearman: Spearman's rank correlation.
        mae: mean absolute error, in points of the score.
        sd_ratio: standard deviation of predictions over that of references; far below 1 is a model that hedges.
    """

    count: int
    pcc: float
    pcc_low: float
    pcc_high: float
    collapsed: bool
    spearman: float
    mae: float
    sd_ratio: float

    def pcc_text(self) -> str:
        """The correlation for people: "0.656 [0.630, 0.680]", "collapsed" or "undefined"."""
        if self.collapsed:
            return "collapsed"
        return "undefined" if math.isnan(self.pcc) else f"{self.pcc:.3f} [{self.pcc_low:.3f}, {self.pcc_high:.3f}]"


@dataclass(frozen=True, slots=True)
class ScoreReport:
    """Scores per field.

    Attributes:
        parse_rate: share of answers that hold every field.
        parsed: per field, over the answers that hold it.
        imputed: per field, over all answers, failures replaced; None where the caller gave no values.
        imputed_with: the values used, per field; None with `imputed`.
    """

    parse_rate: float
    parsed: dict[str, FieldScores]
    imputed: dict[str, FieldScores] | None
    imputed_with: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class ErrorRate:
    """Edit errors over a corpus: `rate` = (S + D + I) / N after normalisation, `raw_rate` the same before it."""

    rate: float
    raw_rate: float
    substitutions: int
    deletions: int
    insertions: int
    reference_tokens: int
    normalisation: str


@dataclass(frozen=True, slots=True)
class ErrorRateReport:
    """An error rate over the answers that could be read, and over all with the others taken as `imputed_with`."""

    parse_rate: float
    parsed: ErrorRate
    imputed: ErrorRate
    imputed_with: str


@dataclass(frozen=True, slots=True)
class RaterCeiling:
    """How well one rater agrees with the median of the others: the mean PCC, each rater's own, and how many rows."""

    pcc: float
    per_rater: tuple[float, ...]
    count: int


# -- scores --------------------------------------------------------------------------------------------------------


def field_scores(
    predictions: Sequence[float], references: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> FieldScores:
    """Agreement of predicted with reference scores of one field.

    PCC and Spearman: `scipy.stats.pearsonr`, `spearmanr` (ties get their mean rank). The interval: `pcc_interval`.
    Where the predictions vary in no way the PCC is NaN and `collapsed` is set.

    Raises:
        ValueError: different lengths, or a value that is not finite.
    """
    x, y = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"{x.shape} predictions for {y.shape} references")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a score is not finite; pass an answer without a usable score as None")
    mae = float(np.abs(x - y).mean()) if x.size else math.nan
    collapsed = x.size > 1 and _is_constant(x)
    if x.size < 2 or _is_constant(y):
        return FieldScores(x.size, math.nan, math.nan, math.nan, collapsed, math.nan, mae, math.nan)
    sd_ratio = float(x.std() / y.std())
    if collapsed:
        return FieldScores(x.size, math.nan, math.nan, math.nan, True, math.nan, mae, sd_ratio)
    from scipy import stats

    pcc, spearman = (float(cast(Any, measure(x, y)).statistic) for measure in (stats.pearsonr, stats.spearmanr))
    low, high = pcc_interval(x, y, resamples=resamples, seed=seed)
    return FieldScores(x.size, pcc, low, high, False, spearman, mae, sd_ratio)


def pcc_interval(
    predictions: Sequence[float] | np.ndarray,
    references: Sequence[float] | np.ndarray,
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of the PCC (Efron & Tibshirani 1993, chapter 13).

    Utterances are drawn with replacement, as if they were independent; several of one speaker are not quite, so the
    true interval is somewhat wider. Resamples without variation have no PCC and are left out.

    Returns:
        Lower and upper end; NaN where no resample has a PCC.
    """
    x, y = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if x.size < 2:
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK_ELEMENTS // x.size)
    parts = []
    for start in range(0, resamples, rows):
        drawn = generator.integers(0, x.size, size=(min(rows, resamples - start), x.size))
        parts.append(_pcc_of_rows(x[drawn], y[drawn]))
    pccs = np.concatenate(parts)
    pccs = pccs[np.isfinite(pccs)]
    if not pccs.size:
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(pccs, [tail, 1 - tail])
    return float(low), float(high)


def _pcc_of_rows(x_BN: np.ndarray, y_BN: np.ndarray) -> np.ndarray:
    """PCC of each row pair; NaN where one is constant."""
    constant = (np.ptp(x_BN, axis=1) == 0) | (np.ptp(y_BN, axis=1) == 0)  # rounding leaves a mean's spread above 0
    x_BN, y_BN = x_BN - x_BN.mean(axis=1, keepdims=True), y_BN - y_BN.mean(axis=1, keepdims=True)
    scale = np.sqrt((x_BN**2).sum(axis=1) * (y_BN**2).sum(axis=1))
    return np.where(constant, math.nan, (x_BN * y_BN).sum(axis=1) / np.where(constant, 1.0, scale))


def _is_constant(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= CONSTANT * max(1.0, float(np.abs(values).max())))


def score_report(
    predictions: Sequence[Mapping[str, float] | None],
    references: Sequence[Mapping[str, float]],
    *,
    impute: Mapping[str, float] | None = None,
    fields: Sequence[str] = FIELDS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ScoreReport:
    """Every score metric per field, over parsed answers and with failures imputed.

    Args:
        predictions: parsed answers; None, or a field that is missing or not finite, is a failure.
        references: the raters' scores, complete.
        impute: value per field that takes the place of failures: `train_mean` of the training references.
        fields: names of the scores.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: different lengths.
        KeyError: a reference or `impute` lacks a field.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    values = {field: [_finite(answer, field) for answer in predictions] for field in fields}
    truths = {field: [float(row[field]) for row in references] for field in fields}
    complete = [None if None in row else row for row in zip(*values.values(), strict=True)]
    parsed: dict[str, FieldScores] = {}
    imputed: dict[str, FieldScores] = {}
    for field in fields:
        pairs = [(p, t) for p, t in zip(values[field], truths[field], strict=True) if p is not None]
        parsed[field] = field_scores([p for p, _ in pairs], [t for _, t in pairs], resamples=resamples, seed=seed)
        if impute is not None:
            filled = [float(impute[field]) if p is None else p for p in values[field]]
            imputed[field] = field_scores(filled, truths[field], resamples=resamples, seed=seed)
    if impute is None:
        return ScoreReport(parse_rate(complete), parsed, None, None)
    return ScoreReport(parse_rate(complete), parsed, imputed, {field: float(impute[field]) for field in fields})


def _finite(answer: Mapping[str, float] | None, field: str) -> float | None:
    value = None if answer is None else answer.get(field)
    return float(value) if value is not None and math.isfinite(value) else None


# -- words and phones ----------------------------------------------------------------------------------------------


def normalise_words(text: str) -> str:
    """Text as `WORD_NORMALISATION` says, with single spaces."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    kept = (" " if unicodedata.category(c)[0] in "PS" and c != "'" else c for c in text)
    return " ".join(re.sub(r"(?<!\w)'|'(?!\w)", " ", "".join(kept)).split())


def normalise_phones(phones: Sequence[str]) -> list[str]:
    """ARPAbet phones as `PHONE_NORMALISATION` says ("ih0" -> "IH"); "D Z" in one string becomes two phones."""
    tokens = " ".join(phones).upper().split()
    return [re.sub(r"(?<=[A-Z])[0-2]$", "", phone) for phone in tokens if phone != "<DEL>"]


def word_error_rate(references: Sequence[str], answers: Sequence[str | None]) -> ErrorRateReport:
    """WER = (S + D + I) / N over the corpus, aligned by jiwer (Morris, Maier & Green 2004), normalised and raw.

    Raises:
        ValueError: different lengths.
    """
    return _error_rates(references, answers, "", normalise_words, str, WORD_NORMALISATION)


def phone_error_rate(references: Sequence[Sequence[str]], answers: Sequence[Sequence[str] | None]) -> ErrorRateReport:
    """PER = (S + D + I) / N of phones against the realised ones; raw keeps stress digits and case.

    Raises:
        ValueError: different lengths.
    """

    def normalise(phones: Sequence[str]) -> str:
        return " ".join(normalise_phones(phones))

    return _error_rates(references, answers, (), normalise, " ".join, PHONE_NORMALISATION)


def _error_rates(
    references: Sequence[Value],
    answers: Sequence[Value | None],
    empty: Value,
    normalise: Callable[[Value], str],
    as_text: Callable[[Value], str],
    normalisation: str,
) -> ErrorRateReport:
    if len(references) != len(answers):
        raise ValueError(f"{len(answers)} answers for {len(references)} references")

    def measure(pairs: list[tuple[Value, Value]]) -> ErrorRate:
        raw, counts = (
            edit_counts([prepare(reference) for reference, _ in pairs], [prepare(answer) for _, answer in pairs])
            for prepare in (as_text, normalise)
        )
        rate, raw_rate = (ratio(sum(errors), total) for *errors, total in (counts, raw))
        return ErrorRate(rate, raw_rate, *counts, normalisation)

    rows = list(zip(references, answers, strict=True))
    parsed = measure([(reference, answer) for reference, answer in rows if answer is not None])
    imputed = measure([(reference, empty if answer is None else answer) for reference, answer in rows])
    return ErrorRateReport(parse_rate(answers), parsed, imputed, EMPTY_ANSWER)


# -- baselines, ceiling, groups ------------------------------------------------------------------------------------


def train_mean(references: Sequence[Mapping[str, float]], fields: Sequence[str] = FIELDS) -> dict[str, float]:
    """Mean score per field of the training references: what failures are imputed with, and the first baseline."""
    return {field: ratio(math.fsum(row[field] for row in references), len(references)) for field in fields}


def mean_baseline(references: Sequence[Mapping[str, float]], means: Mapping[str, float]) -> ScoreReport:
    """The scores of a model that answers the train mean to everything: "collapsed" in every field, but with an MAE."""
    return score_report([means] * len(references), references, fields=tuple(means))


def rater_ceiling(ratings: Sequence[Sequence[float] | None]) -> RaterCeiling | None:
    """PCC of one rater against the median of the others, averaged over raters: what one human reaches.

    Args:
        ratings: per utterance the raters' scores in a fixed order; None where there are none.

    Returns:
        None where fewer than two utterances or two raters exist. A rater who always says the same has NaN and is
        left out of the mean.

    Raises:
        ValueError: utterances with different numbers of raters.
    """
    rated = [list(row) for row in ratings if row]
    if len(rated) < 2:
        return None
    if len({len(row) for row in rated}) > 1:
        raise ValueError("utterances have different numbers of raters")
    scores_NR = np.asarray(rated, dtype=np.float64)  # utterances, raters
    if scores_NR.shape[1] < 2:
        return None
    from scipy import stats

    pccs = []
    for rater in range(scores_NR.shape[1]):
        own, others = scores_NR[:, rater], np.median(np.delete(scores_NR, rater, axis=1), axis=1)
        defined = not (_is_constant(own) or _is_constant(others))
        pccs.append(float(cast(Any, stats.pearsonr(own, others)).statistic) if defined else math.nan)
    finite = [pcc for pcc in pccs if not math.isnan(pcc)]
    return RaterCeiling(ratio(math.fsum(finite), len(finite)), tuple(pccs), len(rated))

"""Metrics of pronunciation answers: scores against raters, word and phone error rates, baselines, one-rater ceiling.

Answers come in parsed; `None` is one that could not be read. Each metric is given over the answers that could be read,
and over all with a stated value in place of the others. Detection of mispronunciations is in `mdd`.
scipy and jiwer come with the extra `evaluate` and are imported where they are used.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import numpy as np

from speechtune.tasks.pronunciation.targets import SCORE_FIELDS
from speechtune.tasks.statistics import RESAMPLES, bootstrap_interval, edit_counts, parse_rate, ratio

CONSTANT = 1e-9  # spread, relative to the size of the values, below which predictions count as one value
WORD_NORMALISATION = "NFKC, case folded; punctuation and symbols are spaces, but apostrophes inside words stay"
PHONE_NORMALISATION = "upper case, stress digits stripped, <DEL> left out"
EMPTY_ANSWER = "an empty answer: every reference token counts as deleted"

Figures = TypeVar("Figures")


@dataclass(frozen=True, slots=True)
class FieldScores:
    """Agreement of one predicted score with its reference, over `count` utterances; NaN is what is not defined.

    Attributes:
        pcc: Pearson's correlation, with its 95 % bootstrap interval; NaN where predictions or references do not vary.
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
    """Agreement per field: over the answers that hold it, and over all with failures `imputed_with` a value per field.

    `parse_rate` is the share of answers that hold every field; `imputed` is None without values to impute.
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
class AnswerReport(Generic[Figures]):
    """Figures over the answers that could be read, and over all with the others taken as `imputed_with`."""

    parse_rate: float
    parsed: Figures
    imputed: Figures
    imputed_with: str


@dataclass(frozen=True, slots=True)
class RaterCeiling:
    """How well one rater agrees with the median of the others: the mean PCC, each rater's own, and how many rows."""

    pcc: float
    per_rater: tuple[float, ...]
    count: int


# -- scores --------------------------------------------------------------------------------------------------------


def field_scores(
    predictions: Sequence[float], references: Sequence[float], *, resamples: int = RESAMPLES
) -> FieldScores:
    """Agreement of predicted with reference scores of one field."""
    x, y = np.asarray(predictions, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"{x.shape} predictions for {y.shape} references")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a score is not finite; pass an answer without a usable score as None")
    nan = math.nan
    collapsed = x.size > 1 and _is_constant(x)
    varied = x.size > 1 and not _is_constant(y)
    mae = float(np.abs(x - y).mean()) if x.size else nan
    sd_ratio = float(x.std() / y.std()) if varied else nan
    if collapsed or not varied:
        return FieldScores(x.size, nan, nan, nan, collapsed, nan, mae, sd_ratio)
    from scipy import stats

    spearman = float(cast(Any, stats.spearmanr(x, y)).statistic)  # ties get their mean rank
    return FieldScores(x.size, _pcc(x, y), *pcc_interval(x, y, resamples=resamples), False, spearman, mae, sd_ratio)


def _pcc(x: np.ndarray, y: np.ndarray) -> float:
    from scipy import stats

    return float(cast(Any, stats.pearsonr(x, y)).statistic)


def pcc_interval(x: np.ndarray, y: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the PCC; resamples without variation have none and are left out."""
    return bootstrap_interval(_pcc_of_rows, x, y, resamples=resamples, seed=seed)


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
) -> ScoreReport:
    """Every score metric per field, over parsed answers and with failures imputed.

    A prediction that is None, or a field that is missing or not finite, is a failure; the value of `impute` takes its
    place: the `train_mean` of the training references. References are the raters' scores, complete.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    failed: set[int] = set()
    parsed: dict[str, FieldScores] = {}
    imputed: dict[str, FieldScores] = {}
    for field in SCORE_FIELDS:
        truths = [float(row[field]) for row in references]
        values = [_finite(answer, field) for answer in predictions]
        failed |= {index for index, value in enumerate(values) if value is None}
        pairs = [(value, truth) for value, truth in zip(values, truths, strict=True) if value is not None]
        parsed[field] = field_scores([value for value, _ in pairs], [truth for _, truth in pairs])
        if impute is not None:
            imputed[field] = field_scores([impute[field] if value is None else value for value in values], truths)
    rate = ratio(len(references) - len(failed), len(references))
    if impute is None:
        return ScoreReport(rate, parsed, None, None)
    return ScoreReport(rate, parsed, imputed, {field: float(impute[field]) for field in SCORE_FIELDS})


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


def word_error_rate(references: Sequence[str], answers: Sequence[str | None]) -> AnswerReport[ErrorRate]:
    """WER = (S + D + I) / N over the corpus, aligned by jiwer (Morris, Maier & Green 2004), normalised and raw."""
    return _error_rates(references, answers, normalise_words, WORD_NORMALISATION)


def phone_error_rate(
    references: Sequence[Sequence[str]], answers: Sequence[Sequence[str] | None]
) -> AnswerReport[ErrorRate]:
    """PER, as WER, of phones against the realised ones; raw keeps stress digits and case."""
    texts = [None if phones is None else " ".join(phones) for phones in answers]
    wanted = [" ".join(phones) for phones in references]
    return _error_rates(wanted, texts, lambda text: " ".join(normalise_phones([text])), PHONE_NORMALISATION)


def _error_rates(
    references: Sequence[str], answers: Sequence[str | None], normalise: Callable[[str], str], normalisation: str
) -> AnswerReport[ErrorRate]:
    if len(references) != len(answers):
        raise ValueError(f"{len(answers)} answers for {len(references)} references")

    def error_rate(rows: list[tuple[str, str]]) -> ErrorRate:
        raw, counts = (
            edit_counts([prepare(reference) for reference, _ in rows], [prepare(answer) for _, answer in rows])
            for prepare in (str, normalise)
        )
        rate, raw_rate = (ratio(sum(errors), total) for *errors, total in (counts, raw))
        return ErrorRate(rate, raw_rate, *counts, normalisation)

    rows = list(zip(references, answers, strict=True))
    parsed = error_rate([(reference, answer) for reference, answer in rows if answer is not None])
    imputed = error_rate([(reference, answer or "") for reference, answer in rows])
    return AnswerReport(parse_rate(answers), parsed, imputed, EMPTY_ANSWER)


# -- training means and one-rater ceiling --------------------------------------------------------------------------


def train_mean(references: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean score per field of the training references: failures are imputed with it, and it is the first baseline."""
    return {field: ratio(math.fsum(row[field] for row in references), len(references)) for field in SCORE_FIELDS}


def rater_ceiling(ratings: Sequence[Sequence[float] | None]) -> RaterCeiling | None:
    """PCC of one rater against the median of the others, averaged over raters: what one human reaches.

    `ratings` are per utterance the raters' scores in a fixed order; None without any. Fewer than two utterances or
    raters give None. A rater with constant scores has NaN and is left out of the mean.
    """
    rated = [list(row) for row in ratings if row]
    if len({len(row) for row in rated}) > 1:
        raise ValueError("utterances have different numbers of raters")
    if len(rated) < 2 or len(rated[0]) < 2:
        return None
    scores_NR = np.asarray(rated, dtype=np.float64)  # utterances, raters
    pccs = []
    for rater in range(scores_NR.shape[1]):
        own, others = scores_NR[:, rater], np.median(np.delete(scores_NR, rater, axis=1), axis=1)
        pccs.append(math.nan if _is_constant(own) or _is_constant(others) else _pcc(own, others))
    finite = [pcc for pcc in pccs if not math.isnan(pcc)]
    return RaterCeiling(ratio(math.fsum(finite), len(finite)), tuple(pccs), len(rated))

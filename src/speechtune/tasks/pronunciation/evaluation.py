"""Evaluate raw answers to task samples: every metric, also per group, beside baselines and the one-rater ceiling.

Answers come as text, in the order of the samples. Metrics are those of `metrics` and `mdd`, each over the answers that
could be read and over all of them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from speechtune.tasks.pronunciation import metrics
from speechtune.tasks.pronunciation.answers import Answer, read_answer
from speechtune.tasks.pronunciation.mdd import CopyBaseline, MddResult, PhoneMatch, copy_baseline, mdd, phone_match_f1
from speechtune.tasks.pronunciation.metrics import AnswerReport, ErrorRate, RaterCeiling, ScoreReport
from speechtune.tasks.pronunciation.targets import (
    SCORE_FIELDS,
    Task,
    canonical_phones,
    is_utterance,
    target_of,
    task_of,
)
from speechtune.tasks.results import to_json
from speechtune.tasks.statistics import by_group
from speechtune.types import Sample

ADULT_YEARS = 18
MIN_GROUP_PCC = 3
TRAIN_MEANS = "the mean scores of the training data"


@dataclass(frozen=True, slots=True)
class UtteranceRow:
    """One answer beside its reference.

    Attributes:
        utterance: `id` without the task.
        reference: scores, unrounded where the labels have fractions; or `word_transcript` and `phones`.
        canonical: phones the text asks for; None where they are not known, and for APA.
        text: the raw answer; None where the model gave none.
        parsed: what could be read of it, see `answers.Answer.values`; None for nothing.
        errors: of what could be read: answer minus reference per score; `wer` and `per` of this utterance.
    """

    id: str
    utterance: str
    speaker: str | None
    age: float | None
    gender: str | None
    task: Task
    reference: Mapping[str, Any]
    canonical: list[str] | None
    text: str | None
    parsed: Mapping[str, Any] | None
    truncated: bool
    errors: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ApaFigures:
    """Scores; `ceiling` holds the fields with rater data, `imputed_from` says where `scores.imputed_with` comes from.

    `baseline` answers the training means to everything; it and `imputed_from` are None without training data.
    """

    count: int
    parse_rate: float
    truncated: int
    scores: ScoreReport
    imputed_from: str | None
    baseline: ScoreReport | None
    ceiling: dict[str, RaterCeiling]


@dataclass(frozen=True, slots=True)
class MddFigures:
    """Words and phones; `detection` and `baseline` over the `canonical_count` utterances with canonical phones.

    `parse_rate` is the share of answers with both transcripts; `unknown_labels` counts predicted labels outside the
    inventory. `phone_match_imputed` takes an answer that could not be read as empty. `baseline` answers the canonical
    phones; it and `detection` are None where no utterance has them.
    """

    count: int
    parse_rate: float
    truncated: int
    unknown_labels: int
    wer: AnswerReport[ErrorRate]
    per: AnswerReport[ErrorRate]
    phone_match: PhoneMatch
    phone_match_imputed: PhoneMatch
    canonical_count: int
    detection: AnswerReport[MddResult] | None
    baseline: CopyBaseline | None


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """All figures of one evaluation: `apa` and `mdd` are None without samples of the task, `notes` say what is missing.

    `groups`: "speaker", "age_group" and "gender" -> group -> a few figures over the answers that could be read.
    `strength` is that of the adapter; None without one.
    """

    apa: ApaFigures | None
    mdd: MddFigures | None
    groups: dict[str, dict[str, dict[str, Any]]]
    notes: tuple[str, ...]
    rows: tuple[UtteranceRow, ...] = field(repr=False)
    strength: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All but the rows as a plain dict; what is not defined is None."""
        values = to_json(replace(self, rows=()))
        del values["rows"]
        return values


def evaluate_answers(
    samples: Sequence[Sample], texts: Sequence[str | None], train: Sequence[Sample] = ()
) -> EvaluationReport:
    """Measure raw answers against the references of their samples.

    Args:
        samples: task samples.
        texts: the answers in the same order; None where there is none.
        train: training data, utterances or task samples, for the mean scores that replace failures and make the
            baseline. Without it there is neither, and a failure has no score.

    Raises ValueError: another number of texts than of samples; ManifestError: a sample without task, or without labels
    and target.
    """
    if len(samples) != len(texts):
        raise ValueError(f"{len(texts)} answers for {len(samples)} samples")
    answers = [read_answer(task_of(sample), text) for sample, text in zip(samples, texts, strict=True)]
    rows = tuple(map(_row, samples, texts, answers))
    notes: list[str] = []
    scored = [(sample, row) for sample, row in zip(samples, rows, strict=True) if row.task == "APA"]
    transcribed = [(row, answer) for row, answer in zip(rows, answers, strict=True) if row.task == "MDD"]
    figures = _apa_figures(scored, train, notes), _mdd_figures(transcribed, notes)
    ages = {True: "child", False: "adult"}
    keys = {
        "speaker": lambda row: row.speaker,
        "age_group": lambda row: None if row.age is None else ages[row.age < ADULT_YEARS],
        "gender": lambda row: row.gender,
    }
    groups = {name: by_group(rows, key, _group_figures) for name, key in keys.items()}
    return EvaluationReport(*figures, groups, tuple(notes), rows)


def _row(sample: Sample, text: str | None, answer: Answer) -> UtteranceRow:
    task = task_of(sample)
    labels = sample.pronunciation
    if task == "APA":
        reference: dict[str, Any] = _reference_scores(sample)
    else:
        target = target_of(sample)
        phones = str(target["phoneme_transcript"]).split()
        reference = {"word_transcript": target["word_transcript"], "phones": phones}
    return UtteranceRow(
        id=sample.id,
        utterance=sample.id.removesuffix(f"#{task}"),
        speaker=sample.speaker,
        age=labels.age if labels else None,
        gender=labels.gender if labels else None,
        task=task,
        reference=reference,
        canonical=canonical_phones(sample) if task == "MDD" else None,
        text=text,
        parsed=answer.values or None,
        truncated=answer.truncated,
        errors=_errors(task, reference, answer.values),
    )


def _reference_scores(sample: Sample) -> dict[str, float]:
    """The labels' scores, else the target's, which are rounded."""
    labels = sample.pronunciation
    given = labels.scores if labels and labels.scores else target_of(sample)
    return {name: float(given[name]) for name in SCORE_FIELDS}


def _errors(task: Task, reference: Mapping[str, Any], parsed: Mapping[str, Any]) -> dict[str, float]:
    if task == "APA":
        return {name: parsed[name] - reference[name] for name in SCORE_FIELDS if name in parsed}
    rates = {"wer": ("word_transcript", metrics.word_error_rate), "per": ("phones", metrics.phone_error_rate)}
    return {
        name: error_rate([reference[field]], [parsed[field]]).parsed.rate
        for name, (field, error_rate) in rates.items()
        if field in parsed
    }


def _apa_figures(
    pairs: Sequence[tuple[Sample, UtteranceRow]], train: Sequence[Sample], notes: list[str]
) -> ApaFigures | None:
    if not pairs:
        notes.append("no scores: there are no APA samples")
        return None
    rows = [row for _, row in pairs]
    references = [row.reference for row in rows]
    # an utterance gives up to two task samples with the same labels; its scores count once
    trained = [_reference_scores(sample) for sample in train if is_utterance(sample) or task_of(sample) == "APA"]
    means = metrics.train_mean(trained) if trained else None
    scores = metrics.score_report([row.parsed for row in rows], references, impute=means)
    if means is None:  # the evaluated references' own means would make failures look like good answers
        notes.append("no train-mean baseline, and no score for a failure: no training data with scores was given")
    # it answers the train mean to everything: "collapsed" in every field, but with an MAE
    baseline = metrics.score_report([means] * len(rows), references) if means else None
    return ApaFigures(
        count=len(rows),
        parse_rate=scores.parse_rate,
        truncated=sum(row.truncated for row in rows),
        scores=scores,
        imputed_from=TRAIN_MEANS if means else None,
        baseline=baseline,
        ceiling=_ceiling([sample for sample, _ in pairs], notes),
    )


def _ceiling(samples: Sequence[Sample], notes: list[str]) -> dict[str, RaterCeiling]:
    raters = [sample.pronunciation.raters if sample.pronunciation else {} for sample in samples]
    ceiling: dict[str, RaterCeiling] = {}
    for name in SCORE_FIELDS:
        ratings = [row.get(name) for row in raters]
        if not any(ratings):
            reason = "no sample has scores of single raters (labels.raters)"
        elif len({len(row) for row in ratings if row}) > 1:
            reason = "samples have different numbers of raters"
        elif pccs := metrics.rater_ceiling(ratings):
            ceiling[name] = pccs
            continue
        else:
            reason = "fewer than two samples or two raters"
        notes.append(f"no one-rater ceiling of {name}: {reason}")
    return ceiling


def _mdd_figures(pairs: Sequence[tuple[UtteranceRow, Answer]], notes: list[str]) -> MddFigures | None:
    if not pairs:
        notes.append("no transcripts: there are no MDD samples")
        return None
    rows, answers = [row for row, _ in pairs], [answer for _, answer in pairs]
    realised, predicted = _columns(rows, "phones")
    per = metrics.phone_error_rate(realised, predicted)
    # the labels read are normalised already, so the raw rate comes from those that the model wrote
    raw = metrics.phone_error_rate(realised, [answer.raw_phones for answer in answers])
    parsed = replace(per.parsed, raw_rate=raw.parsed.raw_rate)
    per = replace(per, parsed=parsed, imputed=replace(per.imputed, raw_rate=raw.imputed.raw_rate))
    read = [row for row in rows if "phones" in (row.parsed or {})]
    known = [row for row in rows if row.canonical is not None]
    if len(known) < len(rows):
        missing = f"{len(rows) - len(known)} of {len(rows)} MDD samples have no canonical phones"
        notes.append(f"{missing}: they count for WER, PER and phone match, but not for detection and its baseline")
    canonical, (known_realised, known_predicted) = [row.canonical or [] for row in known], _columns(known, "phones")
    return MddFigures(
        count=len(rows),
        parse_rate=sum(len(row.parsed or {}) == 2 for row in rows) / len(rows),
        truncated=sum(row.truncated for row in rows),
        unknown_labels=sum(answer.unknown_labels for answer in answers),
        wer=metrics.word_error_rate(*_columns(rows, "word_transcript")),
        per=per,
        phone_match=phone_match_f1(*_columns(read, "phones")),
        phone_match_imputed=phone_match_f1(realised, predicted),
        canonical_count=len(known),
        detection=mdd(canonical, known_realised, known_predicted) if known else None,
        baseline=copy_baseline(canonical, known_realised) if known else None,
    )


def _columns(rows: Sequence[UtteranceRow], name: str) -> tuple[list[Any], list[Any]]:
    """A value of the references, and of the answers; None where it could not be read."""
    return [row.reference[name] for row in rows], [(row.parsed or {}).get(name) for row in rows]


def _group_figures(rows: list[UtteranceRow]) -> dict[str, Any]:
    """The few figures of one group, over the answers that could be read."""
    figures: dict[str, Any] = {"utterances": len({row.utterance for row in rows})}
    scored = [row for row in rows if row.task == "APA"]
    if scored:
        figures["apa_count"] = len(scored)
        for name in SCORE_FIELDS:
            pairs = [(row.parsed[name], row.reference[name]) for row in scored if row.parsed and name in row.parsed]
            scores = metrics.field_scores([p for p, _ in pairs], [r for _, r in pairs], resamples=1)  # no interval
            pcc = scores.pcc if scores.count >= MIN_GROUP_PCC else None
            figures[name] = {"count": scores.count, "pcc": pcc, "collapsed": scores.collapsed, "mae": scores.mae}
    transcribed = [row for row in rows if row.task == "MDD"]
    if transcribed:
        known = [row for row in transcribed if row.canonical is not None and "phones" in (row.parsed or {})]
        words = metrics.word_error_rate(*_columns(transcribed, "word_transcript"))
        phones = metrics.phone_error_rate(*_columns(transcribed, "phones"))
        detection = mdd([row.canonical or [] for row in known], *_columns(known, "phones")).parsed
        figures |= {"mdd_count": len(transcribed), "phones_read": phones.parse_rate}
        figures |= {"wer": words.parsed.rate, "per": phones.parsed.rate, "mdd_f1": detection.f1}
    return figures


def print_evaluation(report: EvaluationReport, console: Console) -> None:
    """Print one table: each figure of the answers that could be read, of all, of the baseline, and the ceiling."""
    table = Table("figure", "this model", "failures imputed", "baseline", "one rater")
    if report.apa is not None:
        _add_apa(table, report.apa)
    if report.mdd is not None:
        table.add_section()
        _add_mdd(table, report.mdd)
    console.print(table)
    means = f"{report.apa.imputed_from}, " if report.apa and report.apa.imputed_from else ""
    imputed = f"imputed: {means}empty transcripts, and for detection the canonical phones"
    baseline = "baseline: the train mean of each score, and the canonical phones as the answer"
    console.print(Text("\n".join([imputed, baseline, *(f"note: {note}" for note in report.notes)])))


def _add_apa(table: Table, figures: ApaFigures) -> None:
    _add(table, "APA answers read", f"{figures.parse_rate:.1%} of {figures.count}")
    _add(table, "APA answers cut off", str(figures.truncated))
    reports = (figures.scores.parsed, figures.scores.imputed, figures.baseline.parsed if figures.baseline else None)
    for name in SCORE_FIELDS:
        columns = [report[name] if report else None for report in reports]
        ceiling = figures.ceiling.get(name)
        pccs = [column.pcc_text() if column else "-" for column in columns]
        _add(table, f"{name} PCC", *pccs, _number(ceiling.pcc if ceiling else None))
        for label, attribute in (("Spearman", "spearman"), ("MAE", "mae"), ("SD ratio", "sd_ratio")):
            _add_figure(table, f"{name} {label}", columns, attribute)


def _add_mdd(table: Table, figures: MddFigures) -> None:
    _add(table, "MDD answers read", f"{figures.parse_rate:.1%} of {figures.count}")
    _add(table, "MDD answers cut off", str(figures.truncated))
    copied, detection = figures.baseline, figures.detection
    for name, report, baseline in (("WER", figures.wer, None), ("PER", figures.per, copied and copied.per.parsed)):
        columns = (report.parsed, report.imputed, baseline)
        _add_figure(table, name, columns, "rate")
        _add_figure(table, f"{name} before normalisation", columns, "raw_rate")
    detections = (detection and detection.parsed, detection and detection.imputed, copied and copied.mdd.parsed)
    names = {"f1": "F1", "precision": "precision", "recall": "recall", "false_acceptance_rate": "FAR"}
    names |= {"false_rejection_rate": "FRR", "diagnosis_error_rate": "DER"}
    for attribute, label in names.items():
        _add_figure(table, f"MDD {label}", detections, attribute)
    _add(table, "TA TR FA FR (CD DE)", *(d.counts_text() if d else "-" for d in detections))
    matches = (figures.phone_match, figures.phone_match_imputed, copied and copied.phone_match)
    _add_figure(table, f"phone match F1 ({figures.phone_match.label})", matches, "f1")


def _add(table: Table, *cells: str) -> None:
    table.add_row(*map(Text, cells))


def _add_figure(table: Table, label: str, columns: Sequence[object | None], attribute: str) -> None:
    _add(table, label, *(_number(getattr(column, attribute, None)) for column in columns))


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return "undefined" if math.isnan(value) else f"{value:.3f}"

"""Scores of Phi-4-multimodal: answers to both tasks, in a few figures for curves and the choice of checkpoints."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from speechtune.tasks.pronunciation.evaluation import evaluate_answers
from speechtune.tasks.pronunciation.targets import SCORE_FIELDS, TASKS
from speechtune.types import Output, Sample, Scored

SCORE_NAMES = {
    **{f"pcc_{name}": "max" for name in SCORE_FIELDS},
    **{f"mae_{name}": "min" for name in SCORE_FIELDS},
    "wer": "min",
    "per": "min",
    "mdd_f1": "max",
    "phone_match_f1": "max",
    "parse_rate": "max",
    "stop_rate": "max",
    **{f"token_accuracy_{task}": "max" for task in TASKS},
}
FEW = 0.5


def score_answers(samples: Sequence[Sample], outputs: Sequence[Output], training: Sequence[Sample]) -> Scored:
    """Figures over all answers, failures imputed with the training data's means: they must cost something.

    Those that are not defined are left out: a correlation of constant answers, a score that no answer holds.
    """
    report = evaluate_answers(samples, [output.text for output in outputs], training)
    figures: dict[str, float] = {}
    rates = []
    if report.apa is not None:
        rates.append((report.apa.parse_rate, report.apa.count))
        parsed = report.apa.scores.parsed
        for name, agreement in (report.apa.scores.imputed or parsed).items():
            if parsed[name].count:
                figures |= {f"pcc_{name}": agreement.pcc, f"mae_{name}": agreement.mae}
    if report.mdd is not None:
        rates.append((report.mdd.parse_rate, report.mdd.count))
        figures |= {"wer": report.mdd.wer.imputed.rate, "per": report.mdd.per.imputed.rate}
        figures["phone_match_f1"] = report.mdd.phone_match_imputed.f1
        if report.mdd.detection is not None:
            figures["mdd_f1"] = report.mdd.detection.imputed.f1
    figures["parse_rate"] = sum(rate * count for rate, count in rates) / sum(count for _, count in rates)
    figures["stop_rate"] = sum(output.stopped for output in outputs) / len(outputs)
    defined = {name: value for name, value in figures.items() if math.isfinite(value)}
    return Scored(defined, [asdict(row) for row in report.rows])


def warnings_of(scores: Mapping[str, float]) -> list[str]:
    """Answers that do not end, cannot be read, or are all alike."""
    warnings = []
    if scores.get("stop_rate", 1.0) < FEW:
        warnings.append(f"only {scores['stop_rate']:.0%} of the answers end by themselves: is <|end|> in the targets?")
    if scores.get("parse_rate", 1.0) < FEW:
        warnings.append(f"only {scores['parse_rate']:.0%} of the answers can be read as JSON with all fields")
    if "mae_total" in scores and "pcc_total" not in scores:
        warnings.append("the model gives every recording the same total score: it does not use the audio")
    return warnings

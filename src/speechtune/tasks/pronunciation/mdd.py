"""Mispronunciation detection and diagnosis: canonical, realised and predicted phones, aligned and counted.

Terms: *canonical* phones are what the text asks for, *realised* (annotated) ones what the speaker said, *predicted*
ones what the model transcribed. Phones are compared without stress digits; `<unk>` is a phone like any other.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from speechtune.tasks.pronunciation.metrics import (
    PHONE_NORMALISATION,
    AnswerReport,
    ErrorRate,
    normalise_phones,
    phone_error_rate,
)
from speechtune.tasks.statistics import parse_rate, ratio

Phones = Sequence[str]
Pair = tuple[str | None, str | None]
Column = tuple[str | None, str | None, str | None]  # canonical, realised, predicted; None is a gap
Outcome = Literal["TA", "FR", "FA", "CD", "DE"]

INSERTION_RULE = (
    "a realised phone between canonical ones is a mispronunciation (missed: FA; predicted there: TR), "
    "a predicted one that was not said is FR"
)
CANONICAL_ANSWER = "the canonical phones: nothing is detected"


@dataclass(frozen=True, slots=True)
class MddResult:
    """Counts and rates of detection and diagnosis; a rate with a zero denominator is NaN.

    Attributes:
        true_acceptance: TA, pronounced correctly and accepted.
        true_rejection: TR, mispronounced and flagged; `correct_diagnosis` + `diagnosis_error`.
        false_acceptance: FA, mispronounced and missed.
        false_rejection: FR, pronounced correctly and flagged.
        correct_diagnosis: CD, flagged as the phone that was said.
        diagnosis_error: DE, flagged as another one.
        precision: TR / (TR + FR).
        recall: TR / (TR + FA).
        f1: 2 TR / (2 TR + FR + FA), the harmonic mean of the two.
        false_acceptance_rate: FAR = FA / (FA + TR).
        false_rejection_rate: FRR = FR / (FR + TA).
        diagnosis_error_rate: DER = DE / (CD + DE).
    """

    true_acceptance: int
    true_rejection: int
    false_acceptance: int
    false_rejection: int
    correct_diagnosis: int
    diagnosis_error: int
    precision: float
    recall: float
    f1: float
    false_acceptance_rate: float
    false_rejection_rate: float
    diagnosis_error_rate: float
    insertion_rule: str = INSERTION_RULE
    normalisation: str = PHONE_NORMALISATION

    def counts_text(self) -> str:
        """The counts as "TA TR FA FR (CD DE)"."""
        decisions = f"{self.true_acceptance} {self.true_rejection} {self.false_acceptance} {self.false_rejection}"
        return f"{decisions} ({self.correct_diagnosis} {self.diagnosis_error})"


@dataclass(frozen=True, slots=True)
class PhoneMatch:
    """Token matching of predicted against realised phones; says little about detection, see `phone_match_f1`."""

    precision: float
    recall: float
    f1: float
    matches: int
    predicted_phones: int
    realised_phones: int
    label: str = "paper-comparable"


@dataclass(frozen=True, slots=True)
class CopyBaseline:
    """The figures of a model that ignores the recording and repeats the canonical phones."""

    per: AnswerReport[ErrorRate]
    mdd: AnswerReport[MddResult]
    phone_match: PhoneMatch


def align(first: Phones, second: Phones) -> list[Pair]:
    """Minimum edit distance alignment (Levenshtein 1966; every edit costs 1).

    Ties: of the alignments with the fewest edits, those with the most matches; of these, from the left, a match or
    substitution before a deletion (a phone of `first` alone) before an insertion (a phone of `second` alone).
    None stands for the phone that is not there.
    """
    # jiwer's alignment has no rule for ties, and which phones pair up decides what counts as a correct diagnosis
    rows, columns = len(first), len(second)
    edit = rows + columns + 1  # one edit weighs more than all matches, each of which counts -1
    cost = [[edit * (rows - i + columns - j) for j in range(columns + 1)] for i in range(rows + 1)]  # of the rest
    for i in range(rows - 1, -1, -1):
        for j in range(columns - 1, -1, -1):
            both = cost[i + 1][j + 1] + (-1 if first[i] == second[j] else edit)
            cost[i][j] = min(both, cost[i + 1][j] + edit, cost[i][j + 1] + edit)
    pairs: list[Pair] = []
    i = j = 0
    while i < rows or j < columns:
        here = cost[i][j]
        if i < rows and j < columns and here == cost[i + 1][j + 1] + (-1 if first[i] == second[j] else edit):
            pairs.append((first[i], second[j]))
            i, j = i + 1, j + 1
        elif i < rows and here == cost[i + 1][j] + edit:
            pairs.append((first[i], None))
            i += 1
        else:
            pairs.append((None, second[j]))
            j += 1
    return pairs


def align_three(canonical: Phones, realised: Phones, predicted: Phones) -> list[Column]:
    """Canonical phones with what was said and what was predicted for each, and insertions between them.

    Both other sequences are aligned with the canonical one by `align`; what they insert at the same place is aligned
    with each other in the same way. So equal answers always fall into equal columns.
    """
    columns: list[Column] = []
    slots = zip([*canonical, None], _slots(canonical, realised), _slots(canonical, predicted), strict=True)
    for expected, (said_before, said), (answered_before, answered) in slots:
        columns += [(None, a, p) for a, p in align(said_before, answered_before)]
        if expected is not None:
            columns.append((expected, said, answered))
    return columns


def _slots(canonical: Phones, other: Phones) -> list[tuple[list[str], str | None]]:
    """Per canonical phone what `other` inserts before it, and has in its place; and what it inserts at the end."""
    slots: list[tuple[list[str], str | None]] = []
    inserted: list[str] = []
    for expected, given in align(canonical, other):
        if expected is None and given is not None:
            inserted.append(given)
        else:
            slots.append((inserted, given))
            inserted = []
    return [*slots, (inserted, None)]


def classify(column: Column) -> Outcome:
    """The outcome of one column; gaps compare like phones, which is `INSERTION_RULE` where the canonical is a gap."""
    canonical, realised, predicted = column
    if realised == canonical:
        return "TA" if predicted == canonical else "FR"
    if predicted == canonical:
        return "FA"
    return "CD" if predicted == realised else "DE"


def mdd(
    canonical: Sequence[Phones], realised: Sequence[Phones], predicted: Sequence[Phones | None]
) -> AnswerReport[MddResult]:
    """Detection and diagnosis over a corpus (Qian, Soong & Meng 2010; Leung, Liu & Meng 2019).

    A prediction of None is an answer that could not be read."""
    rows = list(zip(canonical, realised, predicted, strict=True))
    parsed = [(c, a, p) for c, a, p in rows if p is not None]
    imputed = [(c, a, c if p is None else p) for c, a, p in rows]
    return AnswerReport(parse_rate(predicted), _count(parsed), _count(imputed), CANONICAL_ANSWER)


def _count(rows: Sequence[tuple[Phones, Phones, Phones]]) -> MddResult:
    outcomes: Counter[Outcome] = Counter()
    for row in rows:
        outcomes.update(map(classify, align_three(*map(normalise_phones, row))))
    ta, fa, fr, cd, de = (outcomes[name] for name in ("TA", "FA", "FR", "CD", "DE"))
    tr = cd + de
    return MddResult(
        true_acceptance=ta,
        true_rejection=tr,
        false_acceptance=fa,
        false_rejection=fr,
        correct_diagnosis=cd,
        diagnosis_error=de,
        precision=ratio(tr, tr + fr),
        recall=ratio(tr, tr + fa),
        f1=ratio(2 * tr, 2 * tr + fr + fa),
        false_acceptance_rate=ratio(fa, fa + tr),
        false_rejection_rate=ratio(fr, fr + ta),
        diagnosis_error_rate=ratio(de, cd + de),
    )


def phone_match_f1(realised: Sequence[Phones], predicted: Sequence[Phones | None]) -> PhoneMatch:
    """Precision, recall and F1 of predicted phones as tokens matched with the realised ones by `align`.

    The F1 of arXiv 2509.02915 behaves like this and not like detection: precision and recall are nearly equal and
    move with the PER, and copying the canonical phones scores about 0.96. An answer that could not be read has no
    phones, so it costs recall.
    """
    matches = num_realised = num_predicted = 0
    for truth, answer in zip(realised, predicted, strict=True):
        first, second = normalise_phones(truth), normalise_phones(answer or ())
        matches += sum(a == b for a, b in align(first, second))
        num_realised, num_predicted = num_realised + len(first), num_predicted + len(second)
    precision, recall = ratio(matches, num_predicted), ratio(matches, num_realised)
    f1 = ratio(2 * matches, num_realised + num_predicted)
    return PhoneMatch(precision, recall, f1, matches, num_predicted, num_realised)


def copy_baseline(canonical: Sequence[Phones], realised: Sequence[Phones]) -> CopyBaseline:
    """The figures of canonical phones given as the answer: a low PER, and a recall of 0 at detection."""
    per = phone_error_rate(realised, canonical)
    return CopyBaseline(per, mdd(canonical, realised, canonical), phone_match_f1(realised, canonical))

"""Metrics of pronunciation: against scipy and jiwer, against an exhaustive aligner, by hand, and on real raters."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speechtune.tasks import results, statistics
from speechtune.tasks.pronunciation import mdd, metrics

jiwer = pytest.importorskip("jiwer")
stats = pytest.importorskip("scipy.stats")

LABELS = Path(__file__).parents[3] / "shared/data/speechocean762-labels.jsonl.gz"
FIELDS = metrics.SCORE_FIELDS


def noisy(count: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Integer scores from 0 to 10 with ties, and predictions that correlate with them."""
    generator = np.random.default_rng(seed)
    references = generator.integers(2, 11, count).astype(float)
    return np.clip(np.rint(references + generator.normal(0, 2, count)), 0, 10), references


def rows(values: np.ndarray) -> list[dict[str, float]]:
    return [dict.fromkeys(FIELDS, float(value)) for value in values]


@cache
def labels() -> list[dict[str, Any]]:
    if not LABELS.is_file():
        pytest.skip(f"no human labels at {LABELS}")
    with gzip.open(LABELS, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# -- scores --------------------------------------------------------------------------------------------------------


def test_field_scores_agree_with_scipy_and_numpy() -> None:
    x, y = noisy()
    result = metrics.field_scores(list(x), list(y))
    assert result.count == 200 and not result.collapsed
    assert result.pcc == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert result.pcc == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)
    assert result.spearman == pytest.approx(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1], abs=1e-12)
    assert result.mae == pytest.approx(sum(abs(a - b) for a, b in zip(x, y, strict=True)) / 200)
    assert result.sd_ratio == pytest.approx(np.std(x, ddof=1) / np.std(y, ddof=1))
    assert metrics.field_scores(list(-x), list(y)).pcc == pytest.approx(-result.pcc)


def test_constant_predictions_are_collapsed_and_not_zero() -> None:
    _, y = noisy(50)
    for constant in (7.0, 0.1 + 0.2, 1e6 / 3):
        result = metrics.field_scores([constant] * 50, list(y))
        assert result.collapsed and math.isnan(result.pcc) and math.isnan(result.spearman)
        assert math.isnan(result.pcc_low) and result.pcc_text() == "collapsed"
        assert result.sd_ratio == pytest.approx(0.0, abs=1e-9) and result.mae > 0
    plain = json.loads(json.dumps(results.to_json(result), allow_nan=False))
    assert plain["pcc"] is None and plain["pcc_high"] is None and plain["collapsed"] is True


def test_predictions_that_vary_a_little_are_not_collapsed() -> None:
    x, y = noisy(50)
    result = metrics.field_scores(list(7 + 1e-4 * x), list(y))
    assert not result.collapsed and result.pcc == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    assert result.sd_ratio < 1e-3


@pytest.mark.parametrize(("predictions", "references"), [([], []), ([3.0], [4.0]), ([1.0, 2.0], [5.0, 5.0])])
def test_what_has_no_correlation_is_undefined_but_not_collapsed(
    predictions: list[float], references: list[float]
) -> None:
    result = metrics.field_scores(predictions, references)
    assert math.isnan(result.pcc) and not result.collapsed and result.pcc_text() == "undefined"
    assert math.isnan(result.mae) == (not predictions)


def test_scores_that_are_not_finite_or_not_paired_are_refused() -> None:
    for bad in ([math.nan, 1.0], [math.inf, 1.0], [1.0]):
        with pytest.raises(ValueError):
            metrics.field_scores(bad, [1.0, 2.0])
    with pytest.raises(ValueError, match="1 predictions for 2"):
        metrics.score_report([None], rows(np.ones(2)))


def test_bootstrap_is_deterministic_and_follows_its_definition() -> None:
    x, y = noisy(60)
    interval = metrics.pcc_interval(x, y, resamples=300, seed=3)
    assert interval == metrics.pcc_interval(x, y, resamples=300, seed=3)
    assert interval != metrics.pcc_interval(x, y, resamples=300, seed=4)
    drawn = np.random.default_rng(3).integers(0, 60, size=(300, 60))
    pccs = [np.corrcoef(x[index], y[index])[0, 1] for index in drawn]
    assert interval == pytest.approx(np.percentile(pccs, [2.5, 97.5]), abs=1e-12)


def test_bootstrap_does_not_depend_on_its_chunks() -> None:
    x, _ = noisy(60)
    together, in_chunks = (
        statistics.bootstrap_interval(lambda x_BN: x_BN.mean(axis=1), x, resamples=300, chunk_elements=elements)
        for elements in (300 * 60, 700)
    )
    assert in_chunks == pytest.approx(together, abs=1e-12)


def test_bootstrap_covers_the_true_correlation() -> None:
    """Of 200 samples with a PCC of 0.7, about 95 % of the intervals hold 0.7 (binomial: 0.95 +- 0.015)."""
    generator = np.random.default_rng(11)
    covered = 0
    for seed in range(200):
        x, noise = generator.normal(size=(2, 150))
        low, high = metrics.pcc_interval(x, 0.7 * x + math.sqrt(1 - 0.49) * noise, resamples=300, seed=seed)
        covered += low <= 0.7 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_bootstrap_leaves_out_resamples_without_variation() -> None:
    low, high = metrics.pcc_interval(np.array([0.1, 0.1, 0.1, 0.9]), np.arange(4.0))  # about a third are constant
    assert -1 <= low <= high <= 1
    assert all(math.isnan(end) for end in metrics.pcc_interval(np.full(3, 0.1), np.arange(3.0)))


# -- failures ------------------------------------------------------------------------------------------------------


def test_failures_are_left_out_and_imputed() -> None:
    x, y = noisy(40)
    answers: list[Any] = rows(x)
    answers[0], answers[1] = None, None
    answers[2] = {"accuracy": 5.0, "fluency": math.nan, "prosodic": None}  # total is missing
    means = {"accuracy": 1.0, "fluency": 2.0, "prosodic": 3.0, "total": 4.0}
    report = metrics.score_report(answers, rows(y), impute=means)
    assert report.parse_rate == 37 / 40 and report.imputed_with == means and report.imputed
    assert report.parsed["accuracy"].count == 38 and report.parsed["total"].count == 37
    assert report.parsed["fluency"] == metrics.field_scores(list(x[3:]), list(y[3:]))
    assert report.imputed["fluency"] == metrics.field_scores([2.0, 2.0, 2.0, *x[3:]], list(y))
    assert report.imputed["accuracy"] == metrics.field_scores([1.0, 1.0, 5.0, *x[3:]], list(y))
    assert metrics.score_report(answers, rows(y)).imputed is None


def test_no_answer_at_all_collapses_only_what_is_imputed() -> None:
    report = metrics.score_report([None] * 9, rows(noisy(9)[1]), impute=dict.fromkeys(FIELDS, 6.5))
    assert report.parse_rate == 0 and report.parsed["total"].count == 0 and not report.parsed["total"].collapsed
    assert report.imputed and report.imputed["total"].collapsed and report.imputed["total"].count == 9
    assert math.isnan(statistics.parse_rate([]))


# -- words and phones ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  We call it: BEAR!\n", "we call it bear"),
        ("Don’t 'do' ice-cream, o'clock", "don't do ice cream o'clock"),
        ("STRASSE Straße", "strasse strasse"),
        ("कि_या", "कि या"),  # a vowel sign is neither a letter nor punctuation
        ("...", ""),
    ],
)
def test_words_are_normalised(text: str, expected: str) -> None:
    assert metrics.normalise_words(text) == expected


def test_phones_are_normalised() -> None:
    assert metrics.normalise_phones(["ih0", "T", "D Z", "<unk>", "<DEL>", "ER1"]) == [
        "IH",
        "T",
        "D",
        "Z",
        "<UNK>",
        "ER",
    ]


def test_wer_is_normalised_with_the_raw_value_beside_it() -> None:
    report = metrics.word_error_rate(["WE CALL IT BEAR", "YES"], ["we call it a bear.", "Yes!"])
    assert (report.parsed.rate, report.parsed.raw_rate) == (1 / 5, 6 / 5)
    assert (report.parsed.substitutions, report.parsed.deletions, report.parsed.insertions) == (0, 0, 1)
    assert "case folded" in report.parsed.normalisation and report.parsed.reference_tokens == 5
    assert report.parse_rate == 1 and report.imputed == report.parsed


def test_failures_count_as_deletions_when_imputed() -> None:
    report = metrics.word_error_rate(["ONE TWO", "THREE"], [None, "three"])
    assert (report.parse_rate, report.parsed.rate, report.imputed.rate) == (0.5, 0.0, 2 / 3)
    assert report.imputed.deletions == 2 and "deleted" in report.imputed_with
    nothing = metrics.phone_error_rate([["T"]], [None])
    assert math.isnan(nothing.parsed.rate) and nothing.imputed.rate == 1.0
    assert math.isnan(metrics.word_error_rate(["?"], ["word"]).parsed.rate)  # no reference word is left
    with pytest.raises(ValueError, match="1 answers for 2"):
        metrics.word_error_rate(["A", "B"], ["A"])


def test_per_strips_stress_digits() -> None:
    report = metrics.phone_error_rate([["B", "EH0", "R"]], [["b", "eh1", "R"]])
    assert report.parsed.rate == 0 and report.parsed.raw_rate == pytest.approx(2 / 3)
    assert "stress" in report.parsed.normalisation


def test_error_rates_agree_with_jiwer_and_with_our_alignment() -> None:
    generator = random.Random(5)
    references = [generator.choices("ABCD", k=generator.randint(1, 20)) for _ in range(100)]
    answers = [generator.choices("ABCD", k=generator.randint(0, 20)) for _ in range(100)]
    result = metrics.phone_error_rate(references, answers).parsed
    expected = jiwer.wer([" ".join(row) for row in references], [" ".join(row) for row in answers])
    assert result.rate == pytest.approx(expected, abs=1e-12)
    edits = sum(a != b for pair in zip(references, answers, strict=True) for a, b in mdd.align(*pair))
    assert edits == result.substitutions + result.deletions + result.insertions
    assert result.reference_tokens == sum(map(len, references))


# -- detection: a second implementation -----------------------------------------------------------------------------


def every_alignment(first: list[str], second: list[str]) -> Iterator[list[tuple[str | None, str | None]]]:
    """All alignments there are: match or substitution, deletion, insertion, in this order at each step."""
    if not first and not second:
        yield []
    if first and second:
        yield from ([(first[0], second[0]), *rest] for rest in every_alignment(first[1:], second[1:]))
    if first:
        yield from ([(first[0], None), *rest] for rest in every_alignment(first[1:], second))
    if second:
        yield from ([(None, second[0]), *rest] for rest in every_alignment(first, second[1:]))


def best_alignment(first: list[str], second: list[str]) -> list[tuple[str | None, str | None]]:
    """`min` keeps the first of equals, and they come in the order of the tie rule."""
    return min(
        every_alignment(first, second), key=lambda way: (sum(a != b for a, b in way), -sum(a == b for a, b in way))
    )


def second_count(canonical: list[str], realised: list[str], predicted: list[str]) -> Counter[str]:
    """Detection without columns: positions that were said wrongly, and positions that were flagged, as dictionaries."""

    def differences(other: list[str]) -> tuple[dict[float, str | None], dict[int, list[str]]]:
        at: dict[float, str | None] = {}
        between: dict[int, list[str]] = {place: [] for place in range(len(canonical) + 1)}
        place = 0
        for expected, found in best_alignment(canonical, other):
            if expected is None:
                between[place].append(str(found))
                continue
            if found != expected:
                at[place] = found
            place += 1
        return at, between

    (wrong, said_between), (flagged, answered_between) = differences(realised), differences(predicted)
    for place in said_between:
        for order, (said, answered) in enumerate(best_alignment(said_between[place], answered_between[place])):
            key = place - 1 + (order + 1) / 100
            wrong.update({key: said} if said else {})
            flagged.update({key: answered} if answered else {})
    both = wrong.keys() & flagged.keys()
    correct = sum(wrong[key] == flagged[key] for key in both)
    return Counter(
        TR=len(both),
        CD=correct,
        DE=len(both) - correct,
        FA=len(wrong.keys() - flagged.keys()),
        FR=len(flagged.keys() - wrong.keys()),
        TA=len(canonical) - len({key for key in wrong.keys() | flagged.keys() if isinstance(key, int)}),
    )


def counts(result: mdd.MddResult) -> Counter[str]:
    return Counter(
        TA=result.true_acceptance,
        TR=result.true_rejection,
        FA=result.false_acceptance,
        FR=result.false_rejection,
        CD=result.correct_diagnosis,
        DE=result.diagnosis_error,
    )


def random_rows(count: int, longest: int, seed: int) -> list[tuple[list[str], list[str], list[str]]]:
    """Few phones, so that ties abound."""
    generator = random.Random(seed)

    def sequence() -> list[str]:
        return generator.choices(["AA", "B", "K"], k=generator.randint(0, longest))

    return [(sequence(), sequence(), sequence()) for _ in range(count)]


def test_alignment_and_counts_agree_with_the_exhaustive_aligner_on_1000_rows() -> None:
    total: Counter[str] = Counter()
    cases = random_rows(1000, 4, 1)
    for canonical, realised, predicted in cases:
        assert mdd.align(canonical, realised) == best_alignment(canonical, realised)
        expected = second_count(canonical, realised, predicted)
        assert counts(mdd.mdd([canonical], [realised], [predicted]).parsed) == expected
        total += expected
    assert counts(mdd.mdd(*map(list, zip(*cases, strict=True))).parsed) == total
    assert all(total[name] > 100 for name in ("TA", "TR", "FA", "FR", "CD", "DE"))


def test_alignments_of_longer_rows_keep_their_phones_and_their_meaning() -> None:
    for canonical, realised, predicted in random_rows(200, 30, 2):
        columns = mdd.align_three(canonical, realised, predicted)
        for place, phones in enumerate((canonical, realised, predicted)):
            assert [column[place] for column in columns if column[place] is not None] == phones
        perfect = counts(mdd.mdd([canonical], [realised], [realised]).parsed)
        assert not perfect["FA"] and not perfect["FR"] and not perfect["DE"]
        copied = counts(mdd.mdd([canonical], [realised], [canonical]).parsed)
        assert not copied["TR"] and not copied["FR"] and copied["FA"] == perfect["TR"]


@pytest.mark.parametrize(
    ("realised", "predicted", "expected"),
    [
        ("B EH R", "B EH R", "TA TA TA"),
        ("B AE R", "B AE R", "TA CD TA"),  # said AE, transcribed AE
        ("B AE R", "B IH R", "TA DE TA"),  # said AE, transcribed IH
        ("B AE R", "B EH R", "TA FA TA"),  # said AE, taken for EH
        ("B EH R", "B AE R", "TA FR TA"),  # said EH, transcribed AE
        ("B EH", "B EH", "TA TA CD"),  # R left out, and so transcribed
        ("B EH", "B EH R", "TA TA FA"),
        ("B EH", "B EH L", "TA TA DE"),
        ("B EH R", "B EH", "TA TA FR"),
        ("B EH AH R", "B EH AH R", "TA TA CD TA"),  # AH put in, and transcribed
        ("B EH AH R", "B EH AO R", "TA TA DE TA"),
        ("B EH AH R", "B EH R", "TA TA FA TA"),
        ("B EH R", "B EH AH R", "TA TA FR TA"),
        ("B EH R AH", "B EH R S AH", "TA TA TA FR CD"),
    ],
)
def test_each_outcome_by_hand(realised: str, predicted: str, expected: str) -> None:
    columns = mdd.align_three(["B", "EH", "R"], realised.split(), predicted.split())
    assert [mdd.classify(column) for column in columns] == expected.split()


def test_ties_prefer_matches_then_early_substitutions() -> None:
    assert mdd.align(["K", "B"], ["B", "T"]) == [("K", None), ("B", "B"), (None, "T")]  # also two substitutions
    assert mdd.align(["B", "B"], ["B"]) == [("B", "B"), ("B", None)]
    assert mdd.align(["K", "T"], ["B"]) == [("K", "B"), ("T", None)]
    assert mdd.align(["B"], ["K", "T"]) == [("B", "K"), (None, "T")]


def test_rates_by_hand() -> None:
    canonical = [["AA", "B", "K", "D", "IY", "F", "G", "HH", "IH", "JH"]] * 2
    realised = [["AA1", "T", "T", "T", "T", "F", "G", "HH", "IH", "JH"]] * 2  # four mispronounced, six sound
    predicted = [["AA", "T", "T", "S", "IY", "V", "V", "HH", "IH", "JH"], None]
    report = mdd.mdd(canonical, realised, predicted)
    result = report.parsed
    assert counts(result) == Counter(TA=4, TR=3, FA=1, FR=2, CD=2, DE=1)
    assert (result.precision, result.recall) == (3 / 5, 3 / 4)
    assert result.f1 == pytest.approx(2 * 0.6 * 0.75 / 1.35)
    assert (result.false_acceptance_rate, result.false_rejection_rate) == (1 / 4, 2 / 6)
    assert result.diagnosis_error_rate == pytest.approx(1 / 3)
    assert report.parse_rate == 0.5 and "canonical" in report.imputed_with
    assert counts(report.imputed) == Counter(TA=10, TR=3, FA=5, FR=2, CD=2, DE=1)  # the failure finds nothing


def test_zero_denominators_are_nan_and_not_zero() -> None:
    sound = mdd.mdd([["B"]], [["B"]], [["B"]]).parsed
    for name in ("precision", "recall", "f1", "false_acceptance_rate", "diagnosis_error_rate"):
        assert math.isnan(getattr(sound, name)) and results.to_json(sound)[name] is None
    assert sound.false_rejection_rate == 0
    missed = mdd.mdd([["B"]], [["P"]], [["B"]]).parsed
    assert math.isnan(missed.precision) and missed.recall == 0 and missed.f1 == 0  # nothing found of what is there
    assert math.isnan(missed.false_rejection_rate)
    assert math.isnan(mdd.phone_match_f1([[]], [[]]).f1)
    with pytest.raises(ValueError):
        mdd.mdd([["B"]], [], [])


def test_phone_match_is_labelled_and_counts_tokens() -> None:
    result = mdd.phone_match_f1([["B", "EH1", "R"], ["T"]], [["B", "EH", "L", "D"], None])
    assert (result.matches, result.predicted_phones, result.realised_phones) == (2, 4, 4)
    assert (result.precision, result.recall, result.f1) == (0.5, 0.5, 0.5)
    assert results.to_json(result)["label"] == "paper-comparable"


# -- baselines, ceiling, groups, JSON -------------------------------------------------------------------------------


def test_the_train_mean_is_collapsed_but_has_an_error() -> None:
    _, train = noisy(30, 1)
    _, test = noisy(30, 2)
    means = metrics.train_mean(rows(train))
    assert means == pytest.approx(dict.fromkeys(FIELDS, train.mean()))
    report = metrics.score_report([means] * len(test), rows(test))
    assert report.parse_rate == 1 and all(scores.collapsed for scores in report.parsed.values())
    assert report.parsed["total"].mae == pytest.approx(np.abs(test - train.mean()).mean())


def test_one_rater_against_the_median_of_the_others_by_hand() -> None:
    ratings = [[1.0, 2.0, 9.0, 5.0], [3.0, 1.0, 2.0, 5.0], [5.0, 6.0, 7.0, 5.0], [8.0, 8.0, 6.0, 5.0]]
    result = metrics.rater_ceiling([*ratings, None])
    assert result and result.count == 4 and math.isnan(result.per_rater[3])  # who always says the same has no PCC
    assert result.per_rater[0] == pytest.approx(np.corrcoef([1, 3, 5, 8], [5, 2, 6, 6])[0, 1])
    assert result.pcc == pytest.approx(np.mean(result.per_rater[:3]))
    assert metrics.rater_ceiling([None, None]) is None and metrics.rater_ceiling([[1.0], [2.0]]) is None
    with pytest.raises(ValueError, match="different numbers"):
        metrics.rater_ceiling([[1.0, 2.0], [1.0, 2.0, 3.0]])


@pytest.mark.parametrize(
    ("field", "expected"), [("accuracy", 0.79), ("fluency", 0.79), ("prosodic", 0.77), ("total", 0.82)]
)
def test_the_human_ceiling_on_speechocean762(field: str, expected: float) -> None:
    ratings = [row["raters"][field] if row["raters"] else None for row in labels()]
    result = metrics.rater_ceiling(ratings)
    assert result and result.count == 2500 and len(result.per_rater) == 5
    assert result.pcc == pytest.approx(expected, abs=0.006)


def test_copying_the_canonical_phones_has_a_low_per_and_detects_nothing() -> None:
    words = [[word for word in row["words"]] for row in labels()]
    canonical = [[phone for word in row for phone in word["phones"]] for row in words]
    scores = [[score for word in row for score in word["phones_accuracy"]] for row in words]
    realised = [
        ["<unk>" if score < 0.5 else phone for phone, score in zip(*pair, strict=True)]
        for pair in zip(canonical, scores, strict=True)
    ]
    result = mdd.copy_baseline(canonical, realised)
    assert result.per.parsed.rate == pytest.approx(0.036, abs=0.001)
    assert result.per.parsed.reference_tokens == 94_445
    found = result.mdd.parsed
    assert found.recall == 0 and math.isnan(found.precision) and found.false_acceptance_rate == 1
    assert result.phone_match.f1 == pytest.approx(0.964, abs=0.001)  # why this is no measure of detection


def test_any_measure_by_any_group() -> None:
    people = [("b", 9), ("a", 30), ("b", 31), (None, 8)]
    assert statistics.by_group(people, lambda row: row[0], len) == {"a": 1, "b": 2, "unknown": 1}
    ages = statistics.by_group(
        people, lambda row: "child" if row[1] < 16 else "adult", lambda group: [a for _, a in group]
    )
    assert list(ages.items()) == [("adult", [30, 31]), ("child", [9, 8])]


def test_every_result_is_plain_json() -> None:
    x, y = noisy(10)
    phones = [["B", "EH0"]]
    figures = [
        metrics.score_report([None, *rows(x[1:])], rows(y), impute=metrics.train_mean(rows(y))),
        metrics.score_report([metrics.train_mean(rows(y))] * len(y), rows(y)),
        metrics.rater_ceiling(np.column_stack([x, y]).tolist()),
        mdd.copy_baseline(phones, phones),
    ]
    for result in figures:
        plain = results.to_json(result)
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert results.to_json(figures[1])["parsed"]["total"]["collapsed"] is True
    with pytest.raises(TypeError):
        results.to_json({"pcc": 0.0})  # type: ignore[arg-type]


def test_importing_metrics_needs_neither_scipy_nor_jiwer() -> None:
    import subprocess
    import sys

    code = (
        "import sys, speechtune.tasks.pronunciation.mdd; sys.exit(bool({'scipy', 'jiwer', 'torch'} & {*sys.modules}))"
    )
    source = str(Path(__file__).parents[2] / "src")
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": source}, check=False).returncode == 0

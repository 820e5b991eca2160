"""Raw answers to figures: against scipy and jiwer, by hand on small cases, per group, and as files without NaN."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from assessment_helpers import write_folder
from speechtune.config import DataConfig
from speechtune.data.speechocean import read_speechocean
from speechtune.errors import CheckpointError, ManifestError
from speechtune.families.phi4_multimodal.scores import score_answers, warnings_of
from speechtune.tasks.pronunciation import evaluation, metrics
from speechtune.tasks.pronunciation.evaluation import EvaluationReport, evaluate_answers, print_evaluation
from speechtune.tasks.pronunciation.targets import SCORE_FIELDS, render_answer, target_of, task_of, task_samples
from speechtune.tasks.results import write_results
from speechtune.types import Mispronunciation, Output, Pronunciation, Sample, Word

jiwer = pytest.importorskip("jiwer")
stats = pytest.importorskip("scipy.stats")

TRUTHS = [8, 5, 9, 6, 3, 7]
GUESSES = [7, 6, 9, 7, 4, 5]
CANONICAL = ["B", "EH", "R", "K", "AO", "L"]
REALISED = [
    ["B", "EH", "R", "K", "AO", "L"],
    ["B", "EY", "R", "K", "AO", "L"],
    ["B", "EH", "K", "AO", "L"],
    ["P", "EH", "R", "K", "AO", "L"],
    ["B", "EH", "R", "K", "<unk>", "L"],
    ["B", "EH", "R", "K", "AO", "L"],
]
PREDICTED = [
    "B EH R K AO L",  # all TA
    "B EY R K AO L",  # one CD
    "B EH R K AO L",  # one FA
    "B EH R K AO L",  # one FA
    "B EH R K AA L",  # one DE
    "B EH R G AO L",  # one FR
]


def errors_of(realised: list[str]) -> tuple[Mispronunciation, ...]:
    """What turns CANONICAL into one of REALISED."""
    if len(realised) < len(CANONICAL):
        return (Mispronunciation(2, "R", "<DEL>"),)
    pairs = enumerate(zip(CANONICAL, realised, strict=True))
    return tuple(Mispronunciation(index, wanted, said) for index, (wanted, said) in pairs if wanted != said)


def utterance(index: int, **labels: Any) -> Sample:
    score = TRUTHS[index]
    scores = {"accuracy": score, "fluency": score, "prosodic": 10 - score, "total": score + 0.5}
    words = (Word("BEAR CALL", tuple(CANONICAL), mispronunciations=errors_of(REALISED[index])),)
    people: list[dict[str, Any]] = [{"age": 6, "gender": "f"}, {"age": 18, "gender": "m"}, {}]
    pronunciation = Pronunciation(scores=scores, words=words, **people[index // 2], **labels)
    return Sample(f"u{index}", "BEAR CALL", None, speaker=f"s{index // 2}", pronunciation=pronunciation)


def corpus() -> list[Sample]:
    samples = task_samples([utterance(i) for i in range(6)], {"APA": 1, "MDD": 1}, 0)
    assert [sample.id for sample in samples[:3]] == ["u0#APA", "u0#MDD", "u1#APA"]
    return samples


def model_answers() -> list[str | None]:
    texts: list[str | None] = []
    for guess, predicted in zip(GUESSES, PREDICTED, strict=True):
        texts.append(render_answer({"accuracy": guess, "fluency": guess, "prosodic": guess, "total": 7}))
        texts.append(render_answer({"word_transcript": "bear call", "phoneme_transcript": predicted}))
    return texts


def printed(report: EvaluationReport) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_evaluation(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_scores_agree_with_scipy_and_by_hand() -> None:
    report = evaluate_answers(corpus(), model_answers(), train=[utterance(0), utterance(1)])
    assert report.apa and report.apa.count == 6 and report.apa.parse_rate == 1
    accuracy = report.apa.scores.parsed["accuracy"]
    assert accuracy.pcc == pytest.approx(stats.pearsonr(GUESSES, TRUTHS).statistic)
    assert accuracy.spearman == pytest.approx(stats.spearmanr(GUESSES, TRUTHS).statistic)
    assert accuracy.mae == 1.0 and accuracy.pcc_low <= accuracy.pcc <= accuracy.pcc_high
    assert accuracy == metrics.field_scores(GUESSES, TRUTHS)
    assert report.apa.scores.parsed["prosodic"].pcc == pytest.approx(-accuracy.pcc)
    total = report.apa.scores.parsed["total"]
    assert total.collapsed and total.mae == pytest.approx(sum(abs(7 - t - 0.5) for t in TRUTHS) / 6)  # not rounded
    assert report.apa.baseline and report.apa.baseline.imputed_with is None
    assert report.apa.baseline.parsed["accuracy"].mae == pytest.approx(sum(abs(6.5 - t) for t in TRUTHS) / 6)
    assert report.apa.baseline.parsed["accuracy"].collapsed


def test_transcripts_agree_with_jiwer_and_by_hand() -> None:
    report = evaluate_answers(corpus(), model_answers())
    assert report.mdd and report.mdd.detection and report.mdd.baseline
    references = [" ".join(phones) for phones in REALISED]
    assert report.mdd.per.parsed.rate == pytest.approx(jiwer.wer(references, PREDICTED))
    assert report.mdd.per.parsed.rate == pytest.approx(4 / 35) == report.mdd.per.parsed.raw_rate
    assert report.mdd.wer.parsed.rate == 0
    found = report.mdd.detection.parsed
    assert (found.correct_diagnosis, found.diagnosis_error, found.false_acceptance, found.false_rejection) == (
        1,
        1,
        2,
        1,
    )
    assert (found.true_rejection, found.true_acceptance) == (2, 36 - 5)
    assert found.precision == 2 / 3 and found.recall == 2 / 4 and found.f1 == pytest.approx(4 / 7)
    assert (found.false_acceptance_rate, found.false_rejection_rate, found.diagnosis_error_rate) == (
        1 / 2,
        1 / 32,
        1 / 2,
    )
    assert report.mdd.phone_match.f1 == pytest.approx(2 * 32 / (35 + 36)) == report.mdd.phone_match_imputed.f1
    assert report.mdd.baseline.mdd.parsed.f1 == 0 and report.mdd.baseline.per.parsed.rate == pytest.approx(4 / 35)


def test_raw_phones_keep_stress_digits_and_unknown_labels_are_wrong() -> None:
    texts = ["{'word_transcript': 'Bear, call!', 'phone_transcript': 'B EH1 R K zz L'}"]
    report = evaluate_answers([corpus()[9]], texts)
    assert report.mdd and report.mdd.unknown_labels == 1
    assert report.mdd.per.parsed.rate == pytest.approx(1 / 6)  # "zz" is not the <unk> that was said
    assert report.mdd.per.parsed.raw_rate == pytest.approx(2 / 6)
    assert report.mdd.wer.parsed.rate == 0 and report.mdd.wer.parsed.raw_rate == 1


def test_failures_are_left_out_and_imputed_with_what_is_stated() -> None:
    texts = model_answers()
    texts[0], texts[1], texts[3] = (
        None,
        "There is no speech.",
        '{"word_transcript": "bear call", "phoneme_transcript": "B',
    )
    texts[2] = '{"accuracy": 6, "fluency": 6'
    report = evaluate_answers(corpus(), texts, train=corpus()[:3])  # u0 twice and u1 once: two utterances
    assert report.apa and report.mdd and report.mdd.detection
    assert report.apa.parse_rate == 4 / 6 and report.apa.truncated == 1 and report.mdd.truncated == 1
    assert report.apa.imputed_from == evaluation.TRAIN_MEANS
    assert report.apa.scores.imputed_with == {"accuracy": 6.5, "fluency": 6.5, "prosodic": 3.5, "total": 7.0}
    assert report.apa.scores.parsed["accuracy"] == metrics.field_scores(GUESSES[1:], TRUTHS[1:])
    assert report.apa.scores.imputed
    assert report.apa.scores.imputed["accuracy"] == metrics.field_scores([6.5, *GUESSES[1:]], TRUTHS)
    assert report.mdd.parse_rate == 4 / 6 and report.mdd.wer.parse_rate == 5 / 6 and report.mdd.per.parse_rate == 4 / 6
    assert report.mdd.wer.imputed.rate == 2 / 12 and report.mdd.wer.parsed.rate == 0
    assert report.mdd.per.parsed.rate == pytest.approx(4 / 23)
    assert report.mdd.per.imputed.rate == pytest.approx((4 + 12) / 35)
    assert (report.mdd.detection.parsed.false_acceptance, report.mdd.detection.imputed.false_acceptance) == (2, 3)
    assert report.mdd.phone_match_imputed.recall < report.mdd.phone_match.recall
    own = evaluate_answers(corpus(), texts)
    assert own.apa and own.apa.baseline is None and own.apa.imputed_from is None
    assert own.apa.scores.imputed is None and own.apa.scores.imputed_with is None
    assert any("no train-mean baseline, and no score for a failure" in note for note in own.notes) and printed(own)


def test_a_model_that_answers_nothing_gets_no_score() -> None:
    """Guards against `mae 0.0` at `parse_rate 0.0`: failures were imputed with the evaluation set's own mean."""
    samples = corpus()
    answers = [Output(sample.id, None, "There is no speech.", True, 5) for sample in samples]
    for training in ([], samples):
        figures = score_answers(samples, answers, training).summary
        assert figures["parse_rate"] == 0.0 and figures["wer"] == figures["per"] == 1.0
        assert not [name for name in figures if name.startswith(("mae", "pcc"))]
        assert not any("same total score" in line for line in warnings_of(figures))


def test_a_failure_in_training_costs_what_the_training_mean_costs() -> None:
    samples = [sample for sample in corpus() if task_of(sample) == "APA"]
    texts = [text for sample, text in zip(corpus(), model_answers(), strict=True) if task_of(sample) == "APA"]
    texts[0] = "There is no speech."
    answers = [Output(sample.id, None, text, True, 5) for sample, text in zip(samples, texts, strict=True)]
    figures = score_answers(samples, answers, samples[1:]).summary
    mean = sum(TRUTHS[1:]) / len(TRUTHS[1:])
    wanted = [abs(mean - TRUTHS[0]), *(abs(g - t) for g, t in zip(GUESSES[1:], TRUTHS[1:], strict=True))]
    assert figures["mae_accuracy"] == pytest.approx(sum(wanted) / len(wanted))


def test_figures_per_group() -> None:
    groups = evaluate_answers(corpus(), model_answers()).groups
    assert list(groups) == ["speaker", "age_group", "gender"]
    assert list(groups["speaker"]) == ["s0", "s1", "s2"]
    assert list(groups["age_group"]) == ["adult", "child", "unknown"] and list(groups["gender"]) == [
        "f",
        "m",
        "unknown",
    ]
    assert groups["age_group"]["adult"] == groups["gender"]["m"] == groups["speaker"]["s1"]
    child, adult, unknown = (groups["age_group"][name] for name in ("child", "adult", "unknown"))
    assert (child["utterances"], child["apa_count"], child["mdd_count"]) == (2, 2, 2)
    assert child["accuracy"] == {"count": 2, "pcc": None, "collapsed": False, "mae": 1.0}  # two are too few
    assert child["total"]["collapsed"] and child["mdd_f1"] == 1 and child["per"] == 0
    assert adult["per"] == pytest.approx(2 / 11) and adult["mdd_f1"] == 0 and adult["wer"] == 0
    assert unknown["mdd_f1"] == pytest.approx(2 / 3)
    alike = [
        replace(sample, pronunciation=replace(sample.pronunciation, gender="m", age=17))
        for sample in corpus()
        if sample.pronunciation is not None
    ]
    one = evaluate_answers(alike, model_answers()).groups
    assert list(one["age_group"]) == ["child"]
    assert one["gender"]["m"]["accuracy"]["pcc"] == pytest.approx(stats.pearsonr(GUESSES, TRUTHS).statistic)
    assert math.isnan(one["gender"]["m"]["total"]["pcc"])


def test_ceiling_of_one_rater_or_the_reason_why_not() -> None:
    samples = []
    for index in range(6):
        raters = {name: [index, index + 1, index - 1] for name in SCORE_FIELDS}
        samples += task_samples([utterance(index, raters=raters)], {"APA": 1}, 0)
    texts = model_answers()[::2]
    report = evaluate_answers(samples, texts)
    assert report.apa and report.apa.ceiling["fluency"].pcc == pytest.approx(1) and report.mdd is None
    assert "no transcripts: there are no MDD samples" in report.notes
    assert not any("ceiling" in note for note in report.notes)
    without = evaluate_answers(corpus(), model_answers())
    assert without.apa and without.apa.ceiling == {}
    assert sum("labels.raters" in note for note in without.notes) == 4
    assert samples[0].pronunciation is not None
    samples[0].pronunciation.raters["total"].append(3)  # pyright: ignore[reportAttributeAccessIssue]
    assert any("different numbers of raters" in note for note in evaluate_answers(samples, texts).notes)


def test_the_ceiling_appears_where_the_corpus_has_its_single_raters(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    details = {
        name: {"text": "HI LISA"} | {field: [score, score, 10 - score] for field in SCORE_FIELDS}
        for name, score in (("u1", 3), ("u2", 9), ("u3", 5))
    }

    def measured() -> EvaluationReport:
        samples = task_samples(read_speechocean(folder, "train", DataConfig()).samples, {"APA": 1}, 0)
        return evaluate_answers(samples, [render_answer(target_of(sample)) for sample in samples])

    assert measured().apa.ceiling == {}
    (folder / "resource" / "scores-detail.json").write_text(json.dumps(details))
    report = measured()
    assert list(report.apa.ceiling) == list(SCORE_FIELDS)
    ceiling = report.apa.ceiling["accuracy"]
    # two raters alike and one their mirror: the median of the other two is constant 5 for the former
    assert ceiling.count == 3 and ceiling.pcc == pytest.approx(-1) and math.isnan(ceiling.per_rater[0])
    assert not any("ceiling" in note for note in report.notes) and "-1.000" in printed(report)
    for name in ("u1", "u2"):
        del details[name]["total"]
    (folder / "resource" / "scores-detail.json").write_text(json.dumps(details))
    report = measured()
    assert list(report.apa.ceiling) == ["accuracy", "fluency", "prosodic"]
    assert [note for note in report.notes if "ceiling" in note] == [
        "no one-rater ceiling of total: fewer than two samples or two raters"
    ]


def test_targets_without_labels_have_no_detection() -> None:
    target = {"word_transcript": "bear", "phoneme_transcript": "B EH R"}
    sample = Sample("a", "BEAR", None, pronunciation=Pronunciation("MDD", target))
    report = evaluate_answers([sample], [render_answer(target_of(sample))])
    assert report.mdd and report.mdd.detection is None and report.mdd.baseline is None
    assert report.mdd.per.parsed.rate == 0 and report.apa is None
    assert any("1 of 1 MDD samples have no canonical phones" in note for note in report.notes)
    assert "phone match F1 (paper-comparable)" in printed(report)
    scores = dict.fromkeys(SCORE_FIELDS, 4)
    one = evaluate_answers([Sample("b", "", None, pronunciation=Pronunciation("APA", scores))], ['{"accuracy": 5}'])
    assert one.apa and one.rows[0].errors == {"accuracy": 1.0} and one.groups["speaker"]["unknown"]["apa_count"] == 1


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="1 answers for 12"):
        evaluate_answers(corpus(), ["x"])
    with pytest.raises(ManifestError, match="task None"):
        evaluate_answers([utterance(0)], ["x"])
    empty = evaluate_answers([], [])
    assert empty.apa is None and empty.mdd is None and len(empty.notes) == 2
    assert "figure" in printed(empty)


def test_files_hold_everything_and_no_nan(tmp_path: Path) -> None:
    texts = model_answers()
    texts[2], texts[3] = "half a pair: \ud83d", None
    report = evaluate_answers(corpus(), texts)
    paths = write_results(report.to_json(), report.rows, tmp_path / "new" / "folder")
    assert [path.name for path in sorted(paths[0].parent.iterdir())] == ["metrics.json", "utterances.jsonl"]

    def refuse(name: str) -> None:
        raise AssertionError(name)

    figures = json.loads(paths[0].read_text(encoding="utf-8"), parse_constant=refuse)
    assert figures == report.to_json() and "rows" not in figures
    assert figures["apa"]["scores"]["parsed"]["total"]["pcc"] is None
    assert figures["mdd"]["phone_match"]["label"] == "paper-comparable"
    rows = [json.loads(line, parse_constant=refuse) for line in paths[1].read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 12 and rows[2]["text"] == texts[2] and rows[2]["parsed"] is None and rows[2]["errors"] == {}
    assert rows[0]["errors"] == {"accuracy": -1.0, "fluency": -1.0, "prosodic": 5.0, "total": -1.5}
    assert (rows[5]["id"], rows[5]["utterance"], rows[5]["speaker"], rows[5]["age"]) == ("u2#MDD", "u2", "s1", 18)
    assert rows[5]["errors"] == {"wer": 0.0, "per": pytest.approx(1 / 5)} and rows[5]["gender"] == "m"
    assert rows[5]["reference"]["phones"] == REALISED[2] and rows[5]["canonical"] == CANONICAL


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"metrics\.json: the evaluation could not be written .*another folder"):
        write_results({}, (), tmp_path / "file")


def test_the_table_says_collapsed_and_shows_the_interval() -> None:
    text = printed(evaluate_answers(corpus(), model_answers(), train=[utterance(0), utterance(1)]))
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "collapsed" in lines["total PCC"]
    assert metrics.field_scores(GUESSES, TRUTHS).pcc_text() in lines["accuracy PCC"]
    assert [cell.strip() for cell in lines["MDD recall"].split("│")[2:5]] == ["0.500", "0.500", "0.000"]
    assert "31 2 2 1 (1 1)" in lines["TA TR FA FR (CD DE)"] and "0.667" in lines["MDD precision"]
    assert "undefined" in lines["MDD precision"]  # copying flags nothing

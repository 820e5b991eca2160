"""Loading data of any kind: dispatch, strictness, quarantine, the verb validate, and held-out speakers and clips."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from rich.console import Console

from assessment_helpers import (
    SPEAKERS,
    bare,
    hub_row,
    hub_rows,
    task_row,
    wav,
    write_folder,
    write_hub,
    write_jsonl,
    write_parquet,
)
from speechtune.commands.validate import print_report, validate
from speechtune.config import DataConfig, RunConfig
from speechtune.data import manifest
from speechtune.data.sources import find_source, load_all, load_samples
from speechtune.data.splits import split_samples, split_validation
from speechtune.errors import Issue, ManifestError
from speechtune.tasks.pronunciation.phones import StarPolicy
from speechtune.tasks.pronunciation.targets import SCORE_FIELDS, target_of, task_of, task_samples
from speechtune.training.prepare import load_sets
from speechtune.types import AudioRef, Pronunciation, Sample, Word


def ids(samples: list[Sample]) -> list[str]:
    return [sample.id for sample in samples]


@pytest.fixture(params=["folder", "hub"])
def corpus(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_folder(tmp_path / "data") if request.param == "folder" else write_hub(tmp_path / "data")


def cloning(folder: Path) -> Path:
    (folder / "a.wav").write_bytes(wav())
    (folder / "a.txt").write_text("Hello.")
    return folder


# ---- what a path names


def test_the_path_names_the_split(corpus: Path) -> None:
    wanted = {split: list(names) for split, names in SPEAKERS.items()}
    config = DataConfig()
    assert ids(load_samples(corpus, config)) == wanted["train"]
    assert ids(load_samples(corpus, config, default_split="test")) == wanted["test"]
    for split in ("train", "test"):
        for default in ("train", "test"):
            samples = load_samples(corpus / split, config, default_split=default)
            assert ids(samples) == wanted[split]


def test_both_formats_load_alike(tmp_path: Path) -> None:
    folder = load_samples(write_folder(tmp_path / "folder"), DataConfig())
    hub = load_samples(write_hub(tmp_path / "hub"), DataConfig())
    assert list(map(bare, folder)) == list(map(bare, hub))


def test_single_parquet_files(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "train-0.parquet", hub_rows("train"))
    assert ids(load_samples(train, DataConfig(), default_split="test")) == ["u1", "u2", "u3"]
    nameless = write_parquet(tmp_path / "own.parquet", hub_rows("train"))
    assert ids(load_samples(nameless, DataConfig(), default_split="test")) == ["u1", "u2", "u3"]
    assert list(validate(nameless, DataConfig()).statistics["pronunciation"]) == ["train"]


def test_a_split_that_is_not_there_is_not_replaced_by_the_other(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "train-0.parquet", hub_rows("train"))
    for path in (tmp_path, tmp_path / "test"):
        with pytest.raises(ManifestError, match="holds no parquet file of the split 'test'"):
            load_samples(path, DataConfig(), default_split="test")


def test_accents_are_kept_as_annotated_and_become_targets_by_policy(corpus: Path) -> None:
    if (corpus / "resource").is_dir():
        file = corpus / "resource" / "scores.json"
        file.write_text(file.read_text().replace("D Z", "L*"))
    else:
        rows = hub_rows("train")
        for row in rows:
            row["words"][1]["mispronunciations"][0]["pronounced-phone"] = "L*"
        write_hub(corpus, train=rows)
    samples = load_samples(corpus, DataConfig())
    assert samples[0].pronunciation is not None
    assert samples[0].pronunciation.words[1].mispronunciations[0].pronounced == "L*"
    policies: tuple[tuple[StarPolicy, str], ...] = (("base", "L"), ("unk", "<unk>"))
    for policy, phone in policies:
        target = target_of(task_samples(samples, {"MDD": 1}, 0, policy)[0])
        assert target["phoneme_transcript"] == f"HH AY {phone} IY S AH"


def test_tasks_in_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav())
    samples = load_samples(write_jsonl(tmp_path, task_row(), task_row("MDD")), DataConfig())
    assert [(sample.id, task_of(sample)) for sample in samples] == [("tasks-1", "APA"), ("tasks-2", "MDD")]


def test_a_folder_of_tasks_is_not_read_as_voices(tmp_path: Path) -> None:
    """Guards against answers that are dropped without a word, where the folder is named in place of the file."""
    (tmp_path / "a.wav").write_bytes(wav())
    path = write_jsonl(tmp_path, task_row())
    with pytest.raises(ManifestError, match=f"holds rows with tasks; name the file in it that is meant: {path}"):
        load_samples(tmp_path, DataConfig())


def test_voice_cloning_goes_to_its_own_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cloning(tmp_path)
    assert find_source(folder) is None
    assert load_samples(folder, DataConfig()) == manifest.load_samples(folder, DataConfig())
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(manifest, "load_samples", lambda *given: calls.append(given) or [])
    load_samples(folder, DataConfig(), tmp_path / "run")
    assert calls == [(folder, DataConfig(), tmp_path / "run", "train")]


def test_folders_that_only_look_alike(tmp_path: Path) -> None:
    train = tmp_path / "train"
    train.mkdir()
    cloning(train)
    write_parquet(tmp_path / "train-0.parquet", hub_rows("train"))
    assert find_source(train) is None  # wav/txt pairs of their own
    (tmp_path / "metadata.json").write_text('{"samples": []}')
    assert find_source(tmp_path) is None
    with pytest.raises(ManifestError, match="no such file or folder"):
        load_samples(tmp_path / "none", DataConfig())


# ---- strictness


def nan_clip() -> bytes:
    return wav(value=float("nan"))


CLIPS: list[tuple[Callable[[], bytes], str, str]] = [
    (lambda: b"no sound", "not_audio", "not audio libsndfile can read"),
    (lambda: wav(41), "too_long", "41.0 s is longer than 40 s; cut it"),
    (lambda: wav(61), "too_long", "61.0 s is longer than data.max_seconds (60 s)"),
    (lambda: wav(0.01), "too_short", "shorter than data.min_seconds"),
    (nan_clip, "not_finite", "NaN"),
]


def spoil_folder(folder: Path, clip: bytes) -> Path:
    write_folder(folder)
    (folder / "WAVE" / "u2.WAV").write_bytes(clip)
    return folder


def spoil_hub(folder: Path, clip: bytes) -> Path:
    rows = hub_rows("train")
    rows[1]["audio"]["bytes"] = clip
    return write_hub(folder, train=rows)


def spoil_jsonl(folder: Path, clip: bytes) -> Path:
    folder.mkdir()
    (folder / "a.wav").write_bytes(wav())
    (folder / "b.wav").write_bytes(clip)
    return write_jsonl(folder, task_row(id="u1"), task_row(id="u2", audio="b.wav"), task_row(id="u3"))


SPOIL = [spoil_folder, spoil_hub, spoil_jsonl]


@pytest.mark.parametrize("spoil", SPOIL)
@pytest.mark.parametrize(("clip", "code", "message"), CLIPS, ids=[f"{row[1]} {row[2]}" for row in CLIPS])
def test_clips_that_cannot_be_used(
    tmp_path: Path, spoil: Callable[..., Path], clip: Callable[[], bytes], code: str, message: str
) -> None:
    path = spoil(tmp_path / "data", clip())
    with pytest.raises(ManifestError) as caught:
        load_samples(path, DataConfig())
    (issue,) = caught.value.issues
    assert isinstance(issue, Issue)
    assert (issue.sample_id, issue.row) == ("u2", 2)
    assert issue.code == code and message in issue.message
    assert (
        "1 issue(s) in 1 of 3 rows; fix them (`speechtune validate` lists all), or set data.on_error=quarantine"
        in str(caught.value)
    )
    config = DataConfig(on_error="quarantine", quarantine_limit=0.5)
    assert ids(load_samples(path, config, tmp_path / "run")) == ["u1", "u3"]


@pytest.mark.parametrize("spoil", SPOIL)
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_silent_and_clipped_clips_are_for_quarantine(tmp_path: Path, spoil: Callable[..., Path], level: float) -> None:
    clip = wav(value=level)
    path = spoil(tmp_path / "data", clip)
    assert ids(load_samples(path, DataConfig())) == ["u1", "u2", "u3"]
    config = DataConfig(on_error="quarantine", quarantine_limit=0.5)
    assert ids(load_samples(path, config, tmp_path / "run")) == ["u1", "u3"]


def test_all_issues_in_one_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, task_row("X"), task_row(), task_row(text=""))
    with pytest.raises(ManifestError) as caught:
        load_samples(path, DataConfig())
    assert [str(issue).partition(": ")[0] for issue in caught.value.issues] == [f"{path}:{n}" for n in (1, 2, 3)]
    assert "3 issue(s) in 3 of 3 rows" in str(caught.value)


# ---- quarantine


def quarantine(path: Path, run: Path, limit: float = 0.5) -> tuple[list[Sample], list[dict[str, Any]]]:
    config = DataConfig(on_error="quarantine", quarantine_limit=limit)
    samples = load_samples(path, config, run)
    (file,) = run.iterdir()
    assert file.name == f"quarantine-{path.stem}.jsonl"
    return samples, [json.loads(line) for line in file.read_text().splitlines()]


def test_quarantine_of_task_rows_keeps_their_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.wav").write_bytes(wav())
    bad = task_row("X")
    path = write_jsonl(tmp_path, task_row(), bad, "{broken", task_row("MDD"))
    for _ in range(2):  # a rerun adds nothing
        with caplog.at_level(logging.WARNING, "speechtune"):
            samples, records = quarantine(path, tmp_path / "run")
        assert ids(samples) == ["tasks-1", "tasks-4"]
        assert [record["content"] for record in records] == [bad, "{broken"]
        assert [record["issues"][0]["code"] for record in records] == ["unknown_task", "invalid_json"]
    assert "2 issue(s) in 2 of 4 rows; 2 samples are left" in caplog.text


@pytest.mark.parametrize("spoil", [spoil_folder, spoil_hub])
def test_quarantine_of_a_corpus_names_the_place(tmp_path: Path, spoil: Callable[..., Path]) -> None:
    path = spoil(tmp_path / "data", b"no sound")
    samples, (record,) = quarantine(path, tmp_path / "run")
    assert ids(samples) == ["u1", "u3"]
    assert (record["row"], record["id"], record["content"]) == (2, "u2", "")
    assert record["source"].endswith((".parquet:2", "train/text:2"))
    assert record["issues"][0]["code"] == "not_audio"


def test_quarantine_of_lines_of_the_tables(tmp_path: Path) -> None:
    """An utterance without sample counts as set aside, though its issue belongs to no row."""
    path = write_folder(tmp_path / "data")
    with (path / "train" / "text").open("a") as file:
        file.write("u2\tHI LISA\n")
    (path / "train" / "spk2age").write_text("01\told\n02\t7\n")
    samples, records = quarantine(path, tmp_path / "run")
    assert ids(samples) == ["u1", "u3"]
    assert samples[0].pronunciation is not None and samples[0].pronunciation.age is None
    places = {(Path(record["source"]).name, record["row"], record["issues"][0]["code"]) for record in records}
    assert places == {("text:4", 0, "duplicate_id"), ("spk2age:1", 0, "bad_field")}
    with pytest.raises(ManifestError, match=r"2 issue\(s\) in 1 of 3 rows; 33\.3% exceeds data\.quarantine_limit"):
        quarantine(path, tmp_path / "run", 0.3)


def test_quarantine_stops_where_nothing_can_be_known(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    (tmp_path / "a.wav").write_bytes(wav())
    path.write_text(json.dumps([task_row(), task_row("MDD")])[:-20])
    with pytest.raises(ManifestError, match="the file breaks off, so the number of rows is unknown"):
        quarantine(path, tmp_path / "run", 1.0)
    empty = write_parquet(tmp_path / "train-0.parquet", hub_rows("train"))
    write_parquet(empty, [hub_row(gender="x")])
    with pytest.raises(ManifestError, match="no sample is left"):
        load_samples(empty, DataConfig(on_error="quarantine", quarantine_limit=1.0), tmp_path / "other")


# ---- held-out samples


def utterances(speakers: int, each: int = 3) -> list[Sample]:
    samples: list[Sample] = []
    for person in range(speakers):
        for number in range(each):
            name = f"s{person}-{number}"
            labels = Pronunciation(scores=dict.fromkeys(SCORE_FIELDS, 5), words=(Word("x", ("EH", "K", "S")),))
            samples.append(Sample(name, "x", AudioRef(f"{name}.wav"), speaker=f"s{person}", pronunciation=labels))
    return samples


def test_no_speaker_on_both_sides() -> None:
    for seed in range(5):
        train, held = split_validation(task_samples(utterances(10), {"APA": 1, "MDD": 1}, 0), 0.2, seed)
        assert not {s.speaker for s in train} & {s.speaker for s in held}
        assert len({s.speaker for s in held}) == 2 and len(held) == 12 and len(train) == 48


def test_all_tasks_of_a_clip_stay_together_without_speakers(tmp_path: Path) -> None:
    rows = [task_row(task, audio=f"{n}.wav", id=f"{task}{n}") for n in range(20) for task in ("APA", "MDD")]
    rows[0]["speaker"] = "anna"  # one name among none is no reason to split by it
    for n in range(20):
        (tmp_path / f"{n}.wav").write_bytes(wav())
    samples = load_samples(write_jsonl(tmp_path, *rows), DataConfig())
    choices = set()
    for seed in range(10):
        train, held = split_validation(samples, 0.2, seed)
        assert not {s.audio for s in train} & {s.audio for s in held}
        assert (len(train), len(held)) == (32, 8)
        assert train == [s for s in samples if s in train] and held == [s for s in samples if s in held]
        assert set(ids(split_validation(samples[::-1], 0.2, seed)[1])) == set(ids(held))
        choices.add(frozenset(ids(held)))
    assert len(choices) > 5


def test_voice_cloning_is_split_by_sample() -> None:
    samples = [Sample(f"c{n}", "x", AudioRef(path="a.wav"), speaker="anna") for n in range(10)]
    assert split_validation(samples, 0.3, 1) == split_samples(samples, 0.3, 1)
    mixed = [*samples, *utterances(2)]
    assert split_validation(mixed, 0.3, 1) == split_samples(mixed, 0.3, 1)


def test_splits_that_cannot_be_made() -> None:
    assert split_validation(utterances(1), 0, 1) == (utterances(1), [])
    with pytest.raises(ManifestError, match=r"of 1 speaker\(s\): at least 2 are needed"):
        split_validation(utterances(1), 0.5, 1)
    nameless = [Sample(task, "x", AudioRef("a.wav"), pronunciation=Pronunciation(task, {})) for task in ("APA", "MDD")]
    assert split_validation(nameless, 0, 1) == (nameless, [])
    with pytest.raises(ManifestError, match=r"of 1 sample\(s\): at least 2 are needed"):
        split_validation(nameless, 0.5, 1)


# ---- several files


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    """Files of one name give rows of one id: the later ones get the number of their file."""
    for folder in "abc":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.wav").write_bytes(wav())
        (tmp_path / folder / "train.jsonl").write_text(json.dumps({"audio": "x.wav", "text": folder}) + "\n")
    paths = tuple(tmp_path / folder / "train.jsonl" for folder in "abc")
    assert [(s.id, s.text) for s in load_all(paths, DataConfig())] == [
        ("train-1", "a"), ("2:train-1", "b"), ("3:train-1", "c"),
    ]  # fmt: skip
    assert load_all(paths[0], DataConfig()) == load_samples(paths[0], DataConfig())
    (tmp_path / "b" / "train.jsonl").write_text("[]")
    with pytest.raises(ManifestError, match=r"b/train\.jsonl"):
        load_all(paths, DataConfig())


def test_references_are_not_borrowed_across_the_split(tmp_path: Path) -> None:
    """Guards against held-out clips heard in training as references: 3 of 8, where they were borrowed before."""
    for number in range(8):
        (tmp_path / f"{number}.wav").write_bytes(wav(0.2 + number / 100))
        (tmp_path / f"{number}.txt").write_text(f"Text {number}.")
    values = {"family": "higgs_audio_v2", "model": {"path": "x"}, "data": {"train": tmp_path, "validation_split": 0.4}}
    config = RunConfig.model_validate({**values, "output_dir": tmp_path / "run"})
    sides = load_sets(config, SimpleNamespace(expand=list))  # type: ignore[arg-type]
    assert [len(side) for side in sides] == [5, 3]
    for side in sides:
        targets = {sample.audio for sample in side}
        assert all(len(sample.references) == 1 and sample.references[0].audio in targets for sample in side)


# ---- the verb validate


def test_validate_covers_both_splits_or_the_one_named(corpus: Path) -> None:
    report = validate(corpus, DataConfig(), deep=True)
    assert report.issues == []
    assert (report.statistics["num_rows"], report.statistics["num_samples"]) == (4, 4)
    labels = report.statistics["pronunciation"]
    assert {split: values["phones"] for split, values in labels.items()} == {"train": 18, "test": 6}
    for split in ("train", "test"):
        one = validate(corpus / split, DataConfig())
        assert one.statistics["pronunciation"] == {split: labels[split]}
        assert one.statistics["num_rows"] == len(SPEAKERS[split])


def test_validate_finds_overlaps_in_the_copy(tmp_path: Path) -> None:
    path = write_hub(tmp_path, test=[hub_row("t1", "01"), hub_row("u1", "09")])
    issues = validate(path, DataConfig()).issues
    assert [(issue.code, issue.message.split(" also")[0]) for issue in issues] == [
        ("split_overlap", "the speaker 01"),
        ("split_overlap", "the utterance"),
    ]
    assert validate(path / "test", DataConfig()).issues == []


@pytest.mark.parametrize("spoil", SPOIL)
def test_validate_lists_issues(tmp_path: Path, spoil: Callable[..., Path]) -> None:
    report = validate(spoil(tmp_path / "data", wav(41)), DataConfig())
    assert [(issue.sample_id, issue.code) for issue in report.issues] == [("u2", "too_long")]


def test_validate_counts_tasks(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav())
    path = write_jsonl(tmp_path, task_row(), task_row("MDD"), task_row("MDD"), task_row("X"))
    report = validate(path, DataConfig())
    assert [issue.code for issue in report.issues] == ["unknown_task"]
    assert report.statistics["tasks"] == {"APA": 1, "MDD": 2}
    assert (report.statistics["num_rows"], report.statistics["num_samples"]) == (4, 3)
    console = Console(file=io.StringIO(), width=200)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    assert "MDD: 2" in console.file.getvalue()


def test_clips_inside_parquet_decode(tmp_path: Path) -> None:
    from speechtune.audio import read_audio

    sample = load_samples(write_hub(tmp_path), DataConfig())[0]
    assert sample.audio is not None
    wanted, rate = soundfile.read(io.BytesIO(wav()), dtype="float32")
    audio = read_audio(sample.audio)
    assert audio.sampling_rate == rate and np.array_equal(audio.samples, wanted)

"""Rows of pronunciation data: the hub's copy of Speechocean762 equals the folder, and every issue of a row."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from assessment_helpers import (
    APA,
    HI,
    LISA,
    MDD,
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
from speechtune.audio import read_audio
from speechtune.config import DataConfig
from speechtune.data.arrow import parquet_files
from speechtune.data.pronunciation_rows import is_hub_copy, is_task_file, read_hub_copy, read_labelled, read_tasks
from speechtune.data.row_parser import ReadResult
from speechtune.data.rows import SPLITS, Row
from speechtune.data.speechocean import read_speechocean
from speechtune.errors import ManifestError
from speechtune.tasks.pronunciation.targets import target_of, task_samples
from speechtune.types import AudioRef, Pronunciation, Sample


def hub_copy(
    rows: list[Any], split: Any, config: DataConfig, folder: Path = Path(), source: str = "rows"
) -> ReadResult:
    numbered = [Row(number, f"{source}:{number}", value) for number, value in enumerate(rows, 1)]
    return read_labelled(folder / source, numbered, split, config)


# ---- the hub's copy


@pytest.mark.parametrize("split", SPLITS)
def test_the_copy_equals_the_folder(tmp_path: Path, split: Any) -> None:
    folder = read_speechocean(write_folder(tmp_path / "folder"), split, DataConfig())
    hub = read_hub_copy(write_hub(tmp_path / "hub"), split, DataConfig())
    assert (hub.issues, hub.notes, hub.num_rows) == ([], [], len(SPEAKERS[split]))
    assert list(map(bare, hub.samples)) == list(map(bare, folder.samples))
    for one, other in zip(hub.samples, folder.samples, strict=True):
        assert repr(one.pronunciation) == repr(other.pronunciation)  # ints and floats, too
        assert one.audio is not None and one.audio.data is not None and other.audio is not None
        assert np.array_equal(read_audio(one.audio).samples, read_audio(other.audio).samples)
    file = tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet"
    assert [sample.source for sample in hub.samples] == [f"{file}:{n + 1}" for n in range(hub.num_rows)]
    alone = read_hub_copy(file, split, DataConfig())
    assert alone.samples == hub.samples


def test_answers_of_the_copy() -> None:
    apa, mdd = task_samples(hub_copy([hub_row()], "train", DataConfig()).samples, {"APA": 1, "MDD": 1}, 0)
    assert target_of(apa) == {"accuracy": 8, "fluency": 9, "prosodic": 8, "total": 8}
    assert target_of(mdd) == {"word_transcript": "hi lisa", "phoneme_transcript": "HH AY D Z IY S AH"}


def test_other_forms_of_a_row() -> None:
    """What `datasets` makes of a Sequence of dicts, phones as one text, and numbers as floats."""
    usual = hub_copy([hub_row()], "train", DataConfig()).samples
    row = hub_row(age=6.0, gender="F")
    for word in row["words"]:
        errors = word["mispronunciations"]
        names = ("canonical-phone", "index", "pronounced-phone")
        word["mispronunciations"] = {name: [error[name] for error in errors] for name in names}
        word["phones"] = " ".join(word["phones"])
    row["words"] = {name: [word[name] for word in row["words"]] for name in HI}
    result = hub_copy([row], "train", DataConfig())
    assert result.issues == []
    assert result.samples == usual


def test_names_of_utterances_and_places_of_clips(tmp_path: Path) -> None:
    (tmp_path / "WAVE").mkdir()
    (tmp_path / "WAVE" / "a.b.wav").write_bytes(wav())
    clips = [
        {"bytes": wav(), "path": None},
        {"bytes": None, "path": "WAVE/a.b.wav"},
        {"bytes": wav(), "path": "/home/someone/000010011.WAV"},
        "WAVE/c.wav",
    ]
    result = hub_copy([hub_row(audio=clip) for clip in clips], "test", DataConfig(), folder=tmp_path)
    assert [sample.id for sample in result.samples] == ["test-1", "a.b", "000010011", "c"]
    paths = [sample.audio.path for sample in result.samples if sample.audio is not None]
    assert paths == [None, str(tmp_path.resolve() / "WAVE/a.b.wav"), None, str(tmp_path.resolve() / "WAVE/c.wav")]
    assert result.samples[3].source == "rows:4"


def test_what_the_copy_leaves_out_is_noted() -> None:
    row = hub_row(completeness=None, age=None, gender="")
    row["words"][0]["stress"] = None
    row["words"][1]["mispronunciations"] = []
    result = hub_copy([row, hub_row("u3")], "train", DataConfig())
    assert set(result.notes) == {
        "train: utterances without 'completeness' (1)",
        "train: utterances without age (1)",
        "train: utterances without gender (1)",
        "train: words without 'stress' (1)",
        "train: phones below 0.5 without mispronunciation, taken as canonical (1)",
    }
    labels = result.samples[0].pronunciation
    assert labels is not None and (labels.age, labels.gender) == (None, None)


def word(**fields: Any) -> dict[str, Any]:
    changed = {name.replace("_", "-"): value for name, value in fields.items()}
    return {"words": [copy.deepcopy(HI), {**copy.deepcopy(LISA), **changed}]}


def error(**fields: Any) -> dict[str, Any]:
    entry = {"canonical-phone": "L", "index": 0, "pronounced-phone": "D"}
    return word(mispronunciations=[entry | {name.replace("_", "-"): value for name, value in fields.items()}])


HUB_ISSUES: list[tuple[dict[str, Any], str, str]] = [
    ({"accuracy": 11}, "bad_score", "'accuracy' is 11, outside 0 to 10"),
    ({"total": None}, "missing_score", "'total' is missing"),
    ({"fluency": math.nan}, "bad_score", "'fluency' is nan, outside 0 to 10"),
    ({"words": None}, "missing_words", "the row gives no list of words"),
    ({"words": []}, "missing_words", "the row gives no list of words"),
    ({"words": ["HI"]}, "missing_words", "word 1 is not an object but 'HI'"),
    ({"words": {"text": ["HI", "LISA"], "total": [1]}}, "bad_field", "'words' is neither a list nor an object of"),
    ({"words": {"text": "HI"}}, "bad_field", "'words' is neither a list nor an object of lists of one length"),
    (word(phones=["L", "Q", "S", "AH0"]), "unknown_phone", "word 2 (LISA): 'Q' is none of the 39"),
    (word(phones_accuracy=[2.0]), "count_mismatch", "4 phone(s), but 1 value(s) in 'phones-accuracy'"),
    (word(mispronunciations={"index": [0], "x": []}), "bad_field", "'mispronunciations' is neither a list nor an obj"),
    (error(index=4), "bad_index", "'index' 4 lies outside the word"),
    (error(canonical_phone="S"), "phone_mismatch", "is not the phone at index 0"),
    (error(pronounced_phone="Q"), "unknown_phone", "'Q' is none of the 39"),
    ({"text": ""}, "missing_text", "the text is empty"),
    ({"text": "HI LIZ"}, "text_mismatch", "differs from the words of the row, 'HI LISA'"),
    ({"text": "HI<|eot|> LISA"}, "special_token", "'<|eot|>'"),
    ({"speaker": None}, "missing_speaker", "the speaker is empty"),
    ({"gender": "x"}, "bad_field", "gender 'x' is not m or f"),
    ({"age": -1}, "bad_field", "age -1 is not a number of years"),
    ({"age": 6.5}, "bad_field", "age 6.5 is not a number of years"),
    ({"audio": None}, "missing_audio", "neither 'audio' nor 'raw_audio' is given"),
    ({"audio": {"bytes": None, "path": ""}}, "missing_audio", "neither 'audio' nor 'raw_audio' is given"),
    ({"audio": {"array": [0.0]}}, "missing_audio", "cast the column with Audio(decode=False)"),
    ({"audio": {"bytes": "x", "path": "u2.WAV"}}, "bad_field", "'bytes' of the audio is not bytes but str"),
    ({"audio": "https://x.org/u2.WAV"}, "url_refused", "URLs are refused"),
    ({"audio": "../u2.WAV"}, "outside_root", "outside data.audio_root"),
]


@pytest.mark.parametrize(("fields", "code", "message"), HUB_ISSUES, ids=[str(n) for n in range(len(HUB_ISSUES))])
def test_issues_of_the_copy(tmp_path: Path, fields: dict[str, Any], code: str, message: str) -> None:
    rows = [hub_row("u1"), hub_row(**fields), hub_row("u3")]
    config = DataConfig(audio_root=tmp_path)
    result = hub_copy(rows, "train", config, folder=tmp_path, source="x.parquet")
    assert [issue.code for issue in result.issues] == [code], list(map(str, result.issues))
    (issue,) = result.issues
    assert message in issue.message
    assert (issue.source, issue.row) == ("x.parquet:2", 2)
    assert ([sample.id for sample in result.samples], result.num_rows) == (["u1", "u3"], 3)


@pytest.mark.parametrize("fields", [error(pronounced_phone="AR"), word(mispronunciations=None)])
def test_old_labels_are_told_of_the_corrected_release(fields: dict[str, Any]) -> None:
    (issue,) = hub_copy([hub_row(**fields)], "train", DataConfig()).issues
    assert "github.com/jimbozhang/speechocean762" in issue.message


def test_every_issue_of_a_row_is_listed() -> None:
    row = hub_row(total=12, gender="x", audio=None, **word(phones="L Q"))
    codes = [issue.code for issue in hub_copy([row], "train", DataConfig()).issues]
    assert codes == ["missing_audio", "bad_field", "bad_score", "unknown_phone"]


def test_too_large_a_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("speechtune.data.row_parser.MAX_INLINE_BYTES", 100)
    (issue,) = hub_copy([hub_row()], "train", DataConfig()).issues
    assert (issue.code, issue.sample_id) == ("too_large", "u2")


def test_duplicate_ids_no_rows_and_no_objects() -> None:
    result = hub_copy([hub_row("u1"), hub_row("u1")], "train", DataConfig())
    (issue,) = result.issues
    assert (issue.code, issue.row, result.num_rows) == ("duplicate_id", 2, 2)
    (issue,) = hub_copy([], "train", DataConfig(), source="x").issues
    assert (issue.code, issue.source, issue.row) == ("empty_manifest", "x:1", 0)
    rows: list[Any] = ["u1"]
    (issue,) = hub_copy(rows, "train", DataConfig()).issues
    assert (issue.code, issue.message) == ("bad_row", "a row is an object, found str")


def test_several_files_of_a_split(tmp_path: Path) -> None:
    for number, row in enumerate(hub_rows("train")):
        write_parquet(tmp_path / f"train-0000{number}-of-00003.parquet", [row])
    write_parquet(tmp_path / "validation.parquet", [hub_row()])
    result = read_hub_copy(tmp_path, "train", DataConfig())
    assert result.notes == ["parquet files that name neither train nor test are left out: validation.parquet"]
    assert [(sample.id, sample.row) for sample in result.samples] == [("u1", 1), ("u2", 2), ("u3", 3)]
    assert result.samples[2].source == f"{tmp_path / 'train-00002-of-00003.parquet'}:1"
    with pytest.raises(ManifestError, match="holds no parquet file of the split 'test', such as data/test-"):
        read_hub_copy(tmp_path, "test", DataConfig())


def test_splits_by_file_and_folder(tmp_path: Path) -> None:
    names = ("data/train-0.parquet", "test/0000.parquet", "train/test-1.parquet", "tester.parquet", "train/readme.md")
    for name in names:
        write_parquet(tmp_path / name, [hub_row()])
    found = {
        split: [str(file.relative_to(tmp_path)) for file in files] for split, files in parquet_files(tmp_path).items()
    }
    assert found == {
        "train": ["data/train-0.parquet"],
        "test": ["test/0000.parquet", "train/test-1.parquet"],
        None: ["tester.parquet"],
    }
    assert parquet_files(tmp_path / names[1]) == {"test": [tmp_path / names[1]]}
    assert is_hub_copy(tmp_path) and is_hub_copy(tmp_path / "tester.parquet")
    assert not is_hub_copy(tmp_path / "none.parquet") and not is_hub_copy(tmp_path / "train" / "readme.md")
    (tmp_path / "metadata.json").touch()
    assert not is_hub_copy(tmp_path)  # a manifest that happens to lie beside parquet files


def test_files_that_are_no_such_parquet(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(ManifestError, match=r"train\.parquet: cannot be read as parquet"):
        read_hub_copy(path, "train", DataConfig())
    write_parquet(path, [{"audio": "a.wav", "text": "x"}])
    assert not is_hub_copy(path)


def test_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hub(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError) as caught:
        read_hub_copy(tmp_path, "train", DataConfig())
    assert caught.value.name == "pyarrow"


# ---- plain JSONL


def read_jsonl(folder: Path, *rows: Any, **options: Any) -> ReadResult:
    return read_tasks(write_jsonl(folder, *rows), DataConfig(**options))


def test_sound_rows_of_tasks(tmp_path: Path) -> None:
    rows = [task_row(), task_row("MDD", id="m", speaker="anna", age="30", gender="M", target=json.dumps(MDD))]
    result = read_jsonl(tmp_path, *rows)
    assert (result.issues, result.notes, result.num_rows) == ([], [], 2)
    audio = AudioRef(path=str((tmp_path / "a.wav").resolve()))
    apa, mdd = result.samples
    target = {"accuracy": 8, "fluency": 9, "prosodic": 8, "total": 10}
    assert apa == Sample(
        "tasks-1",
        "Hi, Lisa!",
        audio,
        language="en",
        source=f"{tmp_path / 'tasks.jsonl'}:1",
        row=1,
        pronunciation=Pronunciation("APA", target),
    )
    assert {type(score) for score in target_of(apa).values()} == {int}
    assert mdd.pronunciation is not None
    assert (mdd.id, mdd.speaker, mdd.pronunciation.age, mdd.pronunciation.gender) == ("m", "anna", 30, "m")
    assert target_of(mdd) == {"word_transcript": "hi lisa", "phoneme_transcript": "HH AY D Z IY S <unk>"}
    assert target_of(apa) == target


def test_segments_and_declared_durations(tmp_path: Path) -> None:
    segment, declared = read_jsonl(tmp_path, task_row(offset=1.0, duration=2.0), task_row("MDD", duration=2.0)).samples
    assert segment.audio == AudioRef(path=str((tmp_path / "a.wav").resolve()), offset_seconds=1.0, duration_seconds=2.0)
    assert declared.declared_seconds == (2.0,)


JSONL_ISSUES: list[tuple[Any, str, str]] = [
    (task_row("XYZ"), "unknown_task", "'task' 'XYZ' is none of APA, MDD"),
    ({**task_row(), "task": ["APA"]}, "unknown_task", "'task' ['APA'] is none of APA, MDD"),
    (task_row(text=" "), "empty_text", "the text is empty"),
    (task_row(text=None), "empty_text", "the text is empty"),
    (task_row(text="<|user|>"), "special_token", "'<|user|>'"),
    (task_row(audio=None), "missing_audio", "neither 'audio' nor 'raw_audio' is given"),
    (task_row(audio="https://x.org/a.wav"), "url_refused", "URLs are refused"),
    (task_row(audio="../a.wav"), "outside_root", "outside data.audio_root"),
    (task_row(age="old"), "bad_field", "age 'old' is not a number of years"),
    (task_row(gender="x"), "bad_field", "gender 'x' is not m or f"),
    (task_row(speaker="\ud800"), "bad_unicode", "the speaker holds bytes"),
    (task_row(target=None), "bad_target", "'target' is neither an object nor its JSON text but None"),
    (task_row(target=[1]), "bad_target", "'target' is neither an object nor its JSON text but [1]"),
    (task_row(target="{'accuracy': 8}"), "bad_target", "'target' is a text, but not valid JSON"),
    (task_row(target="8"), "bad_target", "'target' is neither an object nor its JSON text but 8"),
    (task_row(target={k: APA[k] for k in ("accuracy", "total")}), "missing_key", "has no 'fluency', 'prosodic'"),
    (task_row(target={**APA, "completeness": 10}), "unknown_key", "'completeness' too many"),
    (task_row(target={**APA, "total": 10.5}), "bad_score", "'total' of the target is 10.5, outside 0 to 10"),
    (task_row(target={**APA, "total": -1}), "bad_score", "'total' of the target is -1, outside 0 to 10"),
    (task_row(target={**APA, "total": "8"}), "bad_score", "'total' of the target is not a number but '8'"),
    (task_row(target={**APA, "total": True}), "bad_score", "is not a number but True"),
    (task_row(target={**APA, "total": None}), "bad_score", "is not a number but None"),
    (task_row(target=json.dumps({**APA, "total": math.nan})), "bad_score", "is nan, outside 0 to 10"),
    (task_row("MDD", target={**MDD, "word_transcript": ""}), "empty_text", "'word_transcript' of the target is empty"),
    (task_row("MDD", target={**MDD, "word_transcript": 5}), "bad_target", "'word_transcript' of the target is not a t"),
    (task_row("MDD", target={**MDD, "phoneme_transcript": " "}), "empty_text", "'phoneme_transcript' of the target is"),
    (task_row("MDD", target={**MDD, "phoneme_transcript": ["AH"]}), "bad_target", "is not a text but ['AH']"),
    (task_row("MDD", target={**MDD, "phoneme_transcript": "AH0 D"}), "unknown_phone", "'AH0' is neither one of the 39"),
    (task_row("MDD", target={**MDD, "phoneme_transcript": "D <DEL>"}), "unknown_phone", "'<DEL>' is neither one of"),
    (task_row("MDD", target={**MDD, "phoneme_transcript": "hh"}), "unknown_phone", "'hh' is neither one of the 39"),
    (task_row(id="a1"), "duplicate_id", "the id is already taken by row 1"),
    ('{"audio": "a.wav", ', "invalid_json", "not valid JSON"),
    (["a.wav"], "bad_row", "a row is an object, found list"),
]


@pytest.mark.parametrize(("row", "code", "message"), JSONL_ISSUES, ids=[str(n) for n in range(len(JSONL_ISSUES))])
def test_issues_of_task_rows(tmp_path: Path, row: Any, code: str, message: str) -> None:
    result = read_jsonl(tmp_path, task_row(id="a1"), row, task_row("MDD", id="a2"), audio_root=tmp_path)
    assert [issue.code for issue in result.issues] == [code], list(map(str, result.issues))
    (issue,) = result.issues
    assert message in issue.message
    assert (issue.source, issue.row) == (f"{tmp_path / 'tasks.jsonl'}:2", 2)
    assert [sample.id for sample in result.samples] == ["a1", "a2"]


def test_every_issue_of_a_task_row_is_listed(tmp_path: Path) -> None:
    target = {"accuracy": 11, "fluency": -1, "total": 3, "x": 1}
    result = read_jsonl(tmp_path, task_row(text="", audio="data:x", age="?", target=target))
    codes = ["empty_text", "url_refused", "bad_field", "missing_key", "unknown_key", "bad_score", "bad_score"]
    assert [issue.code for issue in result.issues] == codes


def test_a_json_list_works_too(tmp_path: Path) -> None:
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps([task_row(), task_row("MDD")]))
    assert is_task_file(path)
    assert len(read_tasks(path, DataConfig()).samples) == 2


DETECTED: list[tuple[Callable[[Path], Path], bool]] = [
    (lambda folder: write_jsonl(folder, task_row()), True),
    (lambda folder: write_jsonl(folder, "{broken", task_row()), True),
    (lambda folder: write_jsonl(folder, {"audio": "a.wav", "task": "APA"}), True),
    (lambda folder: write_jsonl(folder, {"messages": [], "task": "APA", "target": {}}), False),
    (lambda folder: write_jsonl(folder, {"audio_file": "a.wav", "text": "x"}), False),
    (lambda folder: write_jsonl(folder, "no JSON"), False),
    (lambda folder: write_jsonl(folder), False),
    (lambda folder: folder, False),
    (lambda folder: folder / "none.jsonl", False),
]


@pytest.mark.parametrize(("make", "wanted"), DETECTED, ids=[str(n) for n in range(len(DETECTED))])
def test_detecting_task_rows(tmp_path: Path, make: Callable[[Path], Path], wanted: bool) -> None:
    assert is_task_file(make(tmp_path)) is wanted

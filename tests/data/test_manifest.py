"""Manifests: every format, every issue with its line, and texts that must survive."""

from __future__ import annotations

import base64
import json
import logging
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from speechtune.config import DataConfig
from speechtune.data import audio_checks, rows
from speechtune.data.audio_checks import check_audio
from speechtune.data.manifest import load_samples, read_samples
from speechtune.data.splits import split_samples
from speechtune.errors import Issue, ManifestError
from speechtune.types import AudioRef, Sample

PREFIX = "Please generate speech for given text in reference audio's voice: "
RATE = 8000


def write(path: Path, seconds: float = 0.5, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([seed, *path.name.encode()]).normal(0, 0.1, round(seconds * RATE))
    soundfile.write(path, noise.astype(np.float32), RATE)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("ref.wav", "target.wav", "other.wav"):
        write(tmp_path / name)
    return tmp_path


def audio(url: str = "target.wav", **fields: Any) -> dict[str, Any]:
    return {"type": "audio", "audio_url": url, **fields}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def message(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": list(parts)}


def cloning(target: str = "Hello there.", **fields: Any) -> dict[str, Any]:
    """The layout of the original pipeline."""
    user = message("user", text("What the reference says."), audio("ref.wav"), text(PREFIX + target))
    return {"messages": [user, message("assistant", text(target), audio())], "speaker": "anna", **fields}


def native(target: str = "Hello there.", **fields: Any) -> dict[str, Any]:
    turns = [message("user", text("What the reference says.")), message("assistant", audio("ref.wav"))]
    turns += [{"role": "user", "content": target}, {"role": "assistant", "content": audio()}]
    return {"messages": turns, **fields}


def save(folder: Path, *rows: Any, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one(path: Path, **options: Any) -> Sample:
    result = read_samples(path, DataConfig(**options))
    assert result.issues == [] and len(result.samples) == result.num_rows == 1
    return result.samples[0]


def issues(path: Path, deep: bool | None = None, **options: Any) -> list[Issue]:
    """Issues of reading; with `deep` given, also those of the audio."""
    config = DataConfig(**options)
    result = read_samples(path, config)
    found = result.issues
    if deep is not None:
        found = found + check_audio(result.samples, config, deep).issues
    return found


def only(path: Path, code: str, message: str, **options: Any) -> Issue:
    found = issues(path, **options)
    assert [issue.code for issue in found] == [code], found
    assert message in found[0].message
    return found[0]


# ---- formats


def test_original_layout_is_rebuilt_into_reference_and_target(folder: Path) -> None:
    """Guards against the reference audio being dropped without a word by the hub's template."""
    sample = one(save(folder, cloning("Hello there.", start_index=1, misc={"language": "en", "mood": "calm"})))
    assert [(clip.audio.path, clip.text) for clip in sample.references] == [
        (str(folder / "ref.wav"), "What the reference says.")
    ]
    assert sample.text == "Hello there." and sample.audio == AudioRef(path=str(folder / "target.wav"))
    assert (sample.id, sample.speaker, sample.language, sample.system, sample.scene) == (
        "train-1", "anna", "en", None, None,
    )  # fmt: skip
    assert sample.source == f"{folder}/train.jsonl:1"


def test_precedence_of_target_and_reference_text(folder: Path) -> None:
    row = cloning("assistant's")
    row["messages"][0]["content"][2] = text(PREFIX + "user's")
    assert one(save(folder, row)).text == "assistant's"
    row["misc"] = {"target_transcript": "Assistants!", "ref_transcript": "ref from misc"}
    sample = one(save(folder, row))
    assert sample.text == "Assistants!" and sample.references[0].text == "ref from misc"
    row["misc"] = {"target_transcript": None, "ref_transcript": float("nan")}
    del row["messages"][1]["content"][0]
    sample = one(save(folder, row))
    assert sample.text == "user's" and sample.references[0].text == "What the reference says."


@pytest.mark.parametrize("prefix", ["Speak: ", "please generate speech for given text in reference audio's voice: "])
def test_only_the_exact_prefix_is_removed(folder: Path, prefix: str) -> None:
    row = cloning()
    row["messages"][0]["content"][2] = text(prefix + "now")
    del row["messages"][1]["content"][0]
    path = save(folder, row)
    assert one(path).text == prefix + "now"
    assert "without the instruction (1)" in read_samples(path, DataConfig()).notes[0]


SURVIVING = [
    "Note: this: holds: colons",
    "quotes \"double\", 'single', “curly” and \\ backslashes",
    "two\nlines\r\nand a\ttab",
    "  spaces at both ends  ",
    "مرحبا: كيف حالك؟",
    "नमस्ते दुनिया",
    "你好,世界:再见",
    "emoji 👩‍👩‍👧 and 🇫🇮",
    "e\u0301 is not é, and a zero\u200bwidth space",
    "line\u2028separator and next\u0085line",
    "[SPEAKER0] Hello. [SPEAKER1] Hi!",
    "a < b, a | b, <|not closed, <laugh>",
]


@pytest.mark.parametrize("target", SURVIVING)
@pytest.mark.parametrize("layout", ["assistant", "instruction", "misc", "native", "reference", "list"])
def test_texts_survive_byte_for_byte(folder: Path, target: str, layout: str) -> None:
    """Guards against `text.split(":")[-1]`, which cuts every target that holds a colon, and against strip()."""
    row = native(target) if layout == "native" else cloning(target)
    if layout == "instruction":
        del row["messages"][1]["content"][0]
    elif layout == "misc":
        row = cloning(target, misc={"target_transcript": target})
        del row["messages"][1]["content"][0]
    elif layout == "reference":
        row["messages"][0]["content"][0] = text(target)
    path = save(folder, row)
    if layout == "list":
        path = folder / "train.json"
        path.write_text(json.dumps([row], ensure_ascii=False, indent=1), encoding="utf-8")
    sample = one(path)
    assert (sample.references[0].text if layout == "reference" else sample.text) == target


def test_native_layout(folder: Path) -> None:
    sample = one(save(folder, native("Spoken text.", id="n1", start_index=3)))
    assert (sample.id, sample.text) == ("n1", "Spoken text.")
    assert sample.audio == AudioRef(str(folder / "target.wav"))
    assert [(clip.audio.path, clip.text) for clip in sample.references] == [
        (str(folder / "ref.wav"), "What the reference says.")
    ]


def test_native_layout_with_conflicting_texts(folder: Path) -> None:
    row = native("Spoken text.")
    row["messages"][3] = message("assistant", text("Something else."), audio())
    only(save(folder, row), "text_conflict", "which one is spoken?")


def test_system_and_scene(folder: Path) -> None:
    content = "Generate audio.\n\n<|scene_desc_start|>\nA quiet room: no echo.\n<|scene_desc_end|>"
    row = cloning()
    row["messages"].insert(0, {"role": "system", "content": content})
    sample = one(save(folder, row))
    assert sample.system == "Generate audio." and sample.scene == "A quiet room: no echo."
    row["messages"][0]["content"] = content.removeprefix("Generate audio.")
    sample = one(save(folder, row))
    assert sample.system is None and sample.scene == "A quiet room: no echo."


def test_ms_swift(folder: Path) -> None:
    row = {"messages": [], "audios": ["ref.wav", "target.wav"], "id": "s"}
    row["messages"] = [
        {"role": "user", "content": f"What it says.<audio>{PREFIX}Target: text"},
        {"role": "assistant", "content": "<audio>"},
    ]
    sample = one(save(folder, row))
    assert sample.text == "Target: text" and sample.audio == AudioRef(path=str(folder / "target.wav"))
    assert sample.references[0].text == "What it says." and sample.references[0].audio.path == str(folder / "ref.wav")
    row["messages"][0]["content"] = "<audio>What it says."
    row["messages"][1]["content"] = "<audio>\nTarget: text"
    assert one(save(folder, row)) == sample


def test_ms_swift_audios_are_never_shifted(folder: Path) -> None:
    """Guards against the audio index shifted onto the wrong clip."""
    turns = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "<audio>"}]
    turns += [{"role": "user", "content": "Two."}, {"role": "assistant", "content": "<audio>"}]
    turns += [{"role": "user", "content": "Three."}, {"role": "assistant", "content": "<audio>"}]
    row = {"messages": turns, "audios": ["other.wav", "ref.wav", "target.wav"]}
    sample = one(save(folder, row))
    found = [(clip.text, Path(str(clip.audio)).name) for clip in sample.references]
    assert found == [("One.", "other.wav"), ("Two.", "ref.wav")]
    assert sample.text == "Three." and sample.audio == AudioRef(path=str(folder / "target.wav"))
    for audios in (["ref.wav", "target.wav"], ["a", "b", "c", "d"]):
        path = save(folder, row | {"audios": audios})
        only(path, "audio_count", f"3 <audio> tag(s) in the messages, but {len(audios)} entries")


def metadata(folder: Path, *samples: dict[str, Any]) -> Path:
    (folder / "metadata.json").write_text(json.dumps({"version": {"a": [1]}, "samples": samples}, indent=1))
    return folder


def entry(name: str, speaker: str | None = "anna", **fields: Any) -> dict[str, Any]:
    return {"id": name, "audio_file": f"{name}.wav", "transcript": f"Text {name}.", "speaker_id": speaker, **fields}


def test_metadata_folder(folder: Path) -> None:
    (folder / "t.txt").write_bytes("\ufeffDal file: sì.  \r\n".encode())
    rows = [
        entry("target", duration=0.5, ref_audio_file="ref.wav", ref_transcript="The reference.", language="it"),
        {"id": "other", "audio_file": "other.wav", "transcript_file": "t.txt", "speaker_id": 7},
    ]
    for path in (metadata(folder, *rows), folder / "metadata.json"):
        result = read_samples(path, DataConfig())
        assert result.issues == []
        first, second = result.samples
        assert first.references[0].text == "The reference." and first.references[0].audio.path == str(
            folder / "ref.wav"
        )
        assert first.language == "it" and first.audio == AudioRef(path=str(folder / "target.wav"))
        assert second.text == "Dal file: sì.  " and second.speaker == "7" and second.references == ()
        assert result.notes == [
            "1 sample(s) without reference, their speaker is not named or has no other utterance: other"
        ]


def test_references_are_borrowed_from_the_same_speaker(folder: Path) -> None:
    order = [("a1", "a"), ("b1", "b"), ("a2", "a"), ("a3", "a"), ("b2", "b"), ("c1", "c"), ("x1", None), ("x2", None)]
    path = metadata(folder, *(entry(name, speaker) for name, speaker in order))
    result = read_samples(path, DataConfig())
    lenders = {sample.id: [Path(str(clip.audio)).stem for clip in sample.references] for sample in result.samples}
    assert lenders == {
        "a1": ["a2"], "a2": ["a3"], "a3": ["a1"], "b1": ["b2"], "b2": ["b1"], "c1": [], "x1": [], "x2": [],
    }  # fmt: skip
    assert all(clip.text == f"Text {Path(str(clip.audio)).stem}." for s in result.samples for clip in s.references)
    assert result.notes == [
        "3 sample(s) without reference, their speaker is not named or has no other utterance: c1, x1, x2"
    ]


def test_a_sample_never_borrows_its_own_audio(folder: Path) -> None:
    rows = [entry("one", audio_file="target.wav"), entry("two", audio_file="target.wav"), entry("other")]
    samples = read_samples(metadata(folder, *rows), DataConfig()).samples
    assert [Path(str(sample.references[0].audio)).stem for sample in samples] == ["other", "other", "target"]


def test_wav_txt_pairs(tmp_path: Path) -> None:
    for name in ("anna/1.wav", "anna/2.flac", "bert/1.wav"):
        write(tmp_path / "set" / name).with_suffix(".txt").write_text(f"Text {name}\n")
    (tmp_path / "set" / "README.txt").write_text("not a transcript")
    result = read_samples(tmp_path / "set", DataConfig())
    assert result.issues == []
    assert [(s.id, s.speaker, s.text) for s in result.samples] == [
        ("anna/1", "anna", "Text anna/1.wav"),
        ("anna/2", "anna", "Text anna/2.flac"),
        ("bert/1", "bert", "Text bert/1.wav"),
    ]
    assert [len(s.references) for s in result.samples] == [1, 1, 0]
    flat = read_samples(tmp_path / "set" / "anna", DataConfig())
    assert [(s.id, s.speaker) for s in flat.samples] == [("1", "anna"), ("2", "anna")]
    write(tmp_path / "set/anna/3.wav")
    (tmp_path / "set/anna/4.txt").write_text("alone")
    write(tmp_path / "set/anna/2.wav")
    found = {issue.sample_id: issue.code for issue in issues(tmp_path / "set" / "anna")}
    assert found == {"anna-2": "duplicate_audio", "anna-3": "missing_text", "anna-4": "missing_audio"}


def test_single_object_list_and_jsonl_are_the_same(folder: Path) -> None:
    row = cloning()
    expected = one(save(folder, row))
    contents = [json.dumps(row), json.dumps(row, indent=2), json.dumps([row]), f"\ufeff\n [\n{json.dumps(row)}\n]\n"]
    for content in contents:
        (folder / "train.json").write_text(content, encoding="utf-8")
        sample = one(folder / "train.json")
        assert (sample.text, sample.audio, sample.references) == (expected.text, expected.audio, expected.references)


@pytest.mark.parametrize("content", ["", "\x00\x01", '"text"', "- yaml: yes"])
def test_unknown_formats_are_refused_explicitly(folder: Path, content: str) -> None:
    path = folder / "train.json"
    path.write_text(content)
    with pytest.raises(ManifestError, match=r"neither JSON nor JSONL nor a table.*docs/data\.md lists the layouts"):
        read_samples(path, DataConfig())


def test_missing_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file or folder"):
        read_samples(tmp_path / "none.json", DataConfig())
    with pytest.raises(ManifestError, match=r"holds neither metadata\.json nor any other data file"):
        read_samples(tmp_path, DataConfig())
    write(tmp_path / "a.wav")
    with pytest.raises(ManifestError, match=r"no audio file has a \.txt"):
        read_samples(tmp_path, DataConfig())
    (tmp_path / "empty.json").write_text("[]")
    assert [issue.code for issue in issues(tmp_path / "empty.json")] == ["empty_manifest"]
    with pytest.raises(ManifestError, match="holds no rows"):
        load_samples(tmp_path / "empty.json", DataConfig(on_error="quarantine", quarantine_limit=1.0))


# ---- issues of rows


def broken(kind: str) -> dict[str, Any]:
    row = cloning()
    user, assistant = row["messages"]
    changes: dict[str, Any] = {
        "role": lambda: assistant.update(role="bot"),
        "order": lambda: row["messages"].reverse(),
        "no_answer": lambda: row["messages"].pop(),
        "no_messages": lambda: row.update(messages=[]),
        "no_audio": lambda: assistant.update(content="only text"),
        "two_audios": lambda: assistant["content"].append(audio("other.wav")),
        "empty": lambda: assistant["content"].__setitem__(0, text(" \n\t")) or user["content"].pop(),
        "no_ref_text": lambda: user["content"].pop(0),
        "null_content": lambda: assistant.update(content=None),
        "part": lambda: user["content"].append({"type": "image", "url": "x"}),
        "eot": lambda: assistant["content"].__setitem__(0, text("stop <|eot_id|> now")),
        "ref_token": lambda: user["content"].__setitem__(0, text("<|audio_out_bos|>")),
        "surrogate": lambda: assistant["content"].__setitem__(0, text("bad \ud800 text")),
        "start": lambda: row.update(start_index=2),
        "start_type": lambda: row.update(start_index="first"),
        "misc": lambda: row.update(misc="text"),
        "self": lambda: user["content"].__setitem__(1, audio("./target.wav")),
        "zero": lambda: assistant["content"][1].update(duration=0),
        "negative": lambda: assistant["content"][1].update(offset=-0.5, duration=1.0),
        "duration_type": lambda: assistant["content"][1].update(duration="long"),
        "huge": lambda: assistant["content"][1].update(duration=10**400),
        "no_place": lambda: assistant["content"][1].update(audio_url=None),
        "base64": lambda: assistant["content"][1].update(audio_url="", raw_audio="UklG*Rg=="),
        "url": lambda: assistant["content"][1].update(audio_url="https://host/a.wav"),
        "file_url": lambda: assistant["content"][1].update(audio_url="file:///etc/passwd"),
        "data_url": lambda: assistant["content"][1].update(audio_url="data:audio/wav,AAAA"),
        "data_base64": lambda: assistant["content"][1].update(audio_url="data:audio/wav;base64,UklG*Rg=="),
        "nul": lambda: assistant["content"][1].update(audio_url="a\0b.wav"),
        "path": lambda: assistant["content"][1].update(audio_url="a\ud800b.wav"),
        "speaker": lambda: row.update(speaker="\udc80"),
        "speaker_type": lambda: row.update(speaker=["anna"]),
    }
    changes[kind]()
    return row


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("role", "wrong_roles", "messages[1]: role 'bot'"),
        ("order", "wrong_roles", "found assistant, user"),
        ("no_answer", "wrong_roles", "ending in assistant; found user"),
        ("no_messages", "bad_row", "'messages' is not a list of messages"),
        ("no_audio", "missing_audio", "messages[1] (assistant): holds no audio part"),
        ("two_audios", "missing_audio", "2 audio parts, expected one"),
        ("empty", "empty_text", "the text spoken in the audio is empty"),
        ("no_ref_text", "no_reference_text", "the reference's text is empty"),
        ("null_content", "bad_part", "messages[1]: holds no text"),
        ("part", "bad_part", "found {'type': 'image'"),
        ("eot", "special_token", "'<|eot_id|>'"),
        ("ref_token", "special_token", "'<|audio_out_bos|>'"),
        ("surrogate", "bad_unicode", "lone surrogates"),
        ("start", "bad_start_index", "points past messages[1]"),
        ("start_type", "bad_field", "'start_index' is not a number but 'first'"),
        ("misc", "bad_field", "'misc' is not an object"),
        ("self", "target_is_reference", "the target is its own reference"),
        ("zero", "bad_duration", "0 s is not above 0"),
        ("negative", "bad_offset", "-0.5 s is negative"),
        ("duration_type", "bad_field", "'duration' is not a number but 'long'"),
        ("huge", "bad_field", "'duration' is not a number"),
        ("no_place", "missing_audio", "neither 'audio_url' nor 'raw_audio' is given"),
        ("base64", "bad_base64", "not valid base64"),
        ("url", "url_refused", "URLs are refused"),
        ("file_url", "url_refused", "scheme 'file' is refused"),
        ("data_url", "url_refused", "scheme 'data' is refused"),
        ("data_base64", "bad_base64", "'data:' is not valid base64"),
        ("nul", "bad_path", "NUL character"),
        ("path", "bad_path", "lone surrogate"),
        ("speaker", "bad_unicode", "'speaker' holds lone surrogates"),
        ("speaker_type", "bad_field", "'speaker' is not a text but ['anna']"),
    ],
)
def test_row_issues(folder: Path, kind: str, code: str, words: str) -> None:
    issue = only(save(folder, cloning(id="good"), {"id": "bad"} | broken(kind)), code, words, deep=False)
    assert (issue.source, issue.row, issue.sample_id) == (f"{folder}/train.jsonl:2", 2, "bad")
    assert str(issue).isprintable()


def test_file_urls_stay_refused_when_urls_are_allowed(folder: Path) -> None:
    only(save(folder, broken("file_url")), "url_refused", "scheme 'file'", allow_urls=True)
    assert one(save(folder, broken("url")), allow_urls=True).audio == AudioRef(url="https://host/a.wav")


def test_all_issues_of_all_rows_are_collected(folder: Path) -> None:
    bad = broken("eot")
    bad["messages"][0]["content"][0] = text("")
    path = save(folder, cloning(), bad, 3, {"words": "x", "sound": "y"}, cloning())
    found = [(issue.row, issue.code) for issue in issues(path)]
    assert found == [
        (2, "no_reference_text"), (2, "special_token"), (3, "bad_row"), (4, "unknown_format"),
    ]  # fmt: skip
    assert "its keys: 'words', 'sound'" in issues(path)[3].message
    assert [sample.id for sample in read_samples(path, DataConfig()).samples] == ["train-1", "train-5"]


def test_absent_is_not_an_issue(folder: Path) -> None:
    """Guards against None and NaN, which Arrow and pandas write for absent fields, read as values."""
    row = cloning(
        start_index=None, misc={"score": float("nan"), "language": None}, language=float("nan"), audios=None, id=None
    )
    for part in [*row["messages"][0]["content"], *row["messages"][1]["content"]]:
        part |= {k: None for k in ("text", "audio_url", "raw_audio", "duration") if k not in part}
        part["offset"] = float("nan")
    sample = one(save(folder, row))
    assert sample.language is None
    row["misc"] = None
    assert one(save(folder, row)).text == sample.text


def test_misc_cannot_set_fields_of_the_sample(folder: Path) -> None:
    row = cloning(misc={"row": 9, "declared_seconds": ["x"], "borrows_reference": True, "z": 1})
    row["messages"][0]["content"][1] = audio("missing.wav")
    (issue,) = issues(save(folder, row), deep=False)
    assert issue.code == "missing_file" and issue.row == 1
    (sample,) = read_samples(save(folder, row), DataConfig()).samples
    assert (sample.row, sample.declared_seconds, sample.borrows_reference) == (1, (), False)


def test_duplicate_ids(folder: Path) -> None:
    path = save(folder, cloning(id="x"), cloning(misc={"id": 7}), cloning(id="x"), cloning(id=7))
    assert [(f.row, f.code) for f in issues(path)] == [(3, "duplicate_id"), (4, "duplicate_id")]
    assert "already taken by row 1" in issues(path)[0].message


def test_transcript_issues(folder: Path) -> None:
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    (folder / "big.txt").write_bytes(b"x" * (2**20 + 1))
    rows = [
        {"id": "1", "audio_file": "ref.wav"},
        {"id": "2", "audio_file": "ref.wav", "transcript_file": "none.txt"},
        {"id": "3", "audio_file": "ref.wav", "transcript_file": "latin1.txt"},
        {"id": "4", "audio_file": "ref.wav", "transcript_file": "big.txt"},
        {"id": "5", "audio_file": "ref.wav", "text": " "},
        {"id": "6", "audio_file": None, "text": "no audio"},
    ]
    found = [(issue.sample_id, issue.code) for issue in issues(metadata(folder, *rows))]
    codes = ["empty_text", "missing_text", "bad_unicode", "bad_transcript", "empty_text", "missing_audio"]
    assert found == list(zip("123456", codes, strict=True))


# ---- lines and broken JSON


@pytest.mark.parametrize("chunk", [64, 2**20])
def test_lines_are_where_rows_start(folder: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(rows, "_CHUNK_CHARS", chunk)
    pretty = [json.dumps(broken("eot"), indent=3, ensure_ascii=False) for _ in range(3)]
    (folder / "list.json").write_text("\n[\n\n" + "\n,\n".join(pretty) + "\n]\n")
    height = pretty[0].count("\n") + 1
    lines = [int(issue.source.rpartition(":")[2]) for issue in issues(folder / "list.json")]
    assert lines == [4, 4 + height + 1, 4 + 2 * (height + 1)]
    (folder / "rows.jsonl").write_text(f"\n{json.dumps(broken('eot'))}\n\n\n{json.dumps(broken('eot'))}")
    assert [issue.source for issue in issues(folder / "rows.jsonl")] == [f"{folder}/rows.jsonl:{n}" for n in (2, 5)]
    (folder / "metadata.json").write_text('{"samples":\n[\n{"audio_file": "a.wav"},\n\n{"audio_file": "b.wav"}]}')
    assert [issue.source for issue in issues(folder)] == [f"{folder}/metadata.json:{n}" for n in (3, 5)]


def test_a_broken_jsonl_line_costs_only_itself(folder: Path) -> None:
    good = json.dumps(cloning())
    deep = "[" * 100_000
    path = folder / "train.jsonl"
    path.write_bytes(f"{good}\n{good[:-5]}\n{deep}\n{good}\n".encode() + good.encode().replace(b"Hello", b"\xff"))
    found = [(issue.row, issue.code) for issue in issues(path)]
    assert found == [(2, "invalid_json"), (3, "invalid_json"), (5, "bad_unicode")]


@pytest.mark.parametrize("ending", ["", ",", ",]", "]x", "] []", ' {"id": 1}]', ",\n{'id': 1}]", ", {]"])
@pytest.mark.parametrize("chunk", [64, 2**20])
def test_a_broken_list_is_an_issue_with_its_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ending: str, chunk: int
) -> None:
    monkeypatch.setattr(rows, "_CHUNK_CHARS", chunk)
    path = folder / "train.json"
    path.write_text("[" + ",\n".join(json.dumps(cloning()) for _ in range(3)) + ending)
    result = read_samples(path, DataConfig())
    assert len(result.samples) == 3
    assert [(issue.code, issue.row) for issue in result.issues] == [("unreadable_rest", 4)]
    assert result.issues[0].source == f"{path}:{4 if ending.startswith(',' + chr(10)) else 3}"
    with pytest.raises(ManifestError, match="the file breaks off"):
        load_samples(path, DataConfig(on_error="quarantine", quarantine_limit=1.0), folder)


def test_values_are_not_torn_at_a_chunk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CHUNK_CHARS", 64)
    (folder / "train.json").write_text(f"[{'1' * 1000}, {'2' * 1000}]")
    assert [(issue.row, issue.code) for issue in issues(folder / "train.json")] == [(1, "bad_row"), (2, "bad_row")]


# ---- containment


def test_paths_are_confined_to_audio_root(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Guards against a manifest that reads files outside the data, by `..`, absolute path, or symbolic link."""
    outside = write(tmp_path_factory.mktemp("outside") / "secret.wav")
    (folder / "file_link.wav").symlink_to(outside)
    (folder / "folder_link").symlink_to(outside.parent)
    (folder / "inner").mkdir()
    (folder / "inner_link.wav").symlink_to(folder / "other.wav")
    steps = "../" * 30
    refused = [str(outside), f"{steps}{outside}", "file_link.wav", "folder_link/secret.wav", "inner/../../x.wav", ".."]
    for url in refused:
        row = cloning()
        row["messages"][1]["content"][1]["audio_url"] = url
        issue = only(save(folder, row), "outside_root", "outside data.audio_root", audio_root=folder)
        assert str(folder) in issue.message
    for url in ("inner/../other.wav", str(folder / "other.wav"), "inner_link.wav"):
        row["messages"][1]["content"][1]["audio_url"] = url
        assert one(save(folder, row), audio_root=folder).audio == AudioRef(path=str(folder / "other.wav"))
    row["messages"][1]["content"][1]["audio_url"] = str(outside)
    assert one(save(folder, row)).audio == AudioRef(path=str(outside))


def test_references_and_transcripts_are_confined_too(folder: Path) -> None:
    write(folder / "clips/a.wav")
    (folder.parent / "secret.txt").write_text("root:x:0:0")
    (folder / "a.txt").write_text("beside the manifest")
    base = {"id": "a", "audio_file": "clips/a.wav", "transcript_file": "a.txt"}
    assert one(metadata(folder, base), audio_root=folder / "clips").text == "beside the manifest"
    for change in ({"transcript_file": "../secret.txt"}, {"ref_audio_file": "ref.wav", "ref_transcript": "x"}):
        path = metadata(folder, base | change)
        only(path, "outside_root", "leads to", audio_root=folder / "clips")


def test_target_equal_to_reference_is_seen_through_links(folder: Path) -> None:
    (folder / "link.wav").symlink_to("target.wav")
    row = cloning()
    row["messages"][0]["content"][1] = audio("link.wav")
    only(save(folder, row), "target_is_reference", "own reference", deep=False)
    row["messages"][0]["content"][1] = audio("link.wav", offset=0.2)
    assert issues(save(folder, row)) == []


# ---- audio


def test_inline_audio(folder: Path) -> None:
    content = (folder / "target.wav").read_bytes()
    row = cloning()
    row["messages"][1]["content"][1] = audio("placeholder", raw_audio=base64.b64encode(content).decode())
    path = save(folder, row)
    assert one(path).audio == AudioRef(data=content) and issues(path, deep=True) == []


def test_segments_and_declared_durations(folder: Path) -> None:
    write(folder / "target.wav", seconds=3.0)
    row = cloning()
    part = row["messages"][1]["content"][1]
    part["duration"] = 2.7
    sample = one(save(folder, row))
    assert sample.audio == AudioRef(path=str(folder / "target.wav")) and issues(save(folder, row), deep=False) == []
    part["duration"] = 2.4
    (issue,) = issues(save(folder, row), deep=False)
    assert issue.code == "duration_mismatch" and "declared as 2.40 s, but the file is 3.00 s long" in issue.message
    part["offset"] = 0.5
    sample = one(save(folder, row))
    assert sample.audio == AudioRef(path=str(folder / "target.wav"), offset_seconds=0.5, duration_seconds=2.4)
    assert issues(save(folder, row), deep=False) == []


def audio_issue(folder: Path, kind: str) -> dict[str, Any]:
    part: dict[str, Any] = audio("bad.wav")
    path, noise = folder / "bad.wav", np.random.default_rng(9).normal(0, 0.3, RATE).astype(np.float32)
    if kind == "empty":
        path.touch()
    elif kind == "text":
        path.write_text("x" * 1000)
    elif kind == "short":
        write(path, 0.05)
    elif kind == "long":
        write(path, 3.0)
    elif kind == "past_end":
        write(path)
        part["offset"] = 0.6
    elif kind == "end":
        write(path)
        part |= {"offset": 0.2, "duration": 1.0}
    elif kind == "silent":
        soundfile.write(path, noise * 0, RATE)
    elif kind == "clipped":
        soundfile.write(path, noise * 20, RATE)
    elif kind == "nan":
        soundfile.write(path, np.where(np.arange(RATE) == 5, np.nan, noise), RATE, subtype="FLOAT")
    elif kind == "copy":
        shutil.copy(folder / "ref.wav", path)
    elif kind == "recoded":
        samples, rate = soundfile.read(folder / "ref.wav", dtype="int16")
        soundfile.write(path, samples, rate, format="FLAC")
    elif kind == "cut":
        soundfile.write(path, noise, RATE, format="FLAC")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    row = cloning(id="bad")
    row["messages"][1]["content"][1] = part
    return row


@pytest.mark.parametrize(
    ("kind", "deep", "code", "words"),
    [
        ("missing", False, "missing_file", "no such file"),
        ("empty", False, "empty_file", "0 bytes"),
        ("text", False, "not_audio", "not audio libsndfile can read"),
        ("short", False, "too_short", "0.050 s is shorter than data.min_seconds (0.1 s)"),
        ("long", False, "too_long", "3.0 s is longer than data.max_seconds (2 s)"),
        ("past_end", False, "bad_offset", "past the end of the file (0.50 s)"),
        ("end", False, "duration_mismatch", "the segment ends at 1.20 s, but the file is 0.50 s long"),
        ("silent", True, "silent", "silent"),
        ("clipped", True, "clipped", "at full scale"),
        ("nan", True, "not_finite", "NaN"),
        ("copy", True, "target_is_reference", "identical"),
        ("recoded", True, "target_is_reference", "identical"),
        ("cut", True, "", ""),
    ],
)
def test_audio_issues(folder: Path, kind: str, deep: bool, code: str, words: str) -> None:
    path = save(folder, cloning(), audio_issue(folder, kind))
    (issue,) = issues(path, deep=True, max_seconds=2.0)
    assert issue.code == code or (not code and issue.code in ("truncated", "not_audio"))
    assert words in issue.message and (issue.row, issue.sample_id) == (2, "bad")
    assert str(folder) in issue.message or kind in ("copy", "recoded")
    assert len(issues(path, deep=False, max_seconds=2.0)) == (0 if deep else 1)


def test_each_clip_is_inspected_once_and_progress_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[AudioRef] = []
    real = audio_checks.audio_info
    monkeypatch.setattr(audio_checks, "audio_info", lambda ref, **options: opened.append(ref) or real(ref, **options))
    samples = read_samples(save(folder, *(cloning(id=n) for n in range(50))), DataConfig()).samples
    steps: list[tuple[int, int]] = []
    check = check_audio(samples, DataConfig(), progress=lambda done, total: steps.append((done, total)))
    assert check.issues == [] and len(opened) == 2 and steps == [(2, 2)]
    assert check.durations == {AudioRef(path=str(folder / n)): 0.5 for n in ("ref.wav", "target.wav")}


def test_issues_of_a_borrowed_clip_are_those_of_its_own_row(folder: Path) -> None:
    rows = [entry("target"), entry("missing"), entry("other")]
    found = issues(metadata(folder, *rows), deep=False)
    assert [(issue.sample_id, issue.code) for issue in found] == [("missing", "missing_file")]


# ---- loading and quarantine


def test_load_raises_once_with_all_issues(folder: Path) -> None:
    path = save(folder, audio_issue(folder, "missing"), *(broken("eot") for _ in range(30)), cloning())
    with pytest.raises(ManifestError) as caught:
        load_samples(path, DataConfig())
    lines = str(caught.value).splitlines()
    assert "31 issue(s) in 31 of 32 rows" in lines[0] and len(lines) == 22 and "and 11 more" in lines[-1]
    assert f"{path}:1: bad: " in lines[1] and f"{path}:2: train-2: " in lines[2] and len(caught.value.issues) == 31


def test_load_gives_sound_samples(folder: Path) -> None:
    samples = load_samples(save(folder, cloning(id="a"), native(id="b")), DataConfig())
    assert [sample.id for sample in samples] == ["a", "b"]


def test_quarantine_sets_bad_rows_aside(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against bad samples skipped in silence by going to idx+1."""
    bad = [broken("eot"), audio_issue(folder, "missing"), broken("surrogate")]
    path = folder / "train.json"
    path.write_text(json.dumps([*bad, *(cloning() for _ in range(7))]))  # all on one line
    config = DataConfig(on_error="quarantine", quarantine_limit=0.3)
    with caplog.at_level(logging.WARNING, "speechtune"):
        samples = load_samples(path, config, folder / "run")
    assert [sample.id for sample in samples] == [f"train-{n}" for n in range(4, 11)]
    assert "3 issue(s) in 3 of 10 rows" in caplog.text and "7 samples are left" in caplog.text
    file = folder / "run" / "quarantine-train.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [record["content"] for record in records] == bad
    codes = [record["issues"][0]["code"] for record in records]
    assert codes == ["special_token", "missing_file", "bad_unicode"] and records[1]["id"] == "bad"
    load_samples(path, config, folder / "run")
    assert len(file.read_text().splitlines()) == 3  # a rerun adds nothing
    path.write_text(json.dumps([broken("part"), *(cloning() for _ in range(9))]))
    load_samples(path, config, folder / "run")
    assert len(file.read_text().splitlines()) == 4  # and nothing is lost


def test_quarantine_has_a_limit(folder: Path) -> None:
    path = save(folder, broken("eot"), *(cloning() for _ in range(9)))
    with pytest.raises(ManifestError, match=r"10\.0% exceeds data\.quarantine_limit \(5\.0%\)"):
        load_samples(path, DataConfig(on_error="quarantine"), folder)
    path = save(folder, broken("eot"))
    with pytest.raises(ManifestError, match="no sample is left"):
        load_samples(path, DataConfig(on_error="quarantine", quarantine_limit=1.0), folder)


def test_quarantined_clips_are_no_longer_lent(folder: Path) -> None:
    rows = [entry("target"), entry("missing"), entry("other"), entry("ref")]
    config = DataConfig(on_error="quarantine", quarantine_limit=0.5)
    samples = load_samples(metadata(folder, *rows), config, folder)
    lenders = {sample.id: Path(str(sample.references[0].audio)).stem for sample in samples}
    assert lenders == {"target": "other", "other": "ref", "ref": "target"}


# ---- splitting


def made(count: int) -> list[Sample]:
    return [Sample(f"s{n}", "text", None) for n in range(count)]


@pytest.mark.parametrize(
    ("count", "fraction", "held"), [(10, 0.2, 2), (10, 0.001, 1), (2, 0.9, 1), (199, 0.005, 1), (10, 0.0, 0)]
)
def test_split_sizes(count: int, fraction: float, held: int) -> None:
    """Guards against a split that holds out 0 samples of a small set."""
    train, held_out = split_samples(made(count), fraction, seed=1)
    assert len(held_out) == held and len(train) == count - held
    assert sorted(s.id for s in train + held_out) == sorted(s.id for s in made(count))


def test_split_is_fixed_by_seed_and_keeps_order() -> None:
    samples = made(100)
    train, held_out = split_samples(samples, 0.2, seed=1)
    assert (train, held_out) == split_samples(samples, 0.2, seed=1)
    assert held_out != split_samples(samples, 0.2, seed=2)[1]
    assert held_out == [sample for sample in samples if sample in held_out]
    shuffled = samples.copy()
    random.Random(0).shuffle(shuffled)
    assert {s.id for s in split_samples(shuffled, 0.2, seed=1)[1]} == {s.id for s in held_out}


@pytest.mark.parametrize("count", [0, 1])
def test_split_needs_two(count: int) -> None:
    with pytest.raises(ManifestError, match="at least 2 are needed"):
        split_samples(made(count), 0.1, seed=1)


# ---- size

MEASURE = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
from speechtune.config import DataConfig
from speechtune.commands.validate import validate

start = time.perf_counter()
report = validate(Path(sys.argv[1]), DataConfig())
# Not ru_maxrss: that of a child begins with what its parent had when it forked.
status = Path("/proc/self/status").read_text().splitlines()
peak = int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) / 1024
times = [time.perf_counter() - start, time.process_time()]
print(json.dumps([report.statistics["num_samples"], len(report.issues), *times, peak]))
"""


@pytest.mark.slow
def test_200_000_rows_validate_in_a_gigabyte(tmp_path: Path) -> None:
    """Guards against a JSON list held in memory: 400,000 distinct clips, every header opened."""
    sources = [write(tmp_path / f"source{n}.wav", seconds=2.0) for n in range(8)]  # ext4 allows 65,000 links to a file
    with (tmp_path / "train.json").open("w") as file:
        for n in range(200_000):
            row = json.dumps(cloning(f"Sentence number {n}: with a colon.", start_index=1, id=f"id-{n}"))
            row = row.replace('ref.wav"', f'r{n}.wav", "duration": 2.0').replace("target.wav", f"t{n}.wav")
            file.write(("[" if n == 0 else ", ") + row)
            for name, source in (("r", sources[n % 4]), ("t", sources[4 + n % 4])):
                (tmp_path / f"{name}{n}.wav").hardlink_to(source)
        file.write("]")
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "train.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    num_samples, num_issues, wall_seconds, cpu_seconds, mebibytes = json.loads(done.stdout)
    print(f"{wall_seconds:.1f} s, of the processor {cpu_seconds:.1f} s, {mebibytes:.0f} MiB")
    shutil.rmtree(tmp_path)
    assert (num_samples, num_issues) == (200_000, 0)
    assert mebibytes < 1024

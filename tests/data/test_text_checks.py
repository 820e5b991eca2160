"""Texts beside their clips: one clip with several texts, and texts that cannot be spoken in their clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from speechtune.commands.validate import Report, validate
from speechtune.config import DataConfig
from speechtune.data.manifest import load_samples
from speechtune.data.text_checks import alike
from speechtune.errors import ManifestError

RATE = 8000


def clip(path: Path, seconds: float, seed: int = 0) -> str:
    soundfile.write(path, np.random.default_rng(seed).normal(0, 0.1, round(seconds * RATE)), RATE)
    return path.name


def check(folder: Path, rows: list[dict[str, Any]], deep: bool = True) -> Report:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return validate(path, DataConfig(), deep=deep)


def codes(report: Report) -> list[tuple[int, str]]:
    return [(issue.row, issue.code) for issue in report.issues]


@pytest.mark.parametrize("deep", [True, False])
def test_one_clip_with_two_texts_is_an_issue(tmp_path: Path, deep: bool) -> None:
    """Guards against a model that learns two sentences for one recording; validate and train called it "no issues"."""
    one, two = clip(tmp_path / "a.wav", 3, 1), clip(tmp_path / "b.wav", 3, 2)
    rows = [
        {"audio": one, "text": "The train to London leaves at nine."},
        {"audio": two, "text": "Please hold the line."},
        {"audio": one, "text": "My sister has never liked cheese."},
    ]
    report = check(tmp_path, rows, deep)
    assert codes(report) == [(3, "different_texts")]
    (issue,) = report.issues
    assert "My sister" in issue.message and "The train" in issue.message and "rows.jsonl:1" in issue.message
    with pytest.raises(ManifestError, match="different_texts"):
        load_samples(tmp_path / "rows.jsonl", DataConfig())


def test_copies_of_a_clip_are_one_clip_when_they_are_decoded(tmp_path: Path) -> None:
    one = clip(tmp_path / "a.wav", 3)
    soundfile.write(tmp_path / "copy.flac", soundfile.read(tmp_path / one)[0], RATE)
    rows = [{"audio": one, "text": "The train leaves."}, {"audio": "copy.flac", "text": "No cheese, please."}]
    assert codes(check(tmp_path, rows)) == [(2, "different_texts")] and not check(tmp_path, rows, deep=False).issues


def test_a_clip_as_target_and_as_reference_with_another_text(tmp_path: Path) -> None:
    one, two = clip(tmp_path / "a.wav", 3, 1), clip(tmp_path / "b.wav", 3, 2)
    row = {"audio": two, "text": "Please hold the line.", "ref_audio": one, "ref_text": "My sister likes cheese."}
    rows = [{"audio": one, "text": "The train to London leaves."}, row]
    assert codes(check(tmp_path, rows)) == [(2, "different_texts")]


@pytest.mark.parametrize(
    ("text", "other", "wanted"),
    [
        ("Hello, World!", "hello world", True),
        ("Dr. Smith paid $20.", "Doctor Smith paid twenty dollars.", True),
        ("你好，世界。", "你好世界", True),
        ("The train leaves at nine.", "My sister has never liked cheese.", False),
        ("Yes.", "No.", False),
        ("你好，世界。", "我不喜欢奶酪", False),
    ],
)
def test_spellings_of_one_sentence_are_no_conflict(tmp_path: Path, text: str, other: str, wanted: bool) -> None:
    """Guards against refusing data that holds a text as it is written and as it is spoken."""
    assert alike(text, other) is alike(other, text) is wanted
    one = clip(tmp_path / "a.wav", 4)
    report = check(tmp_path, [{"audio": one, "text": text}, {"audio": one, "text": other}])
    assert codes(report) == ([] if wanted else [(2, "different_texts")])
    assert any("spelled otherwise" in note for note in report.notes) is (other == "Doctor Smith paid twenty dollars.")


@pytest.mark.parametrize(
    ("text", "seconds", "spoken"),
    [
        ("Please hold while I try that extension.", 2.5, True),
        ("Please hold while I try that extension, and then another one of them, until you are connected.", 1.2, False),
        ("请稍等，我正在为您转接分机。", 3.0, True),
        ("请稍等，我正在为您转接分机，然后再试另一个，直到您接通为止，谢谢您的耐心等待。", 1.2, False),
        ("Yes!", 0.15, True),
    ],
)
def test_a_text_that_cannot_be_spoken_in_its_clip(tmp_path: Path, text: str, seconds: float, spoken: bool) -> None:
    report = check(tmp_path, [{"audio": clip(tmp_path / "a.wav", seconds), "text": text}], deep=False)
    assert codes(report) == ([] if spoken else [(1, "text_too_long")])
    assert spoken or f"in {seconds:.2f} s cannot be spoken" in report.issues[0].message


def test_texts_that_stand_out_beside_the_others(tmp_path: Path) -> None:
    """Among slow readers 28 characters a second are wrong; one in two seconds is told, for a clip may hold a pause."""
    rows = [{"audio": clip(tmp_path / f"{n}.wav", 4, n), "text": f"Sentence number {n} is read."} for n in range(24)]
    rows.append(
        {
            "audio": clip(tmp_path / "fast.wav", 2, 90),
            "text": "This sentence has far more words than its clip has room for",
        }
    )
    rows.append({"audio": clip(tmp_path / "slow.wav", 20, 91), "text": "Hm, well."})
    report = check(tmp_path, rows)
    assert codes(report) == [(25, "text_too_long")]
    assert any(
        "1 clip(s) five times as long as their texts take" in note and "rows-26" in note for note in report.notes
    )
    assert not check(tmp_path, rows[20:]).issues, "six clips make no measure"


def test_assistants_text_against_target_transcript(tmp_path: Path) -> None:
    """Guards against the one silently winning over the other: nobody knows which is spoken."""
    name = clip(tmp_path / "a.wav", 4)

    def row(said: str, transcript: str) -> dict[str, Any]:
        spoken = [{"type": "text", "text": said}, {"type": "audio", "audio_url": name}]
        messages = [{"role": "user", "content": said}, {"role": "assistant", "content": spoken}]
        return {"messages": messages, "misc": {"target_transcript": transcript}}

    report = check(tmp_path, [row("The train leaves at nine.", "My sister likes cheese.")])
    assert codes(report) == [(1, "text_conflict")] and "which one is spoken?" in report.issues[0].message
    report = check(tmp_path, [row("It is 9 o'clock now.", "It is nine o'clock now.")])
    assert not report.issues and any("differs from target_transcript" in note for note in report.notes)
    assert not check(tmp_path, [row("It is nine!", "it is nine")]).notes

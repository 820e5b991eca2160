"""The verb validate: statistics, JSON and tables."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from rich.console import Console

from speechtune.commands.validate import guess_script, print_report, run_validate, statistics, validate
from speechtune.config import DataConfig
from speechtune.errors import ManifestError
from speechtune.types import AudioRef, Clip, Sample

EXAMPLE = Path(__file__).parents[2] / "examples" / "chatml_zero_shot_example.json"
CLIPS = Path(__file__).parents[2] / "src" / "speechtune" / "assets" / "demo-voices"


def manifest(folder: Path, *rows: dict[str, Any]) -> Path:
    for n in range(3):
        noise = np.random.default_rng(n).normal(0, 0.1, 8000 * (n + 1)).astype(np.float32)
        soundfile.write(folder / f"{n}.wav", noise, 8000)
    (folder / "metadata.json").write_text(json.dumps({"samples": rows}))
    return folder


def entry(n: int, **fields: Any) -> dict[str, Any]:
    return {"id": f"id{n}", "audio_file": f"{n}.wav", "text": f"Text {n}", "speaker_id": "anna", **fields}


def shown(path: Path, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_report(validate(path, DataConfig(), **options), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_statistics() -> None:
    refs = [AudioRef(path=f"{n}.wav") for n in range(4)]
    samples = [
        Sample("a", "Hello.", refs[0], (Clip(refs[1], "x"),), speaker="anna", language="en"),
        Sample("b", "Привет, world", refs[1], speaker="anna"),
        Sample("c", "مرحبا", refs[2], speaker="bert"),
        Sample("d", "123", refs[3]),
    ]
    values = statistics(samples, {refs[0]: 0.5, refs[1]: 5.0, refs[2]: 3594.5})
    assert values == {
        "num_samples": 4,
        "hours": 1.0,
        "unknown_durations": 1,
        "with_reference": 1,
        "without_reference": 3,
        "speakers": {"anna": 2, "bert": 1, "(not given)": 1},
        "languages": {"en": 1, "Cyrillic script": 1, "Arabic script": 1, "no letters": 1},
        "duration_histogram": {
            "0-1": 1, "1-2": 0, "2-5": 0, "5-10": 1, "10-15": 0, "15-20": 0, "20-30": 0, "30-60": 0, "60+": 1,
        },
    }  # fmt: skip
    assert statistics([], {})["hours"] == 0


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("où ça?", "Latin script"),
        ("你好吗 ok", "Chinese characters"),
        ("नमस्ते", "Devanagari script"),
        ("カタカナとひらがな", "Japanese"),
        ("한국어", "Korean"),
        ("😀 1, 2", "no letters"),
    ],
)
def test_script_of_a_text(text: str, script: str) -> None:
    assert guess_script(text) == script


def test_sound_manifest(tmp_path: Path) -> None:
    report = validate(manifest(tmp_path, *(entry(n) for n in range(3))), DataConfig(), deep=True)
    assert report.issues == [] and report.notes == []
    assert report.statistics["hours"] == round(6 / 3600, 4) and report.statistics["with_reference"] == 3
    assert "no issues" in shown(tmp_path) and "anna: 3" in shown(tmp_path)


def test_issues_are_listed_in_row_order_and_not_counted_as_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [entry(0), entry(7), entry(1, text="<|eot_id|>"), entry(8), entry(2)]
    report = validate(manifest(tmp_path, *rows), DataConfig())
    assert [(issue.row, issue.code) for issue in report.issues] == [
        (2, "missing_file"), (3, "special_token"), (4, "missing_file"),
    ]  # fmt: skip
    assert (report.statistics["num_rows"], report.statistics["num_samples"]) == (5, 2)
    assert run_validate(tmp_path, metadata_only=True, as_json=True) == 2
    values = json.loads(capsys.readouterr().out)
    assert values["issues"][1]["sample_id"] == "id1" and values["statistics"] == report.statistics
    output = shown(tmp_path)
    assert "3 issue(s)" in output and "id7" in output and "no issues" not in output


def test_markup_and_control_characters_are_shown_not_obeyed(tmp_path: Path) -> None:
    rows = [entry(0, id="[red]x[/red]", text="[SPEAKER0] <|a|>"), entry(1, id="\x1b[2Jclear", audio_file="[/].wav")]
    output = shown(manifest(tmp_path, *rows))
    assert "[red]x[/red]" in output and "[/].wav" in output
    assert "\x1b" not in output and "\\x1b[2Jclear" in output


def test_many_issues_are_cut_and_summed(tmp_path: Path) -> None:
    output = shown(manifest(tmp_path, *(entry(n + 10) for n in range(60))))
    assert "60 issue(s)" in output and "... and 10 more; in all: 60 missing_file" in output


def test_urls_are_noted_when_not_fetched(tmp_path: Path) -> None:
    path = manifest(tmp_path, entry(0, audio_file="http://127.0.0.1:9/a.wav"))
    report = validate(path, DataConfig(allow_urls=True))
    assert report.issues == [] and report.notes[-1].startswith("1 clip(s) given as URL were not fetched")
    (issue,) = validate(path, DataConfig(allow_urls=True), deep=True).issues
    assert issue.code == "download_failed"


def test_no_such_manifest(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file or folder"):
        validate(tmp_path / "none", DataConfig())


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the demo clips are not in this tree")
def test_the_shipped_example_is_sound() -> None:
    report = validate(EXAMPLE, DataConfig(), deep=True)
    assert report.issues == [] and report.statistics["num_samples"] == 8
    assert len(report.statistics["speakers"]) == 4 and report.statistics["with_reference"] == 8

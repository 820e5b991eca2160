"""The verb: what it refuses before it works, what it prints, and training on what it wrote."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from conftest import Case
from speechtune.cli import main
from speechtune.commands.prepare import print_summary, read_config
from speechtune.errors import ConfigError
from speechtune.families.higgs_audio_v2 import tiny
from speechtune.preparation.report import page
from speechtune.preparation.settings import PrepareConfig
from speechtune.preparation.summary import summarise
from speechtune.types import AudioRef


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert main(["prepare", *map(str, words)]) == 2
    return capsys.readouterr().err


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "recordings"
    folder.mkdir()
    soundfile.write(folder / "a.wav", np.zeros(16_000), 16_000)
    return folder


def test_what_cannot_work_is_said_before_work_begins(
    recordings: Path, tmp_path: Path, asr_spec: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"
    asr = ("--asr", asr_spec)
    assert "no recogniser is named" in refused(capsys, recordings, "--out", out)
    assert "did you mean 'quality.min_mos'" in refused(capsys, recordings, "quality.minmos=3", "--out", out, *asr)
    assert "at least twice" in refused(capsys, recordings, "cut.max_seconds=3", "--out", out, *asr)
    assert "no such file" in refused(capsys, tmp_path / "nothing", "--out", out, *asr)
    assert "among the recordings" in refused(capsys, recordings, "--out", recordings / "data", *asr)
    assert "--script" in refused(capsys, recordings, "--out", out, "--script", tmp_path / "no.txt", *asr)
    (tmp_path / "other" / "clips").mkdir(parents=True)
    assert "not made by" in refused(capsys, recordings, "--out", tmp_path / "other", *asr)
    assert not out.exists()
    for module in ("pyloudnorm", "rapidfuzz"):
        monkeypatch.setitem(sys.modules, module, None)
        found = refused(capsys, recordings, "--out", out, *asr)
        assert f"package {module} is missing" in found and "pip install 'speechtune[" in found
        monkeypatch.undo()


def test_a_recording_without_speech_is_no_go_and_no_error(
    recordings: Path, tmp_path: Path, asr_spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "prepare",
        str(recordings),
        "--out",
        str(tmp_path / "data"),
        "--asr",
        asr_spec,
        "--language",
        "en",
        "--json",
    ]
    assert main(words) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "NO-GO" and found["seconds"] == {"silence": 1.0} and found["seconds_given"] == 1.0
    assert "NO-GO" in (tmp_path / "data" / "report.html").read_text(encoding="utf-8")


def test_settings_are_written_as_they_are_read(tmp_path: Path) -> None:
    assert read_config(None, ["cut.max_seconds=10"]).cut.max_seconds == 10
    (tmp_path / "a.yaml").write_text("quality:\n  min_mos: 2.5\n")
    assert read_config(tmp_path / "a.yaml", ["cut.max_seconds=10"]).quality.min_mos == 2.5
    with pytest.raises(ConfigError, match="no such option"):
        read_config(tmp_path / "a.yaml", ["quality.nothing=1"])


@pytest.mark.slow
def test_every_second_is_accounted_for_and_the_page_says_it(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    summary = summarise(case.prepared)
    total, rate = soundfile.read(case.recording)
    assert summary.seconds_given == pytest.approx(len(total) / rate, abs=0.01)
    assert sum(summary.seconds.values()) == pytest.approx(summary.seconds_given, abs=0.1)
    kept = [json.loads(line) for line in (case.out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert summary.seconds["train"] + summary.seconds["test"] == pytest.approx(
        sum(r["duration"] for r in kept), abs=0.1
    )
    assert summary.seconds["noise"] == pytest.approx(7, abs=0.2)
    said = {"other": 0.0, "sentence": 0.0, "repeated": 0.0}
    for part in case.parts:
        if part.kind in said:
            said[part.kind] += part.end - part.start
    assert summary.voices["voice-2"] == pytest.approx(said["other"], rel=0.05)
    assert summary.voices["voice-1"] == pytest.approx(said["sentence"] + said["repeated"], rel=0.05)
    assert summary.verdict == "NO-GO" and len(summary.problems) == 2, "half a minute is too little"
    html = page(case.prepared, summary)
    for text in ("NO-GO", "What to record next", summary.coverage.next_sentences[0], "not measured", "said before"):
        assert text in html
    assert "http" not in html.replace("http-equiv", "")
    print_summary(summary, case.out)
    assert "NO-GO" in capsys.readouterr().out


@pytest.mark.slow
def test_two_voices_are_asked_about(case: Case) -> None:
    config = case.prepared.request.config
    asked: dict[str, Any] = {"verdict": {"min_minutes": 0, "min_clips": 1, "max_second_voice": 0.1}}
    strict = PrepareConfig.model_validate(config.model_dump() | asked)
    request = replace(case.prepared.request, config=strict)
    (problem,) = summarise(replace(case.prepared, request=request)).problems
    assert "whose voice is wanted" in problem and "speakers.voice=voice-2" in problem


@pytest.mark.slow
def test_what_is_prepared_trains_and_speaks(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """prepare -> train -> generate by the command line, on the embedded default."""
    speech = [AudioRef(str(path)) for path in sorted((case.out / "clips").glob("*.flac"))[:4]]
    base = tiny.make_base(tmp_path / "base", speech)
    recipe = tmp_path / "recipe.yaml"
    sections = {
        "family": "higgs_audio_v2",
        "output_dir": str(tmp_path / "run"),
        "model": {key: str(value) for key, value in base.items()},
        "lora": {"rank": 4, "alpha": 8},
        "train": {"max_steps": 2, "batch_size": 2, "learning_rate": 1e-3},
        "evaluate": {"every_steps": 2, "prompts": 0},
        "tracking": {"trackers": []},
    }
    recipe.write_text(json.dumps(sections))
    assert main(["train", str(recipe), f"data.train={case.out}", f"data.eval={case.out}"]) == 0
    row = json.loads((case.out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()[0])
    words = ["generate", "--adapter", str(tmp_path / "run" / "lora_adapters"), "--text", "Hello there."]
    words += ["--reference", str(case.out / row["audio"]), "--reference-text", row["text"]]
    words += ["--codec", str(base["codec_path"]), "--max-new-tokens", "40", "--cache-dir", str(tmp_path / "cache")]
    assert main([*words, "--out", str(tmp_path / "hello.wav")]) == 0
    assert soundfile.info(tmp_path / "hello.wav").frames > 0

"""`speechtune generate` writes what it says: one wav per id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechtune.audio import read_audio
from speechtune.cli import main
from speechtune.inference.generate import write_outputs
from speechtune.types import Audio, AudioRef, Output


def test_each_id_gets_a_wav_of_its_own(tmp_path: Path) -> None:
    """Guards against ids that sanitise alike: one wav was written over the other, and the list named it twice."""
    ids = ["Yes!", "Yes?", "s/1", "s 1"]
    levels = [0.1, 0.2, 0.3, 0.4]
    outputs = [
        Output(name, Audio(np.full(2400, level, np.float32), 24_000), None, True, 10)
        for name, level in zip(ids, levels, strict=True)
    ]
    rows = write_outputs(iter(outputs), tmp_path / "out")
    assert [row["id"] for row in rows] == ids and len(list((tmp_path / "out").glob("*.wav"))) == 4
    for row, level in zip(rows, levels, strict=True):
        assert abs(float(read_audio(AudioRef(str(row["audio"]))).samples.mean()) - level) < 1e-3


def refused(capsys: pytest.CaptureFixture[str], *words: object, out: Path = Path("never.wav")) -> str:
    assert main(["generate", *map(str, words), "--model", "nowhere/at-all", "--out", str(out)]) == 2
    return capsys.readouterr().err


def test_a_reference_without_speech_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a voice made up from silence, from channels that cancel out, or from 12 ms of sound."""
    noise = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    clips = {
        "silent.wav": (np.zeros_like(noise), "silent"),
        "opposite.wav": (np.stack([noise, -noise], 1), "channels cancel each other out"),
        "short.wav": (noise[:192], "0.012 s is shorter"),
    }
    for name, (samples, reason) in clips.items():
        soundfile.write(tmp_path / name, samples, 16_000)
        words = ["--text", "Good morning.", "--reference", tmp_path / name, "--reference-text", "What is said."]
        assert f"reference 1 {tmp_path / name}: " in (told := refused(capsys, *words)) and reason in told
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "text": "Hi.", "reference": "silent.wav", "reference_text": "What is said."}\n')
    told = refused(capsys, rows, out=tmp_path / "out")
    assert "rows.jsonl:1: a: reference 1" in told and "1 reference(s) cannot be used" in told
    assert "rows.jsonl:1" in told


@pytest.mark.parametrize("text", ["", "   ", "..."])
def test_a_text_without_words_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"--text {text!r}: there is nothing to say in it" in refused(capsys, "--text", text)
    words = ["--text", "Hi.", "--reference", "me.wav", "--reference-text", text]
    assert f"--reference-text {text!r}: there is nothing to say in it" in refused(capsys, *words)

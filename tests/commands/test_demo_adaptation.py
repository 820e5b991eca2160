"""The data of the demonstration to listen to: what is measured was not trained on, and all of it can be read."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from speechtune.cli import main
from speechtune.commands.demo_adaptation import SPEAKER, demo_config, write_data
from speechtune.commands.validate import validate
from speechtune.config import DataConfig
from speechtune.data.prompts import read_seed_list
from speechtune.families.higgs_audio_v2.tiny import SPEAKING_BASE

CLIPS, HELD_OUT, SENTENCES = 30, 6, 136


def texts_of(manifest: Path) -> list[str]:
    rows: list[dict[str, Any]] = json.loads(manifest.read_text(encoding="utf-8"))
    return [part["text"] for row in rows for part in row["messages"][2]["content"] if part["type"] == "text"]


def test_what_is_measured_was_not_trained_on(tmp_path: Path) -> None:
    """Guards against a voice that is praised for what it knows by heart."""
    manifest = write_data(tmp_path)
    config = demo_config("higgs_audio_v2", manifest, tmp_path)
    trained, measured = set(texts_of(manifest)), set(texts_of(Path(str(config.data.eval))))
    prompts = read_seed_list(tmp_path / "prompts.lst")
    assert len(trained) == CLIPS - HELD_OUT and len(measured) == HELD_OUT and len(prompts) == HELD_OUT + SENTENCES
    assert not trained & measured and not trained & {prompt.text for prompt in prompts}
    recordings = [str(prompt.audio) for prompt in prompts if prompt.audio is not None]
    references = {str(clip.audio) for prompt in prompts for clip in prompt.references}
    assert len(recordings) == HELD_OUT and len(references) == CLIPS - HELD_OUT and not references & set(recordings)


def test_the_data_are_without_issues(tmp_path: Path) -> None:
    manifest = write_data(tmp_path)
    report = validate(manifest, DataConfig(), deep=True)
    assert not report.issues
    assert {json.loads(manifest.read_text(encoding="utf-8"))[0]["speaker"]} == {SPEAKER}


def test_the_base_knows_the_sound_of_every_word(tmp_path: Path) -> None:
    """Guards against words that the base can only spell: an adapter that learns from those forgets how to read."""
    manifest = write_data(tmp_path)
    prompts = [prompt.text for prompt in read_seed_list(tmp_path / "prompts.lst")]
    tokenizer = AutoTokenizer.from_pretrained(SPEAKING_BASE / "model")
    for text in [*texts_of(manifest), *prompts]:
        tokens = tokenizer.tokenize(text)
        assert tokens and not [token for token in tokens if token.isascii() and token.isalnum()], text


def test_a_recogniser_is_for_the_voice_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "csm", "--asr", "pocketsphinx", "--dir", str(tmp_path)]) == 2
    assert "only the demonstration `voice`" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

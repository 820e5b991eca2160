"""Refusals: impossible numbers, places that cannot be written, and messages that name what is really wrong."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers import DemoClip
from speechtune.cli import main
from speechtune.config import RunConfig
from speechtune.errors import CheckpointError, ConfigError, ManifestError
from speechtune.families import family_of
from speechtune.inference.load import model_config, open_adapter
from speechtune.training import prepare
from speechtune.training.run import run_training

GENERATE = ["generate", "--text", "hello", "--out", "a.wav", "--model", "nowhere/at-all"]
EVALUATE = ["evaluate", "data.jsonl", "--out", "scores", "--model", "nowhere/at-all"]


@pytest.mark.parametrize(
    "words",
    [
        *([*GENERATE, *flag] for flag in (("--temperature", "-1"), ("--temperature", "nan"), ("--top-k", "-5"))),
        *([*GENERATE, *flag] for flag in (("--top-p", "0"), ("--top-p", "1.5"), ("--seed", "-1"))),
        *([*GENERATE, *flag] for flag in (("--batch-size", "0"), ("--max-new-tokens", "-5"))),
        *([*GENERATE, *flag] for flag in (("--ras-win-len", "0"), ("--ras-win-max-num-repeat", "-1"))),
        *([*EVALUATE, *flag] for flag in (("--batch-size", "-2"), ("--max-new-tokens", "0"), ("--temperature", "inf"))),
        ["score", "a.wav", "--batch-size", "0"],
        ["score", "a.wav", "--max-new-tokens", "0"],
        ["validate", "data.jsonl", "--min-seconds", "-1"],
        ["validate", "data.jsonl", "--max-seconds", "0"],
        ["fit", "recipe.yaml", "--price-per-hour", "-3"],
        ["encode", "recipe.yaml", "--engine", "ray", "--shards", "0"],
        ["adapters", "extract", "checkpoint", "out", "--alpha", "-16"],
    ],
    ids=" ".join,
)
def test_impossible_numbers_are_refused_by_the_parser(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"argument {words[-2]}: '{words[-1]}' is not a" in error


def refused(words: Sequence[str | Path], capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a verb that must end with exit code 2 or more, before it loads anything."""
    assert main([str(word) for word in words]) in (2, 3, 4)
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", ["a.mp3", "a.flac", "a"])
def test_generate_refuses_files_that_it_would_fill_with_wav(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "generate writes wav" in refused(["generate", "--text", "hello", "--out", name], capsys)


def test_out_is_tested_before_the_model_is_looked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("here")
    folder = tmp_path / "folder.wav"
    folder.mkdir()
    below = "a file stands where a folder should be"
    assert below in refused(["generate", "--text", "hello", "--out", file / "a.wav"], capsys)
    assert "a file is written" in refused(["generate", "--text", "hello", "--out", folder], capsys)
    assert "generate writes wav" in refused(["generate", "prompts.jsonl", "--out", tmp_path / "a.wav"], capsys)
    assert "a folder is written" in refused(["generate", "prompts.jsonl", "--out", file], capsys)
    assert "a folder is written" in refused(["evaluate", "data.jsonl", "--out", file], capsys)
    assert below in refused(["score", "a.wav", "--out", file / "scores.jsonl"], capsys)


def test_options_may_stand_behind_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They were "unrecognized arguments" there: argparse finds a list of words in one place alone."""
    words = ["prepare", tmp_path, "--out", tmp_path / "out", "--asr", "pocketsphinx", "cut.min_second=3"]
    assert main([str(word) for word in words]) == 2
    assert "cut.min_second" in capsys.readouterr().err
    for unknown in (["validate", "data.jsonl", "a.b=1"], ["train", "recipe.yaml", "--fast", "a.b=1"]):
        with pytest.raises(SystemExit) as stopped:
            main(unknown)
        assert stopped.value.code == 2 and "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["serve", "studio"])
def test_a_port_that_is_taken_and_a_file_in_the_folders_place(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The port was told by the framework in its own words, after the model was loaded."""
    file = tmp_path / "file"
    file.write_text("here")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refused([verb, "--dir", tmp_path / "new", "--port", str(port)], capsys)
        assert line.startswith(f"speechtune: ConfigError: --port {port}: cannot be had on 127.0.0.1")
        assert "--dir" in refused([verb, "--dir", file, "--port", str(port)], capsys)


def test_tables_do_not_wrap_in_a_pipe(tmp_path: Path, demo_clips: list[DemoClip]) -> None:
    name = "a-recording-with-a-name-that-takes-more-than-eighty-columns-" + 60 * "x"
    rows = [{"audio_file": f"{name}.wav", "text": "hello", "speaker": "ann"}]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    command = [sys.executable, "-m", "speechtune", "validate", str(path)]
    # readline, which pytest imports, sets COLUMNS for every process below
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    printed = subprocess.run(command, capture_output=True, text=True, check=False, env=environment).stdout
    (line,) = [line for line in printed.splitlines() if "missing_file" in line]
    assert name in line
    assert "no such file" in line


def test_a_folder_without_a_model_says_where_one_lies(tmp_path: Path, tiny_base: Path) -> None:
    shutil.copytree(tiny_base / "model", tmp_path / "run" / "checkpoint-8")
    with pytest.raises(ConfigError, match=r"config\.json is missing; a model lies in checkpoint-8"):
        family_of(str(tmp_path / "run"))


def test_an_adapter_is_not_put_on_a_base_of_another_family(adapter_run: Path, phi4_base: Path) -> None:
    stored = open_adapter(adapter_run)
    with pytest.raises(ConfigError, match="base of phi4_multimodal, the adapter was trained on one of higgs_audio_v2"):
        model_config(str(phi4_base), None, stored)


@pytest.fixture
def nothing_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where clips are encoded before a refusal that could be known."""

    def encode(*_: Any, **__: Any) -> None:
        raise AssertionError("clips were encoded first")

    monkeypatch.setattr(prepare, "encode_samples", encode)


@pytest.mark.usefixtures("nothing_encoded")
def test_refusals_that_can_be_known_come_before_encoding(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    tiny_base: Path,
    demo_clips: list[DemoClip],
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
) -> None:
    data = {"train": write_chatml(tmp_path / "train.json", demo_clips[:2])}
    file = tmp_path / "file"
    file.write_text("here")
    with pytest.raises(ConfigError, match=r"checkpoint\.resume=/nope: no such folder"):
        run_training(make_config(data=data, checkpoint={"resume": "/nope"}))
    tracking = {"trackers": ("tensorboard",), "logging_dir": file}
    with pytest.raises(CheckpointError, match="a file stands where a folder should be"):
        run_training(make_config(data=data, tracking=tracking))
    no_tokenizer = tmp_path / "model"
    shutil.copytree(tiny_base / "model", no_tokenizer)
    (no_tokenizer / "tokenizer.json").unlink()
    model = {"path": str(no_tokenizer), "codec_path": str(tiny_base / "codec")}
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        run_training(make_config(data=data, model=model, lora={"enabled": False}))


@pytest.mark.usefixtures("nothing_encoded")
def test_pronunciation_names_what_it_lacks_before_encoding(
    tmp_path: Path, phi4_base: Path, phi4_rows: Path, demo_clips: list[DemoClip], write_chatml: Callable[..., Path]
) -> None:
    import phi4_cases

    base = tmp_path / "base"
    shutil.copytree(phi4_base, base)
    shutil.rmtree(base / "speech-lora")
    with pytest.raises(ConfigError, match=r"no folder .*speech-lora"):
        run_training(phi4_cases.run_config(tmp_path / "run", base, phi4_rows))
    chatml = write_chatml(tmp_path / "train.json", demo_clips[:2])
    with pytest.raises(ManifestError, match="2 of 2 samples carry no pronunciation labels"):
        run_training(phi4_cases.run_config(tmp_path / "run-2", phi4_base, chatml))


def test_the_cost_of_evaluation_is_told_beforehand(
    make_config: Callable[..., RunConfig],
    tmp_path: Path,
    demo_clips: list[DemoClip],
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    from speechtune.training.tracking import configure_logging

    configure_logging()
    data = {"train": write_chatml(tmp_path / "train.json", demo_clips[:2])}
    run_training(make_config(data=data, train={"max_steps": 3}, evaluate={"every_steps": 2, "prompts": 1}))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("evaluation:", "step 1/3"))]
    assert lines[0].startswith(
        "evaluation: 1 prompts are answered before the first step and in 2 rounds of the 3 steps"
    )
    assert "evaluate.prompts" in lines[0] and "evaluate.every_steps" in lines[0]
    assert "all 3 take about" in lines[1]
    assert lines[2].startswith("step 1/3")


def test_doctor_knows_a_missing_folder_from_a_hub_id(
    tmp_path: Path, make_config: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_config(model={"path": "models/of/mine", "codec_path": "somebody/codec"}).to_yaml())
    assert main(["doctor", str(recipe), "--json"]) == 2
    results = {row["check"]: row for row in json.loads(capsys.readouterr().out)}
    assert results["model files"]["verdict"] == "fail"
    assert results["model files"]["detail"] == "models/of/mine: no such folder"
    assert "is a hub id" in results["codec files"]["detail"]

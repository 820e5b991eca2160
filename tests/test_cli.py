"""The command line: quick to start, one message per error, the promised exit codes."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from speechtune.cli import build_parser, main
from speechtune.commands import print_json

HEAVY = ("torch", "transformers", "pydantic", "numpy", "rich")


def test_help_starts_without_heavy_modules() -> None:
    """Guards against seconds of imports before the help text: under 0.4 s of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import sys; from speechtune.cli import build_parser; build_parser(); "
    code += f"print([m for m in {HEAVY} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert output.strip() == "[]"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.4


def test_every_verb_has_help(capsys: pytest.CaptureFixture) -> None:
    parser = build_parser()
    verbs = "demo recipes validate encode train generate score evaluate report push merge adapters doctor lint"
    for verb in verbs.split():
        with pytest.raises(SystemExit) as stop:
            parser.parse_args([verb, "--help"])
        assert stop.value.code == 0
        assert verb in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "gone.yaml"], "gone.yaml: cannot read the recipe"),
        (["train", "RECIPE", "train.epoch=3"], "did you mean 'train.epochs'?"),
        (["train", "RECIPE", "data.eval=a.json", "data.validation_split=0.1"], "remove one"),
        (["generate", "--out", "a.wav"], "name a manifest, or one text with --text"),
        (["generate", "--text", "a", "--reference", "b.wav", "--out", "a.wav"], "belong together"),
        (["generate", "--text", "a", "--model", "nowhere/at-all", "--out", "a.wav"], "no model configuration there"),
        (["merge", "nowhere", "out"], "nowhere"),
        (["validate", "gone.json"], "gone.json"),
    ],
)
def test_bad_input_is_one_clear_error(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("family: higgs_audio_v2\nmodel: {path: nowhere}\n")
    assert main([str(recipe) if word == "RECIPE" else word for word in arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err + captured.out
    assert "Traceback" not in captured.err


def test_what_may_be_left_out_is_not_called_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit"])
    assert stopped.value.code == 2 and capsys.readouterr().err.rstrip().endswith("arguments are required: recipe")


def test_json_holds_what_utf8_cannot(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a traceback in place of the answer where a model's text ends in half of a surrogate pair."""
    print_json({"text": "väljund \ud83d", "path": Path("a/b")})
    printed = capsys.readouterr().out
    assert json.loads(printed) == {"text": "väljund \ud83d", "path": "a/b"} and "väljund" in printed

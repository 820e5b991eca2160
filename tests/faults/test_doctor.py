"""`speechtune doctor` and the check of model files: each issue is found before anything is loaded, with its cure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers import DemoClip
from speechtune.cli import main
from speechtune.commands.doctor import Result, examine, packages
from speechtune.config import RunConfig
from speechtune.errors import ConfigError
from speechtune.families import create_family
from speechtune.precision import plan_precision
from speechtune.storage.model_folder import inspect_folder

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 15524095\n"


@pytest.fixture
def recipe(
    tmp_path: Path,
    tiny_base: Path,
    make_config: Callable[..., RunConfig],
    write_chatml: Callable,
    demo_clips: list[DemoClip],
) -> RunConfig:
    """A valid recipe on a copy of the tiny base, which a test may damage."""
    shutil.copytree(tiny_base, tmp_path / "base")
    return make_config(
        model={"path": str(tmp_path / "base/model"), "codec_path": str(tmp_path / "base/codec")},
        data={"train": write_chatml(tmp_path / "train.json", demo_clips[:2])},
    )


def verdicts(config: RunConfig) -> dict[str, Result]:
    return {result.check: result for result in examine(config)}


def test_a_valid_recipe_passes_every_check(recipe: RunConfig) -> None:
    results = verdicts(recipe)
    assert [name for name, result in results.items() if result.verdict == "fail"] == []
    moved = results["training step"].detail
    assert "14 of 14 lora_B moved" in moved, moved  # two layers: q, k, v, o and three of the audio FFN each
    assert "differ by 0.0e+00" in results["save and reload"].detail
    assert results["merge"].verdict == "pass"


def test_command_line_tells_by_json_and_exit_code(
    recipe: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert main(["doctor", str(path), "--json"]) == 0
    assert {"check", "verdict", "detail", "cure"} == set(json.loads(capsys.readouterr().out)[0])
    assert main(["doctor", str(path), "lora.targets=nowhere"]) == 2


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("tokenizer.json", lambda path: path.write_text(LFS_POINTER), "Git LFS pointer"),
        ("tokenizer.json", lambda path: path.write_text("<!DOCTYPE html><html>404</html>"), "web page"),
        ("tokenizer.json", lambda path: path.write_text(path.read_text()[:-40]), "not valid JSON"),
        ("config.json", lambda path: path.write_bytes(b""), "0 bytes"),
        ("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1000]), "truncated or corrupt"),
        ("model.safetensors", lambda path: path.write_text(LFS_POINTER), "Git LFS pointer"),
    ],
)
def test_corrupt_files_are_named(recipe: RunConfig, name: str, damage: Callable[[Path], object], reason: str) -> None:
    """Guards against `expected value at line 1 column 1`: a pointer or a web page saved as tokenizer.json."""
    folder = Path(recipe.model.path)
    damage(folder / name)
    (issue,) = inspect_folder(folder)
    assert issue.source == name
    assert reason in issue.message
    assert verdicts_until_failure(recipe)["model files"].verdict == "fail"
    with pytest.raises(ConfigError, match=name):
        create_family(recipe).load(plan_precision("fp32"))


def verdicts_until_failure(config: RunConfig) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for result in examine(config):
        results[result.check] = result
        if result.verdict == "fail" and result.check == "model files":
            break
    return results


def test_missing_shard_is_named(tmp_path: Path) -> None:
    """Guards against a download that lost one of several weight files."""
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (issue,) = inspect_folder(tmp_path)
    assert issue.source == "model-00002-of-00002.safetensors"
    assert "missing" in issue.message


def test_invalid_data_fail_the_data_line(recipe: RunConfig, tmp_path: Path) -> None:
    manifest = tmp_path / "train.json"
    manifest.write_text(manifest.read_text().replace(".flac", ".gone"))
    results = verdicts(recipe)
    assert results["data"].verdict == "fail"
    assert "training step" not in results


def test_packages_that_are_missing_or_too_old_are_named() -> None:
    results = {r.check: r for r in packages(["torch>=99", "nowhere-at-all>=1", "peft>=0.1", "scipy>=99; extra == 'x'"])}
    assert {name: r.verdict for name, r in results.items()} == {
        "torch": "fail",
        "nowhere-at-all": "fail",
        "peft": "pass",
    }
    assert results["torch"].cure == "pip install 'torch>=99'" and "missing" in results["nowhere-at-all"].detail

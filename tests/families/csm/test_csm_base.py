"""The base model, the adapters it may carry, and options: what is wrong is refused, by name, before training."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from csm_cases import FP32, family_on, plain_model
from speechtune.cli import main
from speechtune.errors import AdapterError, ConfigError
from speechtune.families import build_config, family_of
from speechtune.precision import PrecisionPlan

BF16 = PrecisionPlan("bf16", torch.device("cpu"), torch.bfloat16, torch.bfloat16, False, "test")


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy of the base, to be changed."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def change_config(folder: Path, **values: Any) -> None:
    """Overwrite entries of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def drop_tensors(folder: Path, pattern: str) -> None:
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not re.search(pattern, name)}
    save_file(kept, file, metadata={"format": "pt"})


def test_a_sound_base_loads(base: Path) -> None:
    """The audio table stays one for two decoders; the codec is frozen; the family is found by the model type."""
    assert family_of(str(base)) == "csm"
    model: Any = family_on(base).load(FP32)
    assert model.backbone_model.embed_tokens.embed_audio_tokens.weight is model.depth_decoder.model.embed_tokens.weight
    assert not any(p.requires_grad for p in model.codec_model.parameters())
    assert model.lm_head.weight.requires_grad
    half: Any = family_on(base).load(BF16)
    assert {p.dtype for p in half.backbone_model.parameters()} == {torch.bfloat16}


ISSUES: dict[str, Callable[[Path], object]] = {
    "missing weights": lambda path: drop_tensors(path, r"layers\.1\.mlp\."),
    "missing heads": lambda path: drop_tensors(path, r"codebooks_head"),
    "no weights": lambda path: (path / "model.safetensors").unlink(),
    "truncated file": lambda path: (path / "model.safetensors").write_bytes(
        (path / "model.safetensors").read_bytes()[:100_000]
    ),
    "other shapes": lambda path: change_config(path, intermediate_size=96),
    "other family": lambda path: change_config(path, model_type="llama"),
    "no model type": lambda path: change_config(path, model_type=None),
    "other ids": lambda path: change_config(path, audio_token_id=5),
    "no tokenizer": lambda path: (path / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("issue", ISSUES)
def test_broken_base_is_refused(folder: Path, issue: str) -> None:
    """transformers fills missing weights with random ones and only reports it: such a base must not be trained."""
    ISSUES[issue](folder)
    with pytest.raises(ConfigError, match=re.escape(f"model.path={folder}")):
        family_on(folder).load(FP32)


def test_an_untied_table_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Early releases of transformers 5 lost the tie: one of the two tables was random then."""
    loaded: Any = plain_model(folder)
    table = loaded.depth_decoder.model.embed_tokens
    table.weight = torch.nn.Parameter(table.weight.detach().clone())
    info = {"missing_keys": set(), "mismatched_keys": set()}
    monkeypatch.setattr("speechtune.families.csm.family.load_pretrained", lambda *_, **__: (loaded, info))
    with pytest.raises(ConfigError, match="came apart"):
        family_on(folder).load(FP32)


def test_code_in_a_folder_is_not_offered_to_be_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' Auto classes ask at the terminal whether to run a folder's code, and a `y` runs it."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    change_config(folder, model_type="other", auto_map={"AutoConfig": "code.Config"})
    witness = folder / "was-run"
    (folder / "code.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    with pytest.raises(ConfigError, match="model_type is 'other'"):
        _ = family_on(folder).model_config
    assert asked == [] and not witness.exists()


@pytest.mark.parametrize(
    ("lora", "error", "reason"),
    [
        ({"targets": r".*\.(q|k|v|o)_proj"}, ConfigError, r"matches 8 layers of the codec \(first codec_model\."),
        ({"targets": "q_proj"}, AdapterError, r"matches none of .*layers\.0\."),
        ({"trainable_tokens": ["<x>"]}, ConfigError, "has no control tokens"),
    ],
)
def test_targets_that_cannot_be_trained_are_refused(base: Path, lora: Any, error: type[Exception], reason: str) -> None:
    """Before anything is encoded; a list of names, as many scripts have it, hits the codec too."""
    family = family_on(base, lora=lora)
    with pytest.raises(error, match=reason):
        family.check_base()
        family.token_indices(family.config.lora.trainable_tokens)


@pytest.mark.parametrize(
    ("section", "values", "reason"),
    [
        ("lora", {"modules_to_save": ["embed_tokens"]}, "names 'embed_tokens': backbone and depth decoder share"),
        ("lora", {"modules_to_save": ["depth_decoder.model.embed_tokens"]}, "share one table"),
        ("data", {"depth_share": 0}, "data.depth_share: .*greater than 0"),
        ("data", {"depth_share": 1.5}, "data.depth_share: .*less than or equal to 1"),
        ("data", {"tasks": {}}, "data.tasks: no such option"),
        ("model", {"codec": "x"}, "model.codec: no such option; did you mean 'model.codec_path'"),
    ],
)
def test_options_are_checked(section: str, values: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_config(
            {"family": "csm", "model": {"path": "x"}}
            | {section: {"path": "x"} | values if section == "model" else values},
            "test",
        )


def test_an_issue_ends_the_command_with_2(folder: Path, manifest: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One message on standard error."""
    drop_tensors(folder, "codebooks_head")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"family: csm\noutput_dir: {folder / 'run'}\nmodel: {{path: {folder}}}\n"
        f"data: {{train: {manifest}, cache_dir: {folder / 'cache'}}}\ntracking: {{trackers: []}}\n"
    )
    assert main(["train", str(recipe)]) == 2
    assert "missing ['depth_decoder.codebooks_head.weight']" in capsys.readouterr().err

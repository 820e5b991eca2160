"""Adapters of plain PEFT for Phi-4-multimodal: nothing tells what their base's speech LoRA was, so it is asked."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Phi4MultimodalForCausalLM

import speechtune
from phi4_cases import native_logits
from speechtune.cli import main
from speechtune.errors import AdapterError, ConfigError
from speechtune.export.merge import merge
from speechtune.export.verify import verify_adapter
from speechtune.families.phi4_multimodal.family import LANGUAGE_MODEL
from speechtune.inference.evaluate_pronunciation import evaluate_pronunciation
from speechtune.inference.load import load_model, model_config, open_adapter
from speechtune.inference.score import assessor
from speechtune.lora.base_identity import RECIPE_NAME
from speechtune.training.run import Outcome
from speechtune.types import Sample

ASKS = r"has no base_recipe.json.*--speech-lora.*continue if.*merge if.*stack if.*drop if"
Foreign = dict[str, tuple[Path, torch.Tensor]]


def plain_base(folder: Path) -> Phi4MultimodalForCausalLM:
    return Phi4MultimodalForCausalLM.from_pretrained(folder).eval()


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())


def train_a_little(model: Any) -> None:
    """Three steps of AdamW on made-up text, as a script of plain PEFT takes them."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.arange(40, 72)[None]
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, phi4_base: Path, phi4_samples: list[Sample]) -> Foreign:
    """By what their base was: the folder that plain PEFT wrote, and the logits of plain PEFT's model."""
    speech, root = str(phi4_base / "speech-lora"), tmp_path_factory.mktemp("foreign")
    new = LoraConfig(r=8, lora_alpha=16, target_modules=LANGUAGE_MODEL, init_lora_weights=False)

    def hearing() -> Any:
        return PeftModel.from_pretrained(plain_base(phi4_base), speech, adapter_name="speech")

    stacked = hearing()
    stacked.add_adapter("default", new)
    stacked.base_model.set_adapter(["speech", "default"])
    for name, parameter in stacked.named_parameters():
        parameter.requires_grad_(".default." in name)
    same_shape = LoraConfig(r=4, lora_alpha=8, target_modules=LANGUAGE_MODEL, init_lora_weights=False)
    models = {
        "continue": PeftModel.from_pretrained(plain_base(phi4_base), speech, is_trainable=True),
        "merge": get_peft_model(hearing().merge_and_unload(), new),
        "merge, of the same shape": get_peft_model(hearing().merge_and_unload(), same_shape),
        "stack": stacked,
        "drop": get_peft_model(plain_base(phi4_base), new),
    }
    result: Foreign = {}
    for name, model in models.items():
        torch.manual_seed(len(name))
        train_a_little(model.train())
        model.save_pretrained(str(root / name), selected_adapters=["default"])
        result[name] = root / name, native_logits(model.eval(), phi4_base, phi4_samples[0])
        assert not (root / name / RECIPE_NAME).exists()
    return result


def merged_logits(adapter: Path, mode: str, base: Path, sample: Sample, out: Path) -> torch.Tensor:
    stored = open_adapter(adapter)
    merge(model_config(str(base), {"speech_lora": mode}, stored), stored, out)
    return native_logits(plain_base(out), base, sample)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("continue", "continue", ["merge", "stack"]),
        ("merge", "merge", ["continue", "drop"]),
        ("merge, of the same shape", "merge", ["continue"]),
        ("stack", "stack", ["drop"]),
        ("drop", "drop", ["merge"]),
    ],
)
def test_merged_as_said_a_foreign_adapter_answers_as_under_plain_peft(
    name: str,
    right: str,
    wrong: list[str],
    foreign: Foreign,
    phi4_base: Path,
    phi4_samples: list[Sample],
    tmp_path: Path,
) -> None:
    """Guards against the speech LoRA added once more to an adapter that is it: a success reported, 0.70 off of 0.70."""
    adapter, wanted = foreign[name]
    assert distance(merged_logits(adapter, right, phi4_base, phi4_samples[0], tmp_path / "right"), wanted) < 1e-5
    for mode in wrong:
        assert distance(merged_logits(adapter, mode, phi4_base, phi4_samples[0], tmp_path / mode), wanted) > 1e-2
    stored = open_adapter(adapter)
    _, model = load_model(model_config(str(phi4_base), {"speech_lora": right}, stored), stored)
    assert distance(native_logits(model, phi4_base, phi4_samples[0]), wanted) < 1e-5
    info = json.loads((tmp_path / "right" / "merge_info.json").read_text())
    assert info["base_prepared"]["speech_lora"]["mode"] == right


@pytest.mark.parametrize("name", ["continue", "merge", "merge, of the same shape", "stack", "drop"])
def test_nothing_is_guessed_of_a_foreign_adapter(
    name: str, foreign: Foreign, phi4_base: Path, phi4_rows: Path, tmp_path: Path
) -> None:
    adapter, _ = foreign[name]
    stored = open_adapter(adapter)
    likeness = {
        "continue": r"equal in names and shapes to those of the speech LoRA, and near them \(relative distance 0\.",
        "merge, of the same shape": r"equal in names and shapes .* far from them \(relative distance [1-9].*another",
    }.get(name, "16 tensors are not equal in names and shapes to the 16 of the speech LoRA, so it is not that one")
    uses: dict[str, Callable[[], object]] = {
        "merge": lambda: merge(model_config(None, None, stored), stored, tmp_path / "merged"),
        "verify": lambda: verify_adapter(adapter, str(phi4_base)),
        "score": lambda: assessor(None, stored),
        "evaluate": lambda: evaluate_pronunciation(phi4_rows, adapter=adapter, out=tmp_path / "evaluated"),
    }
    for use in uses.values():
        with pytest.raises(ConfigError, match=ASKS) as caught:
            use()
        assert caught.match(likeness) and "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists()
    assert verify_adapter(adapter).valid  # names and shapes alone need no answer


def test_the_released_speech_lora_itself_is_told_by_distance_zero(phi4_base: Path) -> None:
    with pytest.raises(ConfigError, match=r"near them \(relative distance 0\): it looks like that one"):
        assessor(str(phi4_base), open_adapter(phi4_base / "speech-lora"))


def test_the_flag_is_there_where_the_message_names_it(
    foreign: Foreign, phi4_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    adapter, base = str(foreign["continue"][0]), str(phi4_base)
    assert main(["merge", adapter, str(tmp_path / "merged")]) == 2
    assert "--speech-lora" in capfd.readouterr().err
    assert main(["merge", adapter, str(tmp_path / "merged"), "--speech-lora", "continue"]) == 0
    assert main(["adapters", "verify", adapter, "--base", base]) == 2
    assert main(["adapters", "verify", adapter, "--base", base, "--speech-lora", "continue", "--json"]) == 0
    assert main(["adapters", "verify", adapter, "--speech-lora", "continue"]) == 2
    assert "--speech-lora: says how a base is prepared; name that base with --base" in capfd.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["merge", adapter, str(tmp_path / "other"), "--speech-lora", "guess"])
    assert caught.value.code == 2


def test_a_model_of_another_family_knows_no_speech_lora(adapter_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="speech_lora: no such option"):
        model_config(None, {"speech_lora": "merge"}, open_adapter(adapter_run))


def test_a_recipe_is_not_overruled(phi4_run: Outcome) -> None:
    """With base_recipe.json nothing is asked, and another choice than the recipe's is an error."""
    stored = open_adapter(phi4_run.job.config.output_dir)
    assessor(None, stored)
    with pytest.raises(AdapterError, match="trained on a base prepared as"):
        assessor(None, stored, {"speech_lora": "drop"})


def test_a_base_with_the_speech_lora_in_its_weights_leaves_nothing_open(
    phi4_run: Outcome, phi4_base: Path, phi4_samples: list[Sample], tmp_path: Path
) -> None:
    """A merged model of ours says so in its folder: an adapter that plain PEFT puts on it needs no answer."""
    stored = open_adapter(phi4_run.job.config.output_dir)
    merge(model_config(None, None, stored), stored, tmp_path / "merged")
    config = LoraConfig(r=4, target_modules=LANGUAGE_MODEL, init_lora_weights=False)
    plain = get_peft_model(plain_base(tmp_path / "merged"), config)
    plain.save_pretrained(str(tmp_path / "adapter"))
    foreign = open_adapter(tmp_path / "adapter")
    _, _, model = assessor(None, foreign)
    wanted = native_logits(plain.eval(), phi4_base, phi4_samples[0])
    assert distance(native_logits(model, phi4_base, phi4_samples[0]), wanted) < 1e-5


def test_without_the_speech_lora_at_hand_one_trained_further_can_still_be_used(
    foreign: Foreign, phi4_base: Path, phi4_samples: list[Sample], tmp_path: Path
) -> None:
    """It holds all of it; only the comparison is not to be had."""
    base = shutil.copytree(phi4_base, tmp_path / "base", ignore=shutil.ignore_patterns("speech-lora"))
    adapter, wanted = foreign["continue"]
    with pytest.raises(ConfigError, match="cannot be compared with the speech LoRA's"):
        assessor(str(base), open_adapter(adapter))
    assert distance(merged_logits(adapter, "continue", base, phi4_samples[0], tmp_path / "merged"), wanted) < 1e-5
    with pytest.raises(ConfigError, match="cannot process audio without its speech LoRA"):
        merged_logits(adapter, "merge", base, phi4_samples[0], tmp_path / "wrong")


def test_only_the_family_knows_of_its_speech_lora() -> None:
    """Guards against a special case outside the seam: `Family.unclear_base` asks, `model_options` answers."""
    source = Path(speechtune.__file__).parent
    files = [
        file
        for room in ("export", "commands", "lora", "inference", "training")
        for file in (source / room).glob("*.py")
    ]
    assert len(files) > 30
    assert [file for file in files if re.search("speech.?lora", file.read_text(), re.IGNORECASE)] == []

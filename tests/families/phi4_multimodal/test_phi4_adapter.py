"""Phi-4-multimodal adapters: learnt by heart, reloaded, merged; and what becomes of the speech LoRA, by logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import Phi4MultimodalForCausalLM

from phi4_cases import FP32, family_on, native_answer, native_logits, run_config
from speechtune.config import LoraSettings
from speechtune.errors import AdapterError, ConfigError
from speechtune.export.merge import merge
from speechtune.families.phi4_multimodal.family import LANGUAGE_MODEL
from speechtune.inference.load import load_model, model_config, open_adapter
from speechtune.lora.apply import apply_lora
from speechtune.lora.base_identity import RECIPE_NAME, read_recipe
from speechtune.tasks.pronunciation.targets import render_answer, target_of
from speechtune.training.run import Outcome, run_training
from speechtune.types import Sample

SHORT = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0}
CONTINUED = {"rank": 4, "alpha": 8, "targets": "language"}
MODES: dict[str, dict[str, Any]] = {
    "merge": {"rank": 8, "alpha": 16, "targets": "language"},
    "continue": CONTINUED,
    "stack": {"rank": 8, "alpha": 16, "targets": "language"},
    "drop": {"rank": 8, "alpha": 16, "targets": "language"},
}


def plain_base(folder: Path) -> Phi4MultimodalForCausalLM:
    """The base as plain transformers loads it, without its speech LoRA."""
    return Phi4MultimodalForCausalLM.from_pretrained(folder).eval()


def add_by_hand(model: torch.nn.Module, adapter: Path) -> torch.nn.Module:
    """Add alpha / r * B @ A of a saved adapter to the weights, with neither PEFT nor our own code."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, a in tensors.items():
            if name.endswith("lora_A.weight"):
                b = tensors[name.replace("lora_A", "lora_B")]
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                model.get_submodule(module).weight += config["lora_alpha"] / config["r"] * b @ a
    return model


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())


def test_plain_transformers_gives_all_sixteen_answers_word_for_word(
    phi4_run: Outcome, phi4_base: Path, phi4_samples: list[Sample]
) -> None:
    """Eight recordings, both tasks, learnt with LoRA; PEFT's and transformers' own classes answer."""
    base = add_by_hand(plain_base(phi4_base), phi4_base / "speech-lora")
    adapter = phi4_run.job.config.output_dir / "lora_adapters"
    model = PeftModel.from_pretrained(base, str(adapter)).eval()
    found = [native_answer(model, phi4_base, sample) for sample in phi4_samples]
    assert found == [render_answer(target_of(sample)) + "<|end|>" for sample in phi4_samples]
    assert len(found) == 16
    assert phi4_run.proof.lora_b_moved == phi4_run.proof.lora_b_total > 0 and phi4_run.proof.base_unchanged


def test_saved_reloaded_and_merged_answer_alike(phi4_run: Outcome, phi4_base: Path, tmp_path: Path) -> None:
    adapter = phi4_run.job.config.output_dir / "lora_adapters"
    trained, _ = phi4_run.job.family.probe(phi4_run.job.model.eval())
    config = model_config(None, None, open_adapter(adapter))
    family, reloaded = load_model(config, open_adapter(adapter))
    assert distance(family.probe(reloaded)[0], trained) < 1e-5
    report = merge(config, open_adapter(adapter), tmp_path / "merged")
    assert report.greedy_equal and report.adapter_effect > 1
    plain = plain_base(tmp_path / "merged")
    assert distance(family.probe(plain)[0], trained) < 1e-5
    again = family_on(tmp_path / "merged")  # its marker says that the speech LoRA is in its weights
    assert distance(again.probe(again.load(FP32).eval())[0], trained) < 1e-5
    with pytest.raises(ConfigError, match="written by speechtune"):
        family_on(tmp_path / "merged", model={"speech_lora": "merge"}).load(FP32)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, phi4_base: Path, phi4_rows: Path) -> dict[str, Outcome]:
    """A short run in each mode."""
    return {
        mode: run_training(
            run_config(
                tmp_path_factory.mktemp(mode),
                phi4_base,
                phi4_rows,
                model={"speech_lora": mode},
                lora={**settings, "dropout": 0.0},
                train=SHORT,
            )
        )
        for mode, settings in MODES.items()
    }


@pytest.mark.parametrize("mode", MODES)
def test_what_each_mode_makes_of_the_speech_lora(
    mode: str, runs: dict[str, Outcome], phi4_base: Path, phi4_samples: list[Sample]
) -> None:
    """The trained model's logits are those of the plain base with both differences added to its weights by hand."""
    run, sample = runs[mode], phi4_samples[0]
    adapter = run.job.config.output_dir / "lora_adapters"
    by_hand = plain_base(phi4_base)
    if mode in ("merge", "stack"):
        add_by_hand(by_hand, phi4_base / "speech-lora")
    add_by_hand(by_hand, adapter)
    wanted = native_logits(by_hand, phi4_base, sample)
    assert distance(native_logits(run.job.model.eval(), phi4_base, sample), wanted) < 1e-5
    _, loaded = load_model(model_config(None, None, open_adapter(adapter)), open_adapter(adapter))
    assert distance(native_logits(loaded, phi4_base, sample), wanted) < 1e-5
    without = native_logits(plain_base(phi4_base), phi4_base, sample)
    assert distance(wanted, without) > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_what_a_mode_starts_from(mode: str, phi4_base: Path, phi4_samples: list[Sample]) -> None:
    """Before the first step the logits of all modes but `drop` are those of the base with its speech LoRA."""
    family = family_on(phi4_base, model={"speech_lora": mode}, lora=MODES[mode])
    model = apply_lora(family.load(FP32), family, family.config.lora, seed=0).eval()
    plain = native_logits(plain_base(phi4_base), phi4_base, phi4_samples[0])
    hearing = native_logits(add_by_hand(plain_base(phi4_base), phi4_base / "speech-lora"), phi4_base, phi4_samples[0])
    assert distance(hearing, plain) > 1e-2
    wanted = plain if mode == "drop" else hearing
    assert distance(native_logits(model, phi4_base, phi4_samples[0]), wanted) < 1e-5
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".default." in name for name in trained)


def test_the_naive_way_loses_the_speech_lora(phi4_base: Path, phi4_samples: list[Sample]) -> None:
    """What `merge`, `continue` and `stack` guard against: PEFT switches the loaded adapter off for the new one."""
    base = plain_base(phi4_base)
    without = native_logits(base, phi4_base, phi4_samples[0])
    carried = PeftModel.from_pretrained(base, str(phi4_base / "speech-lora"), adapter_name="speech").eval()
    assert distance(native_logits(carried, phi4_base, phi4_samples[0]), without) > 1e-2
    carried.add_adapter("default", LoraConfig(r=8, target_modules=LANGUAGE_MODEL))
    carried.set_adapter("default")
    assert distance(native_logits(carried, phi4_base, phi4_samples[0]), without) < 1e-6
    inside = get_peft_model(carried.get_base_model(), LoraConfig(r=8, target_modules=LANGUAGE_MODEL)).eval()
    assert distance(native_logits(inside, phi4_base, phi4_samples[0]), without) < 1e-6


def test_a_released_speech_lora_names_other_modules_than_the_native_ones(phi4_base: Path, tmp_path: Path) -> None:
    """Its target regex is the remote-code model's; PEFT alone finds no module, here its tensors tell."""
    base = shutil.copytree(phi4_base, tmp_path / "base")
    file = base / "speech-lora" / "adapter_config.json"
    config = json.loads(file.read_text())
    config["target_modules"] = r"(layers.*((self_attn\.(qkv_proj|o_proj))|(mlp\.(gate_up|down)_proj)))"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"[Tt]arget modules .* not found"):
        PeftModel.from_pretrained(plain_base(base), str(base / "speech-lora"))
    family, same = family_on(base), family_on(phi4_base)
    assert distance(family.probe(family.load(FP32).eval())[0], same.probe(same.load(FP32).eval())[0]) < 1e-6


def test_a_base_without_speech_lora_is_refused_until_told(phi4_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(phi4_base, tmp_path / "base", ignore=shutil.ignore_patterns("speech-lora"))
    with pytest.raises(ConfigError, match="cannot process audio without its speech LoRA"):
        family_on(base).load(FP32)
    family_on(base, model={"speech_lora": "drop"}).load(FP32)
    family_on(base, model={"speech_lora_path": str(phi4_base / "speech-lora")}).load(FP32)


def test_going_on_from_an_adapter_of_another_shape_is_refused(phi4_base: Path) -> None:
    family = family_on(phi4_base, model={"speech_lora": "continue"})
    with pytest.raises(AdapterError, match=r"has \{'rank': 4.*this run's lora section says \{'rank': 16"):
        apply_lora(family.load(FP32), family, LoraSettings(), seed=0)
    with pytest.raises(AdapterError, match="other tensors than this run's"):
        apply_lora(family.load(FP32), family, LoraSettings(**{**CONTINUED, "targets": "language+audio"}), seed=0)


@pytest.mark.parametrize("damage", ["another base", "speech LoRA dropped", "another speech LoRA", "recipe torn"])
def test_an_adapter_is_refused_on_another_base_than_its_own(
    damage: str, runs: dict[str, Outcome], phi4_base: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(runs["merge"].job.config.output_dir / "lora_adapters", tmp_path / "adapter")
    config = model_config(None, None, open_adapter(adapter))
    reason = "prepared as"
    if damage == "another base":
        base = shutil.copytree(phi4_base, tmp_path / "base")
        model = plain_base(base)
        model.model.layers[1].mlp.down_proj.weight.data.mul_(1.2)
        model.save_pretrained(base)
        config, reason = model_config(str(base), None, open_adapter(adapter)), "answers a fixed input otherwise"
    elif damage == "speech LoRA dropped":
        config = config.model_copy(update={"model": config.model.model_copy(update={"speech_lora": "drop"})})
    elif damage == "another speech LoRA":
        base = shutil.copytree(phi4_base, tmp_path / "base")
        shutil.rmtree(base / "speech-lora")
        shutil.copytree(runs["continue"].job.config.output_dir / "lora_adapters", base / "speech-lora")
        config = model_config(str(base), None, open_adapter(adapter))
    else:
        (adapter / RECIPE_NAME).write_text('{"family": ')
        with pytest.raises(AdapterError, match="not readable as the recipe"):
            model_config(None, None, open_adapter(adapter))
        return
    with pytest.raises(AdapterError, match=reason):
        load_model(config, open_adapter(adapter))
    with pytest.raises(AdapterError, match=reason):
        merge(config, open_adapter(adapter), tmp_path / "merged")


def test_checkpoints_carry_the_recipe_too(runs: dict[str, Outcome]) -> None:
    for mode, run in runs.items():
        recipe = read_recipe(run.job.config.output_dir / "checkpoint-3")
        assert recipe and recipe.prepared["speech_lora"]["mode"] == mode
        assert (recipe.prepared["speech_lora"]["sha256"] is None) == (mode == "drop")


@pytest.mark.parametrize(
    "lora",
    [
        {"targets": "language", "trainable_tokens": ["<|APA|>", "<|MDD|>"]},
        {"targets": "language", "modules_to_save": ["audio_embed"]},
        {"targets": "language", "dora": True},
    ],
    ids=["control tokens", "audio encoder", "DoRA"],
)
def test_other_things_trained_beside_lora_survive_saving_and_merging(
    lora: dict[str, Any], phi4_base: Path, phi4_rows: Path, tmp_path: Path
) -> None:
    """Guards against parts of the training that are lost on save: embeddings of tokens, the audio encoder."""
    config = run_config(tmp_path, phi4_base, phi4_rows, lora={"rank": 4, **lora}, train=SHORT)
    outcome = run_training(config)
    adapter = config.output_dir / "lora_adapters"
    trained, _ = outcome.job.family.probe(outcome.job.model.eval())
    moved = [n for n, p in outcome.job.model.named_parameters() if p.requires_grad and "lora_" not in n]
    assert bool(moved) == (not lora.get("dora"))
    found = model_config(None, None, open_adapter(adapter))
    assert list(found.lora.trainable_tokens) == lora.get("trainable_tokens", [])
    family, reloaded = load_model(found, open_adapter(adapter))
    assert distance(family.probe(reloaded)[0], trained) < 1e-5
    merge(found, open_adapter(adapter), tmp_path / "merged")
    plain = plain_base(tmp_path / "merged")
    assert distance(family.probe(plain)[0], trained) < 1e-4


def test_all_linear_layers_include_some_that_speech_never_reaches(
    phi4_base: Path, phi4_rows: Path, tmp_path: Path
) -> None:
    """PEFT's "all-linear" trains nothing in the vision tower; the guard says so at the first step."""
    from speechtune.errors import TrainingError

    config = run_config(tmp_path, phi4_base, phi4_rows, lora={"rank": 4, "targets": "all-linear"}, train=SHORT)
    with pytest.raises(TrainingError, match=r"no gradient reached \d+ lora_B .*image_embed"):
        run_training(config)

"""Adapters as plain PEFT and other scripts leave them: embeddings, biases, odd names, several in a folder."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Phi4MultimodalForCausalLM

from adapter_helpers import copy_adapter, edit_config, plain_logits, read_weights, write_weights
from adapter_helpers import plain_base as plain_higgs
from phi4_cases import native_logits
from speechtune.errors import AdapterError
from speechtune.export.convert import convert
from speechtune.export.extract import extract
from speechtune.export.merge import merge
from speechtune.export.verify import verify_adapter
from speechtune.inference.load import load_model, model_config, open_adapter
from speechtune.lora.files import value_issues
from speechtune.types import Sample

DROP = {"speech_lora": "drop"}
TARGETS: dict[str, dict[str, Any]] = {
    "embed_tokens": {"target_modules": ["qkv_proj", "embed_tokens"]},
    "lm_head": {"target_modules": ["qkv_proj", "lm_head"]},
    "both": {"target_modules": ["qkv_proj", "embed_tokens", "lm_head"]},
    "by a regex": {"target_modules": r".*(layers\.\d+\.self_attn\.qkv_proj|embed_tokens)"},
    "embeddings only carried along": {"target_modules": ["qkv_proj"], "save_embedding_layers": True},
}


def plain_base(folder: Path) -> Phi4MultimodalForCausalLM:
    return Phi4MultimodalForCausalLM.from_pretrained(folder).eval()


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())


def plain_adapter(base: Any, folder: Path, save_embedding_layers: Any = "auto", **lora: Any) -> PeftModel:
    """An adapter of plain PEFT with weights that are not zero, and the model it is on."""
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **lora))
    for name, parameter in model.named_parameters():
        if "lora_embedding_A" in name:
            parameter.data.normal_(std=0.02)
    model.save_pretrained(str(folder), save_embedding_layers=save_embedding_layers)
    return model.eval()


@pytest.mark.parametrize("case", TARGETS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "own head"])
def test_embeddings_as_targets_are_loaded_verified_and_merged(
    case: str, tied: bool, phi4_base: Path, phi4_samples: list[Sample], tmp_path: Path
) -> None:
    """PEFT puts the base's embeddings beside such an adapter: they were refused as left over."""
    base = phi4_base
    if not tied:
        base = tmp_path / "untied"
        model = plain_base(phi4_base)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.1)
        model.config.tie_word_embeddings = False
        shutil.copytree(phi4_base, base)
        model.save_pretrained(base)
    plain = plain_adapter(plain_base(base), tmp_path / "adapter", **TARGETS[case])
    wanted = native_logits(plain, phi4_base, phi4_samples[0])
    assert any("embed_tokens" in name or "lm_head" in name for name in read_weights(tmp_path / "adapter"))
    report = verify_adapter(tmp_path / "adapter", str(base), model_options=DROP)
    assert report.valid, report.issues
    assert verify_adapter(tmp_path / "adapter").valid
    stored = open_adapter(tmp_path / "adapter")
    config = model_config(str(base), DROP, stored)
    assert distance(native_logits(load_model(config, stored)[1], phi4_base, phi4_samples[0]), wanted) < 1e-5
    merge(config, stored, tmp_path / "merged")
    assert distance(native_logits(plain_base(tmp_path / "merged"), phi4_base, phi4_samples[0]), wanted) < 1e-5


def test_changed_embeddings_beside_an_adapter_count(
    phi4_base: Path, phi4_samples: list[Sample], tmp_path: Path
) -> None:
    """With save_embedding_layers=True the stored embeddings take the place of the base's, as in PEFT."""
    changed = plain_base(phi4_base)
    changed.get_input_embeddings().weight.data.mul_(1.5)
    plain = plain_adapter(changed, tmp_path / "adapter", True, target_modules=["qkv_proj"])
    wanted = native_logits(plain, phi4_base, phi4_samples[0])
    stored = open_adapter(tmp_path / "adapter")
    config = model_config(str(phi4_base), DROP, stored)
    merge(config, stored, tmp_path / "merged")
    assert distance(native_logits(plain_base(tmp_path / "merged"), phi4_base, phi4_samples[0]), wanted) < 1e-5


@pytest.mark.parametrize("targets", [["qkv_proj"], ["qkv_proj", "embed_tokens"], ["qkv_proj", "lm_head"]], ids=str)
def test_a_resized_vocabulary_is_named(targets: list[str], phi4_base: Path, tmp_path: Path) -> None:
    base = plain_base(phi4_base)
    size = base.config.vocab_size
    base.resize_token_embeddings(size + 8)
    plain_adapter(base, tmp_path / "adapter", True, target_modules=targets)
    named = f"a vocabulary of {size + 8} tokens, the base has {size}.*resize_token_embeddings"
    report = verify_adapter(tmp_path / "adapter")
    assert not report.valid and re.search(named, "; ".join(report.issues)), report.issues
    stored = open_adapter(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=named):
        load_model(model_config(None, DROP, stored), stored)
    with pytest.raises(AdapterError, match=named):
        merge(model_config(None, DROP, stored), stored, tmp_path / "merged")
    shutil.copytree(phi4_base, tmp_path / "resized")
    base.unload() if isinstance(base, PeftModel) else None
    resized = plain_base(phi4_base)
    resized.resize_token_embeddings(size + 8)
    resized.save_pretrained(tmp_path / "resized")
    load_model(model_config(str(tmp_path / "resized"), DROP, stored), stored)


def test_an_untrained_embedding_is_told_from_a_trained_one() -> None:
    """In an embedding's pair A starts at zero and B is random: the other way round than in every other layer."""
    key = "base_model.model.model.embed_tokens.lora_embedding_"
    zero, some = torch.zeros(2, 5), torch.ones(5, 2)
    assert value_issues({f"{key}A": zero, f"{key}B": some}) == [
        "every lora_B is zero (1): this adapter was never trained"
    ]
    assert value_issues({f"{key}A": torch.ones(2, 5), f"{key}B": some}) == []
    assert "lora_A hold only zeros" in value_issues({f"{key}A": torch.ones(2, 5), f"{key}B": some * 0})[0]


def test_lora_bias_merges_where_the_base_has_biases(
    phi4_base: Path, phi4_samples: list[Sample], tmp_path: Path
) -> None:
    audio = r".*audio_embed\.encoder\.encoders\.\d+\.self_attn\.[qkvo]_proj"
    plain = plain_adapter(plain_base(phi4_base), tmp_path / "adapter", target_modules=audio, lora_bias=True)
    assert any(name.endswith("lora_B.bias") for name in read_weights(tmp_path / "adapter"))
    wanted = native_logits(plain, phi4_base, phi4_samples[0])
    stored = open_adapter(tmp_path / "adapter")
    merge(model_config(str(phi4_base), DROP, stored), stored, tmp_path / "merged")
    assert distance(native_logits(plain_base(tmp_path / "merged"), phi4_base, phi4_samples[0]), wanted) < 1e-5


@pytest.mark.filterwarnings("ignore:.*lora_bias")
def test_lora_bias_where_the_base_has_none_is_refused_in_one_sentence(
    phi4_base: Path, phi4_samples: list[Sample], tmp_path: Path
) -> None:
    """It was PEFT's RuntimeError, a traceback; loading such an adapter is sound."""
    plain = plain_adapter(plain_base(phi4_base), tmp_path / "adapter", target_modules=["qkv_proj"], lora_bias=True)
    stored = open_adapter(tmp_path / "adapter")
    config = model_config(str(phi4_base), DROP, stored)
    with pytest.raises(AdapterError, match=r"cannot merge.*used unmerged.*the base layer has no bias") as caught:
        merge(config, stored, tmp_path / "merged")
    assert "\n" not in str(caught.value) and not (tmp_path / "merged").exists()
    wanted = native_logits(plain, phi4_base, phi4_samples[0])
    assert distance(native_logits(load_model(config, stored)[1], phi4_base, phi4_samples[0]), wanted) < 1e-5


# -- names -------------------------------------------------------------------------------------------------------------

ODD: dict[str, Callable[[str], str]] = {
    "DDP": lambda key: f"module.{key}",
    "torch.compile": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "get_peft_model twice": lambda key: f"base_model.model.{key}",
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "a script's own wrapper": lambda key: f"network.{key}",
    "no prefix": lambda key: key.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("case", ODD)
def test_a_refusal_of_odd_names_names_extract_which_mends_them(
    case: str, adapter_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = copy_adapter(adapter_run / "lora_adapters", tmp_path / "odd")
    weights = read_weights(adapter)
    write_weights(adapter, {ODD[case](key): tensor for key, tensor in weights.items()})
    named = r"`speechtune adapters extract PATH OUTPUT`"
    report = verify_adapter(adapter)
    assert not report.valid and re.search(named, "; ".join(report.issues)), report.issues
    stored = open_adapter(adapter)
    config = model_config(str(tiny_base / "model"), {"codec_path": str(tiny_base / "codec")}, stored)
    for use in (
        lambda: load_model(config, stored),
        lambda: merge(config, stored, tmp_path / "merged"),
        lambda: convert(adapter, tmp_path / "converted", "native"),
    ):
        with pytest.raises(AdapterError, match=named):
            use()
    extract(adapter, tmp_path / "mended")
    mended = read_weights(tmp_path / "mended")
    assert mended.keys() == weights.keys() and all(torch.equal(mended[key], weights[key]) for key in weights)
    plain = PeftModel.from_pretrained(plain_higgs(tiny_base), str(tmp_path / "mended")).eval()
    wanted = PeftModel.from_pretrained(plain_higgs(tiny_base), str(adapter_run / "lora_adapters")).eval()
    assert torch.equal(plain_logits(plain, tiny_base), plain_logits(wanted, tiny_base))


def several(tiny_base: Path, rank: dict[str, int]) -> PeftModel:
    """A plain PEFT model with several adapters of different ranks by name."""
    first, *others = rank
    model = None
    for seed, name in enumerate([first, *others]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank[name], lora_alpha=3 * rank[name], target_modules=["q_proj"], init_lora_weights=False)
        if model is None:
            model = get_peft_model(plain_higgs(tiny_base), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    return model


@pytest.mark.parametrize("wanted", ["speech", "vision-v2"])
def test_extract_chooses_an_adapter_of_a_full_checkpoint_by_name(wanted: str, tiny_base: Path, tmp_path: Path) -> None:
    """Names with a hyphen were passed over in silence; a name that is not there was answered with "no lora_A"."""
    model = several(tiny_base, {"speech": 2, "vision-v2": 3})
    (tmp_path / "full").mkdir()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "full" / "model.safetensors")
    with pytest.raises(AdapterError, match=r"several adapters \(speech, vision-v2\); choose one with --adapter-name"):
        extract(tmp_path / "full", tmp_path / "out", alpha=9)
    with pytest.raises(AdapterError, match=r"no adapter 'audio' in it; --adapter-name can be: speech, vision-v2"):
        extract(tmp_path / "full", tmp_path / "out", alpha=9, adapter_name="audio")
    report = extract(tmp_path / "full", tmp_path / "out", alpha=9, adapter_name=wanted)
    assert report.rank == {"speech": 2, "vision-v2": 3}[wanted]
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for key, tensor in stored.items():
        assert torch.equal(tensor, state[key.replace(".weight", f".{wanted}.weight")])


@pytest.mark.parametrize("wanted", ["default", "speech", "vision"])
def test_extract_chooses_an_adapter_of_a_peft_folder_by_name(wanted: str, tiny_base: Path, tmp_path: Path) -> None:
    """PEFT writes all but "default" into folders of their own; the default one came out whatever name was asked for."""
    ranks = {"default": 2, "speech": 3, "vision": 4}
    several(tiny_base, ranks).save_pretrained(str(tmp_path / "saved"))
    with pytest.raises(AdapterError, match=r"several adapters \(default, speech, vision\)"):
        extract(tmp_path / "saved", tmp_path / "out")
    with pytest.raises(AdapterError, match=r"no adapter 'audio' in it; --adapter-name can be: default, speech, vision"):
        extract(tmp_path / "saved", tmp_path / "out", adapter_name="audio")
    report = extract(tmp_path / "saved", tmp_path / "out", adapter_name=wanted)
    assert (report.rank, report.alpha) == (ranks[wanted], 3 * ranks[wanted])


def test_extract_takes_the_only_named_adapter(tiny_base: Path, tmp_path: Path) -> None:
    several(tiny_base, {"speech": 3}).save_pretrained(str(tmp_path / "saved"))
    assert extract(tmp_path / "saved", tmp_path / "out").rank == 3


def test_extract_leaves_nothing_trained_out_in_silence(adapter_run: Path, tmp_path: Path) -> None:
    """Beside LoRA an adapter's file may hold modules in full and token embeddings, whose names tell nothing."""
    adapter = copy_adapter(adapter_run / "lora_adapters", tmp_path / "odd")
    more = {"base_model.model.text_lm_head.weight": torch.ones(3, 3)}
    write_weights(adapter, read_weights(adapter) | more)
    with pytest.raises(AdapterError, match=r"text_lm_head.weight is trained, but no LoRA tensor"):
        extract(adapter, tmp_path / "out")
    token = {"base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default": torch.ones(1, 4)}
    (tmp_path / "full").mkdir()
    save_file(read_weights(adapter_run / "lora_adapters") | token, tmp_path / "full" / "model.safetensors")
    with pytest.raises(AdapterError, match=r"trainable_tokens_delta.default is trained, but no LoRA tensor"):
        extract(tmp_path / "full", tmp_path / "out", alpha=8)


def test_targets_of_the_remote_code_model_are_brought_to_the_modules(phi4_base: Path, tmp_path: Path) -> None:
    """The released regex names modules that the native class does not have; extract lists those with weights."""
    adapter = copy_adapter(phi4_base / "speech-lora", tmp_path / "remote")
    edit_config(adapter, target_modules=r"(layers.*((self_attn\.(qkv_proj|o_proj))|(mlp\.(gate_up|down)_proj)))")
    stored = open_adapter(adapter)
    with pytest.raises(AdapterError, match=r"`speechtune adapters extract PATH OUTPUT`"):
        load_model(model_config(str(phi4_base), {"speech_lora": "continue"}, stored), stored)
    assert "speechtune adapters extract" in "; ".join(verify_adapter(adapter).issues)
    extract(adapter, tmp_path / "mended")
    mended = open_adapter(tmp_path / "mended")
    load_model(model_config(str(phi4_base), {"speech_lora": "continue"}, mended), mended)

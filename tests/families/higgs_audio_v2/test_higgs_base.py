"""The base model: native folders, old folders, folders without text head, and folders that are broken."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import HiggsAudioV2ForConditionalGeneration

from helpers import overfit
from higgs_cases import FP32, RATE, Case, collated, drop_tensors, family_on, mean_loss
from speechtune.errors import ConfigError
from speechtune.families import family_of
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model folder, to be changed."""
    return Path(shutil.copytree(tiny_base / "model", tmp_path / "model"))


def change_config(folder: Path, **values: Any) -> None:
    """Overwrite entries of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def old_config(native: Any) -> dict[str, Any]:
    """config.json of the original package for a model of the native class."""
    text = {
        "model_type": "llama",
        "vocab_size": native.vocab_size,
        "hidden_size": native.hidden_size,
        "intermediate_size": native.intermediate_size,
        "num_hidden_layers": native.num_hidden_layers,
        "num_attention_heads": native.num_attention_heads,
        "num_key_value_heads": native.num_key_value_heads,
        "head_dim": native.head_dim,
        "rms_norm_eps": native.rms_norm_eps,
        "rope_theta": native.rope_parameters["rope_theta"],
        "rope_scaling": {k: v for k, v in native.rope_parameters.items() if k != "rope_theta"},
        "bos_token_id": native.bos_token_id,
        "eos_token_id": native.eos_token_id,
    }
    return {
        "model_type": "higgs_audio",
        "torch_dtype": "bfloat16",
        "architectures": ["HiggsAudioModel"],
        "text_config": text,
        "audio_encoder_config": {"model_type": "higgs_audio_encoder"},
        "audio_adapter_type": "dual_ffn_fast_forward",
        "audio_dual_ffn_layers": list(range(native.num_hidden_layers)),
        "audio_num_codebooks": 8,
        "audio_codebook_size": 1024,
        "audio_stream_bos_id": 1024,
        "audio_stream_eos_id": 1025,
        "audio_out_token_idx": native.audio_token_id,
        "audio_out_bos_token_id": native.audio_bos_token_id,
        "pad_token_id": native.pad_token_id,
        "use_delay_pattern": True,
        "skip_audio_tower": True,
        "encode_whisper_embed": False,
        "use_audio_out_embed_projector": False,
        "use_audio_out_self_attention": False,
    }


def old_name(name: str) -> str:
    """A native parameter's name in the original package."""
    name = name.replace("model.embed_audio_tokens.embed_audio_tokens.", "audio_codebook_embeddings.")
    name = re.sub(r"^(audio_lm_head|text_lm_head)\.", r"audio_decoder_proj.\1.", name)
    return name.removeprefix("model.")


def write_old_folder(folder: Path, source: Path) -> Path:
    """A folder as the original package saves it: old keys, buffers it keeps, two shards with an index."""
    native = HiggsAudioV2ForConditionalGeneration.from_pretrained(source, use_text_head=True)
    folder.mkdir()
    tensors = {old_name(name): tensor.clone() for name, tensor in native.state_dict().items()}
    tensors["audio_codebook_weights"] = torch.ones(8)
    tensors["rotary_emb.inv_freq"] = torch.ones(8)
    names = sorted(tensors)
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in shard}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(old_config(native.config)))
    for path in source.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def test_old_folder_gives_the_native_logits(tiny_base: Path, tiny_family: HiggsAudioV2Family, tmp_path: Path) -> None:
    """A folder of the original package loads under renamed keys, and answers exactly like the native model."""
    old = family_on(write_old_folder(tmp_path / "old", tiny_base / "model"))
    assert family_of(str(tmp_path / "old")) == "higgs_audio_v2"
    native_model, old_model = tiny_family.load(FP32).eval(), old.load(FP32).eval()
    expected, expected_rows = tiny_family.probe(native_model, 20)
    logits, rows = old.probe(old_model, 20)
    assert torch.equal(logits, expected)
    assert (rows == expected_rows).all()
    stored = {name: value for name, value in native_model.named_parameters()}
    assert {name: tuple(p.shape) for name, p in old_model.named_parameters()} == {
        name: tuple(p.shape) for name, p in stored.items()
    }


def test_old_folder_keeps_its_dtype_and_sampling(tiny_base: Path, tmp_path: Path) -> None:
    """Issue: `GenerationConfig.update` drops entries it does not know, and loading drops them once more."""
    family = family_on(write_old_folder(tmp_path / "old", tiny_base / "model"))
    assert family.model_config.dtype == torch.bfloat16
    model: Any = family.load(FP32)
    model.save_pretrained(tmp_path / "native")
    saved = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path / "native").generation_config
    for settings in (model.generation_config, saved):
        assert (settings.ras_win_len, settings.ras_win_max_num_repeat) == (7, 2)


def test_old_folder_is_sharded_under_old_names(tiny_base: Path, tmp_path: Path) -> None:
    """What the test above reads is not the native layout in disguise."""
    folder = write_old_folder(tmp_path / "old", tiny_base / "model")
    files = sorted(folder.glob("*.safetensors"))
    names = {name for file in files for name in load_file(file)}
    assert len(files) == 2
    assert {"embed_tokens.weight", "audio_decoder_proj.text_lm_head.weight", "norm.weight"} <= names
    assert {"audio_codebook_embeddings.weight", "layers.1.audio_mlp.up_proj.weight"} <= names
    assert not any(name.startswith("model.") for name in names)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"skip_audio_tower": False}, "skip_audio_tower is false"),
        ({"use_delay_pattern": False}, "use_delay_pattern is false"),
        ({"audio_dual_ffn_layers": [0]}, "does not name every layer"),
    ],
)
def test_old_folder_with_other_parts_is_refused(
    tiny_base: Path, tmp_path: Path, values: dict[str, Any], reason: str
) -> None:
    """The native class has no audio tower and one layout: loading such a folder would drop what it learnt."""
    folder = write_old_folder(tmp_path / "old", tiny_base / "model")
    change_config(folder, **values)
    with pytest.raises(ConfigError, match=reason):
        family_on(folder).load(FP32)


def test_old_folder_with_missing_keys_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    """Strict: a missing shard must not become random weights."""
    folder = write_old_folder(tmp_path / "old", tiny_base / "model")
    min(folder.glob("*.safetensors")).unlink()
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigError, match=r"missing \['audio_lm_head"):
        family_on(folder).load(FP32)


def test_old_folder_with_a_damaged_file_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    """An interrupted download is named as what it is."""
    folder = write_old_folder(tmp_path / "old", tiny_base / "model")
    shard = min(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:10_000])
    with pytest.raises(ConfigError, match=f"{shard.name}: truncated"):
        family_on(folder).load(FP32)


def test_base_without_text_head_trains_on_audio(
    folder: Path, cases: list[Case], caplog: pytest.LogCaptureFixture
) -> None:
    """A default load and save drops `text_lm_head`: such a base is usable, and says that the text loss is off."""
    HiggsAudioV2ForConditionalGeneration.from_pretrained(folder).save_pretrained(folder)
    family = family_on(folder)
    with caplog.at_level(logging.WARNING, logger="speechtune"):
        model: Any = family.load(FP32)
    assert "no text head" in caplog.text and model.text_lm_head is None
    batch = collated(family, cases)
    first = family.losses(model, batch)
    assert list(first.sums) == ["audio"]
    before = float(mean_loss(first, batch).detach())
    last = overfit(model.parameters(), lambda: mean_loss(family.losses(model, batch), batch), 10, RATE)
    assert last < before - 1


ISSUES: dict[str, Callable[[Path], object]] = {
    "missing weights": lambda path: drop_tensors(path, r"layers\.1\.audio_mlp\."),
    "missing audio head": lambda path: drop_tensors(path, r"^audio_lm_head"),
    "no weights": lambda path: (path / "model.safetensors").unlink(),
    "empty file": lambda path: (path / "model.safetensors").write_bytes(b""),
    "truncated file": lambda path: (path / "model.safetensors").write_bytes(
        (path / "model.safetensors").read_bytes()[:1_000_000]
    ),
    "other shapes": lambda path: change_config(path, intermediate_size=96),
    "other family": lambda path: change_config(path, model_type="llama"),
}


@pytest.mark.parametrize("issue", ISSUES)
def test_broken_base_is_refused(folder: Path, issue: str) -> None:
    """transformers fills missing weights with random ones and only reports it: such a base must not be trained."""
    ISSUES[issue](folder)
    family = family_on(folder)
    with pytest.raises(ConfigError, match=re.escape(f"model.path={folder}")):
        _ = family.model_config
        family.load(FP32)


def test_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    """Ids that mean something else would turn rows into words."""
    change_config(folder, audio_token_id=5)
    with pytest.raises(ConfigError, match=r"gives <\|AUDIO_OUT\|> the id \d+, the model's audio_token_id is 5"):
        _ = family_on(folder).tokenizer


def test_folder_without_tokenizer_is_refused(folder: Path) -> None:
    """The message names the option, not a class of the tokenizers library."""
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json is missing"):
        _ = family_on(folder).tokenizer


@pytest.mark.parametrize("part", ["model", "codec"])
def test_code_in_a_folder_is_not_offered_to_be_run(
    part: str, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue: transformers' Auto classes ask at the terminal whether to run a folder's code, and a `y` ran it."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    change_config(base / part, model_type="other", auto_map={"AutoConfig": "code.Config"})
    witness = tmp_path / "was-run"
    (base / part / "code.py").write_text(
        f"from transformers import PretrainedConfig\nopen({str(witness)!r}, 'w').close()\n"
        "class Config(PretrainedConfig):\n    model_type = 'other'\n"
    )
    family = family_on(base / "model", base / "codec")
    with pytest.raises(ConfigError, match=re.escape(str(base / part))):
        _ = family.model_config
        _ = family.codec
    assert asked == [] and not witness.exists()

"""Models and adapters of the original package (`model_type: higgs_audio`), read in the native layout."""

import json
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from speechtune.errors import ConfigError
from speechtune.family import AdapterLayout

KEY_RENAMES = (
    (re.compile(r"^audio_codebook_embeddings\."), "model.embed_audio_tokens.embed_audio_tokens."),
    (re.compile(r"^(embed_tokens|layers|norm)\b"), r"model.\1"),
    (re.compile(r"^audio_decoder_proj\."), ""),
)
BOSON_RENAMES = (
    (re.compile(r"^model\.embed_audio_tokens\.embed_audio_tokens\."), "audio_codebook_embeddings."),
    (re.compile(r"^model\.(embed_tokens|layers|norm)\b"), r"\1"),
    (re.compile(r"^(audio_lm_head|text_lm_head)\."), r"audio_decoder_proj.\1."),
)
DROPPED_KEYS = re.compile(r"(^audio_codebook_weights$|rotary_emb\.(original_)?inv_freq$)")
SPLIT_PARTS = re.compile(r"\.(embedding|linear)_(frozen|trainable)\.weight$")
REQUIRED = ("skip_audio_tower", "use_delay_pattern")
AUDIO_OUTPUT = ("use_audio_out_embed_projector", "use_audio_out_self_attention", "audio_embed_avg")
UNSUPPORTED = (*AUDIO_OUTPUT, "use_rq_transformer", "audio_decoder_proj_num_layers")
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SAME_NAMES = (*SIZES, "hidden_act", "rms_norm_eps", "max_position_embeddings", "attention_bias", "mlp_bias")
STREAM_IDS = 2  # BOS and EOS follow the codes in every codebook


def _renamed(renames: Iterable[tuple[re.Pattern[str], str]], name: str) -> str:
    for pattern, replacement in renames:
        name = pattern.sub(replacement, name)
    return name


rename_key = partial(_renamed, KEY_RENAMES)
"""Native name of an old parameter."""
boson_name = partial(_renamed, BOSON_RENAMES)
"""Old name of a native parameter."""


def is_legacy(directory: Path) -> bool:
    """Whether `directory` holds a model of the original package."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "higgs_audio"


def legacy_config(directory: Path) -> HiggsAudioV2Config:
    """Native configuration of an old folder."""
    old = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    text = old.get("text_config") or {}
    reasons = [f"{name} is false" for name in REQUIRED if not old.get(name, False)]
    reasons += [f"{name} is {json.dumps(old[name])}" for name in UNSUPPORTED if old.get(name)]
    if len(old.get("audio_dual_ffn_layers") or []) != text.get("num_hidden_layers"):
        reasons.append("audio_dual_ffn_layers does not name every layer")
    if reasons:
        raise ConfigError(
            f"{directory}/config.json: this model_type higgs_audio folder cannot be loaded natively: "
            + "; ".join(reasons)
        )
    rope = dict(text.get("rope_scaling") or {"rope_type": "default"})
    rope["rope_theta"] = text.get("rope_theta", 500000.0)
    heads = text["num_attention_heads"]
    return HiggsAudioV2Config(
        **{name: text[name] for name in SAME_NAMES if name in text},  # the native defaults are those of the old class
        dtype=old.get("torch_dtype"),
        num_key_value_heads=text.get("num_key_value_heads", heads),
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        rope_parameters=rope,
        pad_token_id=old.get("pad_token_id", 128001),
        bos_token_id=text.get("bos_token_id", 128000),
        eos_token_id=128009 if text["vocab_size"] == 128256 else text.get("eos_token_id"),
        num_codebooks=old.get("audio_num_codebooks", 8),
        codebook_size=old.get("audio_codebook_size", 1024) + STREAM_IDS,
        audio_stream_bos_id=old.get("audio_stream_bos_id", 1024),
        audio_stream_eos_id=old.get("audio_stream_eos_id", 1025),
        audio_token_id=old.get("audio_out_token_idx", 128016),
        audio_bos_token_id=old.get("audio_out_bos_token_id", 128013),
        audio_delay_token_id=old.get("audio_out_token_idx", 128016) - 2,
    )


def legacy_state_dict(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of an old folder under their native names."""
    files = sorted(directory.glob("*.safetensors"))
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        tensors.update(load_file(file))
    if not files:
        for file in sorted(directory.glob("pytorch_model*.bin")):
            tensors.update(torch.load(file, map_location="cpu", weights_only=True))
    if not tensors:
        raise ConfigError(f"{directory}: no *.safetensors and no pytorch_model*.bin; the download is incomplete")
    for key in [key for key in tensors if SPLIT_PARTS.search(key)]:
        if "_frozen." in key:
            trainable = key.replace("_frozen.", "_trainable.")
            joined = SPLIT_PARTS.sub(".weight", key)
            tensors[joined] = torch.cat([tensors.pop(key), tensors.pop(trainable)], dim=0)
    return {rename_key(key): tensor for key, tensor in tensors.items() if not DROPPED_KEYS.search(key)}


def load_legacy(directory: Path, dtype: torch.dtype, attention: str) -> nn.Module:
    """Load an old folder into the native class, strictly: every key must find its place."""
    config = legacy_config(directory)
    config._attn_implementation = attention
    tensors: dict[str, Any] = {key: tensor.to(dtype) for key, tensor in legacy_state_dict(directory).items()}
    with torch.device("meta"):
        model = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True)
    expected = set(model.state_dict())
    missing, unexpected = sorted(expected - set(tensors)), sorted(set(tensors) - expected)
    if missing or unexpected:
        raise ConfigError(
            f"{directory}: the weights do not fit the native class: missing {missing[:5]} ({len(missing)}), "
            f"left over {unexpected[:5]} ({len(unexpected)})"
        )
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, use_text_head=True
    )
    model.generation_config._from_model_config = False  # else RAS is dropped when a saved copy is loaded
    model.generation_config.update(allow_custom_entries=True, ras_win_len=7, ras_win_max_num_repeat=2)
    return model


BOSON = AdapterLayout(
    names=re.compile(r"^(layers|embed_tokens|norm|audio_codebook_embeddings|audio_decoder_proj)\."),
    native_names=re.compile(r"^(model|audio_lm_head|text_lm_head)\."),
    to_native=rename_key,
    from_native=boson_name,
)
"""Names of adapters trained with the original package."""

"""What a batch of each family sends through which modules, for counting operations; see `flops`.

Shapes: B samples, S sequence positions, T log-mel frames, M mel bins, E encoder positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from flops import Rule, causal_pairs
from torch import nn

from speechtune.families.layers.decoder import is_fast
from speechtune.family import Family
from speechtune.lora.apply import plain_model
from speechtune.types import Batch

AUDIO_EMBED = r"model\.embed_tokens_extend\.audio_embed"
BLOCK = AUDIO_EMBED + r"\.encoder\.encoders\.(\d+)"
LAYER = r"model\.layers\.(\d+)"


def flop_rules(family: Family, model: nn.Module, batch: Batch) -> tuple[Rule, ...]:
    """Rules for `flops.count_flops`: padding is computed, and the fast forward's last layer goes on beyond
    its attention with the positions of targets alone.

    Args:
        family: of the batch.
        model: its layers tell whether the forward is the fast one.
        batch: of the family's `collate`, on any device: only sizes are read.
    """
    decoder = cast(Any, plain_model(model)).model
    return _RULES[family.name](family, batch, len(decoder.layers) - 1 if is_fast(decoder) else None)


@dataclass(frozen=True, slots=True)
class _Ffn:
    """One FFN of a decoder layer: its name, and its rows in all layers, of real tokens, and where a target is."""

    name: str
    part: str
    rows: int
    real: int
    kept: int


def _decoder(qkv: str, ffns: Sequence[_Ffn], batch: Batch, last: int | None) -> list[Rule]:
    """Rules of decoder layers; `qkv` is a regex over the attention's inputs, `last` a layer that computes less."""
    rows, real, kept = batch.inputs["input_ids"].numel(), batch.num_tokens, len(batch.inputs["kept"])
    attention, norms = "attention projections", r"\.(?:audio_)?{}_layernorm"
    layers = [(LAYER, False)] if last is None else [(rf"model\.layers\.({last})", True), (LAYER, False)]
    return [
        Rule("layers.norm", LAYER + norms.format("input"), attention),
        Rule("layers.qkv", rf"{LAYER}\.self_attn\.{qkv}", attention, rows, real),
        Rule("layers.scores", rf"{LAYER}\.self_attn", "attention scores", pairs=causal_pairs(batch.lengths)),
        *(
            Rule("layers.o", rf"{at}\.self_attn\.o_proj", attention, kept if less else rows, real)
            for at, less in layers
        ),
        Rule("layers.post_norm", LAYER + norms.format("post_attention"), attention),
        *(
            Rule(f"layers.{step}", rf"{at}\.{ffn.name}\.{names}", ffn.part, ffn.kept if less else ffn.rows, ffn.real)
            for step, names in (("up", "(?:gate|up|gate_up)_proj"), ("down", "down_proj"))
            for at, less in layers
            for ffn in ffns
        ),
        Rule("heads.norm", r"model\.norm", "heads"),
    ]


def _higgs(family: Any, batch: Batch, last: int | None) -> tuple[Rule, ...]:
    inputs = batch.inputs
    rows, audio = inputs["input_ids"].numel(), len(inputs["audio_rows"])
    ffns = [  # padding passes as text
        _Ffn("mlp", "text FFN", rows - audio, batch.num_tokens - audio, len(inputs["kept_text"])),
        _Ffn("audio_mlp", "audio FFN", audio, audio, len(inputs["kept_audio"])),
    ]
    return (
        Rule("embeddings.all", r"model\.embed_(?:audio_)?tokens(?:\.embed_audio_tokens)?", "embeddings"),
        *_decoder("[qkv]_proj", ffns, batch, last),
        Rule("heads.all", "audio_lm_head", "heads", len(inputs["audio_targets"])),
        Rule("heads.all", "text_lm_head", "heads", len(inputs["text_targets"])),
    )


def _phi4(family: Any, batch: Batch, last: int | None) -> tuple[Rule, ...]:
    inputs = batch.inputs
    ffn = _Ffn("mlp", "text FFN", inputs["input_ids"].numel(), batch.num_tokens, len(inputs["kept"]))
    return (
        *_phi4_encoder(family, inputs),
        Rule("embeddings.all", r"model\.embed_tokens", "embeddings"),
        *_decoder("qkv_proj", [ffn], batch, last),
        Rule("heads.all", "lm_head", "heads", sum(batch.target_counts.values())),
        Rule("unused.all", r"model\.embed_tokens_extend\.(?:image_embed|audio_embed)\b.*", "vision encoder"),
    )


def _phi4_encoder(family: Any, inputs: Mapping[str, torch.Tensor]) -> list[Rule]:
    config, part = family.model_config.audio_config, "audio encoder"
    clips, frames, bins = inputs["features"].shape
    subsampling = AUDIO_EMBED + r"\.encoder\.embed"
    rules, index = [], 0
    for halving in range(config.time_reduction.bit_length() - 1):
        frames, bins = (frames + 1) // 2, (bins + 1) // 2  # kernel 3, stride 2, padding 1
        kernels = str(index) if not halving else f"({index}|{index + 1})"  # after the first, a pointwise one follows
        rules.append(Rule(f"sub.{halving}", rf"{subsampling}\.conv\.(?:{kernels})", part, clips * frames * bins))
        index += 2 if not halving else 3
    rows, real = clips * frames, len(inputs["audio_rows"])
    beyond = clips * (config.kernel_size - 1)  # the depthwise convolution pads both sides; the end is cut off later
    return [
        *rules,
        Rule("flat.out", rf"{subsampling}\.out", part, rows),
        Rule("flat.bias", rf"{AUDIO_EMBED}\.encoder\.relative_attention_bias_layer\.bias_values", part),
        Rule("enc.up", rf"{BLOCK}\.feed_forward_in\.(layer_norm|gate_up_proj)", part, rows),
        Rule("enc.down", rf"{BLOCK}\.feed_forward_in\.down_proj", part, rows),
        Rule("enc.norm", rf"{BLOCK}\.layer_norm_att", part),
        Rule("enc.qkv", rf"{BLOCK}\.self_attn\.[qkv]_proj", part, rows),
        Rule("enc.scores", rf"{BLOCK}\.self_attn", part, pairs=rows * frames),
        Rule("enc.o", rf"{BLOCK}\.self_attn\.o_proj", part, rows),
        Rule("enc.glu", rf"{BLOCK}\.conv\.(layer_norm|glu|glu\.ext_pw_conv_1d)", part, rows),
        Rule("enc.depthwise", rf"{BLOCK}\.conv\.dw_sep_conv_1d\.dw_conv", part, rows + beyond),
        Rule("enc.pointwise", rf"{BLOCK}\.conv\.dw_sep_conv_1d\.pw_conv", part, rows + beyond),
        Rule("enc.external", rf"{BLOCK}\.conv\.ext_pw_conv_1d", part, rows),
        Rule("enc.last_up", rf"{BLOCK}\.feed_forward_out\.(layer_norm|gate_up_proj)", part, rows),
        Rule("enc.last_down", rf"{BLOCK}\.feed_forward_out\.down_proj", part, rows),
        Rule("enc.last_norm", rf"{BLOCK}\.layer_norm", part),
        Rule("project.up", rf"{AUDIO_EMBED}\.up_proj_for_speech", part, real),
        Rule("project.down", rf"{AUDIO_EMBED}\.down_proj_for_speech", part, real),
    ]


_RULES: Mapping[str, Callable[[Any, Batch, int | None], tuple[Rule, ...]]] = {
    "higgs_audio_v2": _higgs,
    "phi4_multimodal": _phi4,
}

"""What a batch of each family sends through which modules, for counting operations; see `speechtune.flops`.

Shapes: B samples, S sequence positions, T log-mel frames, M mel bins, E encoder positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from speechtune.families.base import Batch, Family
from speechtune.flops import Rule, causal_pairs

AUDIO_EMBED = r"model\.embed_tokens_extend\.audio_embed"
BLOCK = AUDIO_EMBED + r"\.encoder\.encoders\.(\d+)"
LAYER = r"model\.layers\.(\d+)"


def flop_rules(family: Family, batch: Batch) -> tuple[Rule, ...]:
    """Rules for `speechtune.flops.count_flops`.

    On the CPU: the sizes are read off the batch's tensors, and on a GPU each reading would wait for the device.
    """
    return _RULES[family.name](family, batch)


def sample_lengths(inputs: Mapping[str, torch.Tensor]) -> list[int]:
    """Positions of each sample of a batch."""
    return inputs["attention_mask"].sum(1).tolist()


def _decoder(qkv: str, ffns: Sequence[tuple[str, str, int, int]], rows: int, real: int, pairs: int) -> list[Rule]:
    """Rules of decoder layers: a regex over the attention's inputs, and per FFN its prefix, part and rows."""
    attention, norms = "attention projections", r"\.(?:audio_)?{}_layernorm"
    return [
        Rule("layers.norm", LAYER + norms.format("input"), attention),
        Rule("layers.qkv", rf"{LAYER}\.self_attn\.{qkv}", attention, rows, real),
        Rule("layers.scores", rf"{LAYER}\.self_attn", "attention scores", pairs=pairs),
        Rule("layers.o", rf"{LAYER}\.self_attn\.o_proj", attention, rows, real),
        Rule("layers.post_norm", LAYER + norms.format("post_attention"), attention),
        *(Rule("layers.up", rf"{LAYER}\.{name}\.(?:gate|up|gate_up)_proj", part, n, m) for name, part, n, m in ffns),
        *(Rule("layers.down", rf"{LAYER}\.{name}\.down_proj", part, n, m) for name, part, n, m in ffns),
        Rule("heads.norm", r"model\.norm", "heads"),
    ]


def _higgs(family: Any, batch: Batch) -> tuple[Rule, ...]:
    inputs = batch.inputs
    rows, audio = inputs["input_ids"].numel(), int(inputs["audio_input_ids_mask"].sum())
    ffns = [
        ("mlp", "text FFN", rows - audio, batch.num_tokens - audio),  # padding passes as text
        ("audio_mlp", "audio FFN", audio, audio),
    ]
    pairs = causal_pairs(sample_lengths(inputs))
    return (
        Rule("embeddings.all", r"model\.embed_(?:audio_)?tokens(?:\.embed_audio_tokens)?", "embeddings"),
        *_decoder("[qkv]_proj", ffns, rows, batch.num_tokens, pairs),
        Rule("heads.all", "audio_lm_head", "heads", len(inputs["audio_positions"])),
        Rule("heads.all", "text_lm_head", "heads", len(inputs["text_positions"])),
    )


def _phi4(family: Any, batch: Batch) -> tuple[Rule, ...]:
    inputs = batch.inputs
    rows = inputs["input_ids"].numel()
    ffns = [("mlp", "text FFN", rows, batch.num_tokens)]
    pairs = causal_pairs(sample_lengths(inputs))
    targets = sum(len(inputs[f"{head}_positions"]) for head in batch.target_counts)
    return (
        *_phi4_encoder(family, inputs),
        Rule("embeddings.all", r"model\.embed_tokens", "embeddings"),
        *_decoder("qkv_proj", ffns, rows, batch.num_tokens, pairs),
        Rule("heads.all", "lm_head", "heads", targets),
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
    rows, real = clips * frames, int((inputs["input_ids"] == family.audio_id).sum())
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


_RULES: Mapping[str, Callable[[Any, Batch], tuple[Rule, ...]]] = {"higgs_audio_v2": _higgs, "phi4_multimodal": _phi4}

"""Decoder layers with a forward pass of their own, and the one place where they take the native ones' place.

A fast layer is the native layer, module by module and weight by weight; given `Routes` it computes the same on samples
laid end to end, without them it is the native layer still (generation goes that way).

Shapes: N positions laid end to end, A of them audio rows and T text, D hidden size, P positions that carry a target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2DecoderLayer
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalDecoderLayer

from speechtune.families.base import Batch
from speechtune.families.fast import Segments, attend, linear, reorder
from speechtune.families.fast_ops import Kernels, rms_norm, rope, silu_mul


@dataclass(frozen=True, slots=True)
class Sorting:
    """Audio rows before text, once for all layers, so that each FFN of a dual-FFN layer has its own tensor.

    Attributes:
        order: for each place in (audio, text) order its position (N,).
        places: the inverse of it.
        kept_audio, kept_text: `Routes.kept` as rows of the audio and of the text tensor.
    """

    order: torch.Tensor
    places: torch.Tensor
    kept_audio: torch.Tensor
    kept_text: torch.Tensor


@dataclass(frozen=True, slots=True)
class Routes:
    """Where the positions of a batch go in every layer.

    Attributes:
        segments: the samples.
        rotation: cos and sin of the rotary embedding, each (N, width).
        kept: positions (P,) that the last layer computes beyond its attention; None in all other layers.
        sorting: for dual-FFN layers.
    """

    segments: Segments
    rotation: tuple[torch.Tensor, torch.Tensor]
    kept: torch.Tensor | None
    sorting: Sorting | None = None


def _norm(norm: Any, x: torch.Tensor, kernels: Kernels) -> torch.Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon, kernels)


class FastHiggsLayer(HiggsAudioV2DecoderLayer):
    """Dual-FFN layer on (audio, text) tensors; the native one finds the audio by boolean masks six times a layer."""

    kernels: Kernels = "torch"

    def forward(self, hidden_states: Any, *args: Any, routes: Routes | None = None, **kwargs: Any) -> Any:
        """Native without `routes`; with them a pair of tensors (A, D), (T, D) in and out."""
        if routes is None or routes.sorting is None:
            return super().forward(hidden_states, *args, **kwargs)
        (audio_AD, text_TD), sorting = hidden_states, routes.sorting
        heads, kernels = cast(Any, self.self_attn), self.kernels
        norms = ((self.audio_input_layernorm, audio_AD), (self.input_layernorm, text_TD))
        mixed_ND = torch.cat([_norm(norm, x, kernels) for norm, x in norms])
        q, k, v = (
            reorder(linear(projection, mixed_ND), sorting.places, sorting.order).unflatten(-1, (-1, heads.head_dim))
            for projection in (heads.q_proj, heads.k_proj, heads.v_proj)
        )
        q, k = (x.to(v.dtype) for x in rope(q, k, *routes.rotation))
        attended_ND = attend(q, k, v, routes.segments).flatten(1)
        if routes.kept is None:
            attended_ND = reorder(attended_ND, sorting.order, sorting.places)
        else:
            attended_ND = attended_ND.index_select(0, routes.kept)
            audio_AD, text_TD = audio_AD.index_select(0, sorting.kept_audio), text_TD.index_select(0, sorting.kept_text)
        to_audio, to_text = linear(heads.o_proj, attended_ND).split((len(audio_AD), len(text_TD)))
        audio_AD, text_TD = audio_AD + to_audio, text_TD + to_text
        audio_AD = audio_AD + self._feed_forward(self.audio_mlp, self.audio_post_attention_layernorm, audio_AD)
        text_TD = text_TD + self._feed_forward(self.mlp, self.post_attention_layernorm, text_TD)
        return audio_AD, text_TD

    def _feed_forward(self, mlp: Any, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = _norm(norm, x, self.kernels)
        return linear(mlp.down_proj, silu_mul(linear(mlp.gate_proj, x), linear(mlp.up_proj, x), self.kernels))


class FastPhi4Layer(Phi4MultimodalDecoderLayer):
    """Language model layer on samples laid end to end."""

    kernels: Kernels = "torch"

    def forward(self, hidden_states: Any, *args: Any, routes: Routes | None = None, **kwargs: Any) -> Any:
        """Native without `routes`; with them (N, D) in and out."""
        if routes is None:
            return super().forward(hidden_states, *args, **kwargs)
        heads: Any = self.self_attn
        groups = heads.num_key_value_heads
        sizes = (groups * heads.num_key_value_groups, groups, groups)
        mixed_ND = _norm(self.input_layernorm, hidden_states, self.kernels)
        qkv = linear(heads.qkv_proj, mixed_ND).unflatten(-1, (-1, heads.head_dim))
        q, k, v = qkv.split(sizes, 1)
        q, k = (x.to(v.dtype) for x in rope(q, k, *routes.rotation))
        attended_ND = attend(q, k, v, routes.segments).flatten(1)
        if routes.kept is not None:
            attended_ND, hidden_states = (x.index_select(0, routes.kept) for x in (attended_ND, hidden_states))
        hidden_states = hidden_states + self.resid_attn_dropout(linear(heads.o_proj, attended_ND))
        mixed_ND = _norm(self.post_attention_layernorm, hidden_states, self.kernels)
        gate, up = linear(self.mlp.gate_up_proj, mixed_ND).chunk(2, -1)
        down = linear(self.mlp.down_proj, silu_mul(gate, up, self.kernels))
        return hidden_states + self.resid_mlp_dropout(down)


FAST_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    HiggsAudioV2DecoderLayer: FastHiggsLayer,
    Phi4MultimodalDecoderLayer: FastPhi4Layer,
}


def make_fast(model: nn.Module, kernels: Kernels = "torch") -> nn.Module:
    """Let the decoder layers of a loaded model be fast ones.

    Those with dropout in their attention, or with another activation than SiLU, stay native.
    """
    for module in model.modules():
        fast, layer = FAST_LAYERS.get(type(module)), cast(Any, module)
        if fast is not None and not layer.self_attn.attention_dropout and layer.self_attn.config.hidden_act == "silu":
            layer.__class__, layer.kernels = fast, kernels
    return model


def is_fast(decoder: nn.Module) -> bool:
    """True if the layers of a decoder take `Routes`."""
    return isinstance(cast(Any, decoder).layers[0], tuple(FAST_LAYERS.values()))


def run_layers(decoder: nn.Module, hidden: Any, routes: Routes) -> Any:
    """All layers of a decoder with `layers`; the last one goes on with `routes.kept` alone."""
    layers = cast(Any, decoder).layers
    inner = replace(routes, kept=None)
    for layer in layers[:-1]:
        hidden = layer(hidden, routes=inner)
    if routes.kept is not None:
        routes = replace(routes, segments=routes.segments.needed(routes.kept))
    return layers[-1](hidden, routes=routes)


def rotation_of(decoder: nn.Module, like: torch.Tensor, positions_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (N, width) of the decoder's rotary embedding at `positions_N`."""
    cos_1NE, sin_1NE = cast(Any, decoder).rotary_emb(like, positions_N[None])
    return cos_1NE[0], sin_1NE[0]


def block_causal_mask(batch: Batch) -> torch.Tensor:
    """What native attention needs for a packed batch: bool (1, 1, N, N), each position sees its sample's past."""
    positions_N = batch.inputs["position_ids"].flatten()
    sample_N = (positions_N == 0).cumsum(0)
    causal_NN = torch.ones(len(sample_N), len(sample_N), dtype=torch.bool, device=sample_N.device).tril()
    return (causal_NN & (sample_N[:, None] == sample_N))[None, None]

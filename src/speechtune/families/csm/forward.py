"""The forward pass of CSM up to the losses, native or fast, where a target is and nowhere else.

Shapes: B samples, S positions, N positions of a batch laid end to end, P target rows (frames and ends of speech), R
rows of the depth decoder, K codebooks, V codebook size, D width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.models.csm.modeling_csm import CsmDecoderLayer

from speechtune.families.layers.decoder import FastLayer, Routes, is_fast, native_inputs, run_layers
from speechtune.families.layers.kernels import rope, silu_mul
from speechtune.families.layers.ops import Segments, attend, linear
from speechtune.types import Batch

LOGITS_PER_CHUNK = 2**22
"""Of the depth decoder's heads: 16 MB in float32; 63 rows of the released model."""
LOGITS_PER_GPU_CHUNK = 2**27


def embed(base: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Embeddings of `input_ids`, (B, S, D) or (1, N, D); at `audio_places` those of `audio_rows` (A, K), summed over K.

    The row that ends a clip is K zeros, and so embedded: the text token of its name is in no prompt.
    """
    embeds_BSD = base.embed_text_tokens(inputs["input_ids"])
    audio_AD = base.backbone_model.embed_tokens(inputs["audio_rows"][None])[0]
    return embeds_BSD.flatten(0, 1).index_copy(0, inputs["audio_places"], audio_AD).view_as(embeds_BSD)


def target_states(base: Any, batch: Batch) -> torch.Tensor:
    """Backbone states (P, D) that predict the target rows: those of the positions before them."""
    inputs, backbone = batch.inputs, base.backbone_model
    embeds_BSD = embed(base, inputs)
    if is_fast(backbone):
        return backbone.norm(run_layers(backbone, embeds_BSD.flatten(0, 1), batch))
    states_BSD = backbone(inputs_embeds=embeds_BSD, use_cache=False, **native_inputs(inputs)).last_hidden_state
    return states_BSD.flatten(0, 1).index_select(0, inputs["kept"])


@dataclass(frozen=True, slots=True)
class Rows(Segments):
    """Segments of one length, K: attention takes them as one batch."""


def depth_states(decoder: Any, states_RD: torch.Tensor, codes_RK: torch.Tensor) -> torch.Tensor:
    """States (R, K - 1, D) of the depth decoder that predict codebooks 1 and up.

    Its K positions are the backbone's state *before* the row, then codebooks 0 to K - 2 of the row itself.
    `decoder` is the `model` of the native depth decoder. It gets its input put together here: the native way writes the
    state into the embeddings in place, which fails where only adapters are trained and activations are recomputed.
    """
    rows, size = codes_RK.shape
    offsets = torch.arange(size - 1, device=codes_RK.device) * decoder.vocab_size
    codes_RKD = decoder.embed_tokens(codes_RK[:, :-1] + offsets)
    embeds_RKD = torch.cat([states_RD[:, None].to(codes_RKD.dtype), codes_RKD], 1)
    if not is_fast(decoder):
        # Without a mask transformers looks for packed samples, and fails where there are as many rows as codebooks.
        mask_RK = torch.ones_like(codes_RK)
        return decoder(inputs_embeds=embeds_RKD, attention_mask=mask_RK, use_cache=False).last_hidden_state[:, 1:]
    hidden_ND = linear(decoder.inputs_embeds_projector, embeds_RKD.flatten(0, 1))
    positions_1K = torch.arange(size, device=codes_RK.device)[None]
    cos, sin = (part[0].repeat(rows, 1) for part in decoder.rotary_emb(hidden_ND, positions_1K))
    offsets = torch.arange(rows + 1, device=codes_RK.device, dtype=torch.int32) * size
    routes = Routes(Rows((size,) * rows, offsets), (cos, sin), None)
    for layer in decoder.layers:
        hidden_ND = layer(hidden_ND, routes=routes)
    return decoder.norm(hidden_ND).unflatten(0, (rows, size))[:, 1:]


def depth_logits(states_RKD: torch.Tensor, weight_KDV: torch.Tensor) -> torch.Tensor:
    """Logits (R, K - 1, V), each position with its codebook's own head; the native head multiplies one by one."""
    return torch.einsum("rkd,kdv->rkv", states_RKD, weight_KDV)


def depth_loss(
    states_RKD: torch.Tensor, weight_KDV: torch.Tensor, targets_RK: torch.Tensor, weights_R: torch.Tensor
) -> torch.Tensor:
    """Cross-entropy of codebooks 1 and up, summed over them and, times their weights, over rows; a float32 scalar.

    `targets_RK` are without codebook 0. Logits are computed chunk by chunk, and again in the backward pass: for all
    frames of a batch they would take more memory than the depth decoder itself.
    """

    def part(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        logits_RKV = depth_logits(states, weight).float()
        losses = functional.cross_entropy(logits_RKV.flatten(0, 1), targets.flatten(), reduction="none")
        return (losses.view_as(targets).sum(1) * weights).sum()

    room = LOGITS_PER_GPU_CHUNK if states_RKD.is_cuda else LOGITS_PER_CHUNK
    size = max(1, room // (targets_RK.shape[1] * weight_KDV.shape[-1]))
    chunks = zip(*(x.split(size) for x in (states_RKD, targets_RK, weights_R)), strict=True)
    total = states_RKD.new_zeros((), dtype=torch.float32)
    for states, targets, weights in chunks:
        loss = checkpoint(part, states, weight_KDV, targets, weights, use_reentrant=False, preserve_rng_state=False)
        total = total + cast(torch.Tensor, loss)
    return total


def draw_rows(inputs: Mapping[str, torch.Tensor], share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Target rows for the depth decoder, and the weight of each, such that the weighted sum has the mean of all rows'.

    All ends of speech with weight 1, and of n frames k = ceil(share * n), drawn without replacement, with weight n / k
    each: the estimator of Horvitz and Thompson (1952). With a share of 1 nothing is drawn.
    """
    frames, ends = inputs["frames"], inputs["ends"]
    kept = math.ceil(share * len(frames))
    drawn = frames if kept == len(frames) else frames[torch.randperm(len(frames), device=frames.device)[:kept]]
    weights = torch.ones(kept + len(ends), device=frames.device)
    weights[:kept] = len(frames) / max(kept, 1)
    return torch.cat([drawn, ends]), weights


class FastCsmLayer(FastLayer, CsmDecoderLayer):
    """Layer of backbone and depth decoder on samples, or rows, laid end to end."""

    def forward(self, hidden_states: Any, *args: Any, routes: Routes | None = None, **kwargs: Any) -> Any:
        """Native without `routes`; with them (N, D) in and out."""
        if routes is None:
            return super().forward(hidden_states, *args, **kwargs)
        heads: Any = self.self_attn
        mixed_ND = self.normed(self.input_layernorm, hidden_states)
        q, k, v = (
            linear(projection, mixed_ND).unflatten(-1, (-1, heads.head_dim))
            for projection in (heads.q_proj, heads.k_proj, heads.v_proj)
        )
        q, k = (x.to(v.dtype) for x in rope(q, k, *routes.rotation))
        within = attend_rows if isinstance(routes.segments, Rows) else attend
        attended_ND = within(q, k, v, routes.segments).flatten(1)
        if routes.kept is not None:
            attended_ND, hidden_states = (x.index_select(0, routes.kept) for x in (attended_ND, hidden_states))
        hidden_states = hidden_states + linear(heads.o_proj, attended_ND)
        mixed_ND = self.normed(self.post_attention_layernorm, hidden_states)
        gate, up = linear(self.mlp.gate_proj, mixed_ND), linear(self.mlp.up_proj, mixed_ND)
        return hidden_states + linear(self.mlp.down_proj, silu_mul(gate, up, self.kernels))


def attend_rows(q_NHE: torch.Tensor, k_NGE: torch.Tensor, v_NGE: torch.Tensor, rows: Segments) -> torch.Tensor:
    """As `layers.ops.attend`, which on a CPU takes one segment after another: too slow for many of K positions."""
    size = rows.lengths[0]
    q, k, v = (x.unflatten(0, (-1, size)).transpose(1, 2) for x in (q_NHE, k_NGE, v_NGE))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2).flatten(0, 1)


FAST_LAYERS: dict[type[nn.Module], type[FastLayer]] = {CsmDecoderLayer: FastCsmLayer}

"""The forward pass of Phi-4-multimodal up to the head: batches laid out, audio in its places, layers native or fast.

Shapes: B samples, S positions, N positions of a batch laid end to end, P positions that carry a target, D width.
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import Phi4MultimodalConfig
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalDecoderLayer

from speechtune.errors import ManifestError
from speechtune.families.layers.decoder import FastLayer, Layout, Routes, is_fast, native_inputs, place_ids, run_layers
from speechtune.families.layers.kernels import rope, silu_mul
from speechtune.families.layers.ops import attend, linear
from speechtune.families.phi4_multimodal.audio import embed_clips, pad_features
from speechtune.types import Batch


def lay_out(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], layout: Layout, config: Phi4MultimodalConfig
) -> tuple[dict[str, torch.Tensor], list[int], tuple[int, ...]]:
    """A batch of pairs, each of token ids (S,), with placeholders where audio goes, and features (T, M).

    Returns its tensors, the place of each sample's first id in the flattened batch, and the positions each takes.
    """
    audio = cast(Any, config.audio_config)
    arrays, starts, lengths = place_ids([ids_S for ids_S, _ in pairs], cast(int, config.pad_token_id), layout)
    features_BTM, frames_B, rows_N = pad_features([features for _, features in pairs], audio.time_reduction)
    places_N = np.flatnonzero(arrays["input_ids"] == audio.audio_token_id)
    if len(places_N) != len(rows_N):
        raise ManifestError(f"{len(places_N)} audio placeholders in the prompts, {len(rows_N)} audio positions")
    inputs = {name: torch.from_numpy(value) for name, value in (arrays | {"audio_places": places_N}).items()}
    inputs |= {"features": features_BTM, "feature_lengths": frames_B, "audio_rows": rows_N}
    return inputs, starts, lengths


def embed(base: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Token embeddings, (B, S, D) or (1, N, D) as `input_ids`, with each placeholder replaced by its audio position."""
    embeds_BSD = base.model.embed_tokens(inputs["input_ids"])
    audio = (inputs[name] for name in ("features", "feature_lengths", "audio_rows"))
    audio_ND = embed_clips(base.model.embed_tokens_extend.audio_embed, *audio)
    flat_ND = embeds_BSD.flatten(0, 1).index_copy(0, inputs["audio_places"], audio_ND.to(embeds_BSD.dtype))
    return flat_ND.view_as(embeds_BSD)


def native_states(base: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states of all positions, (B, S, D) or (1, N, D), by transformers' own forward pass."""
    embeds_BSD = embed(base, inputs)
    return base.model(inputs_embeds=embeds_BSD, use_cache=False, **native_inputs(inputs)).last_hidden_state


def target_states(base: Any, batch: Batch) -> torch.Tensor:
    """Hidden states (P, D) that predict the targets of a batch, in the order of `kept`."""
    inputs, decoder = batch.inputs, base.model
    if is_fast(decoder):
        return decoder.norm(run_layers(decoder, embed(base, inputs).flatten(0, 1), batch))
    return native_states(base, inputs).flatten(0, 1).index_select(0, inputs["kept"])


class FastPhi4Layer(FastLayer, Phi4MultimodalDecoderLayer):
    """Language model layer on samples laid end to end."""

    def forward(self, hidden_states: Any, *args: Any, routes: Routes | None = None, **kwargs: Any) -> Any:
        """Native without `routes`; with them (N, D) in and out."""
        if routes is None:
            return super().forward(hidden_states, *args, **kwargs)
        heads: Any = self.self_attn
        groups = heads.num_key_value_heads
        sizes = (groups * heads.num_key_value_groups, groups, groups)
        mixed_ND = self.normed(self.input_layernorm, hidden_states)
        qkv = linear(heads.qkv_proj, mixed_ND).unflatten(-1, (-1, heads.head_dim))
        q, k, v = qkv.split(sizes, 1)
        q, k = (x.to(v.dtype) for x in rope(q, k, *routes.rotation))
        attended_ND = attend(q, k, v, routes.segments).flatten(1)
        if routes.kept is not None:
            attended_ND, hidden_states = (x.index_select(0, routes.kept) for x in (attended_ND, hidden_states))
        hidden_states = hidden_states + self.resid_attn_dropout(linear(heads.o_proj, attended_ND))
        mixed_ND = self.normed(self.post_attention_layernorm, hidden_states)
        gate, up = linear(self.mlp.gate_up_proj, mixed_ND).chunk(2, -1)
        down = linear(self.mlp.down_proj, silu_mul(gate, up, self.kernels))
        return hidden_states + self.resid_mlp_dropout(down)


FAST_LAYERS: dict[type[nn.Module], type[FastLayer]] = {Phi4MultimodalDecoderLayer: FastPhi4Layer}

"""The forward pass of Higgs Audio v2 up to the heads, native or fast, where a target is and nowhere else.

Shapes: B samples, S positions, P positions that carry a target, D hidden size.
"""

from typing import Any, cast

import torch
from torch import nn
from transformers.models.higgs_audio_v2.modeling_higgs_audio_v2 import HiggsAudioV2DecoderLayer

from speechtune.families.layers.decoder import FastLayer, Routes, Sorting, is_fast, native_inputs, run_layers
from speechtune.families.layers.kernels import rope, silu_mul
from speechtune.families.layers.ops import attend, linear, reorder
from speechtune.types import Batch


def target_states(decoder: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states that predict the targets of a batch: (P, D) for the audio head, (P, D) for the text head.

    `decoder` is the `model` of the native class, its layers native or fast.
    """
    inputs = batch.inputs
    if is_fast(decoder):
        hidden = (decoder.embed_audio_tokens(inputs["audio_rows"]), decoder.embed_tokens(inputs["text_ids"]))
        sorting = Sorting(*(inputs[name] for name in ("order", "places", "kept_audio", "kept_text")))
        states_PD = decoder.norm(torch.cat(run_layers(decoder, hidden, batch, sorting)))
    else:
        ids = {"input_ids": inputs["input_ids"], "audio_input_ids": inputs["audio_rows"][None]}
        hidden_BSD = decoder(**ids, use_cache=False, **native_inputs(inputs)).last_hidden_state
        states_PD = hidden_BSD.flatten(0, 1)[inputs["kept"]]
    audio_PD, text_PD = states_PD.split((len(inputs["audio_targets"]), len(inputs["text_targets"])))
    return audio_PD, text_PD


class FastHiggsLayer(FastLayer, HiggsAudioV2DecoderLayer):
    """Dual-FFN layer on (audio, text) tensors; the native one finds the audio by boolean masks six times a layer."""

    def forward(self, hidden_states: Any, *args: Any, routes: Routes | None = None, **kwargs: Any) -> Any:
        """Native without `routes`; with them a pair of tensors (A, D), (T, D) in and out."""
        if routes is None or routes.sorting is None:
            return super().forward(hidden_states, *args, **kwargs)
        (audio_AD, text_TD), sorting = hidden_states, routes.sorting
        heads = cast(Any, self.self_attn)
        norms = ((self.audio_input_layernorm, audio_AD), (self.input_layernorm, text_TD))
        mixed_ND = torch.cat([self.normed(norm, x) for norm, x in norms])
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
        x = self.normed(norm, x)
        return linear(mlp.down_proj, silu_mul(linear(mlp.gate_proj, x), linear(mlp.up_proj, x), self.kernels))


FAST_LAYERS: dict[type[nn.Module], type[FastLayer]] = {HiggsAudioV2DecoderLayer: FastHiggsLayer}

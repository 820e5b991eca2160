"""The forward pass of Higgs Audio v2 up to the heads, native or fast, where a target is and nowhere else.

Shapes: B samples, S positions, P positions that carry a target, D hidden size.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from speechtune.families.base import Batch
from speechtune.families.fast import Segments
from speechtune.families.fast_layers import Routes, Sorting, block_causal_mask, is_fast, rotation_of, run_layers


def target_states(decoder: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states that predict the targets of a batch: (P, D) for the audio head, (P, D) for the text head.

    Args:
        decoder: the `model` of the native class, its layers native or fast.
        batch: of `HiggsAudioV2Family.collate`.
    """
    inputs = batch.inputs
    states_PD = _fast(cast(Any, decoder), batch) if is_fast(decoder) else _native(decoder, batch)
    audio_PD, text_PD = states_PD.split((len(inputs["audio_targets"]), len(inputs["text_targets"])))
    return audio_PD, text_PD


def _native(decoder: nn.Module, batch: Batch) -> torch.Tensor:
    inputs = batch.inputs
    if "attention_mask" in inputs:
        places = {"attention_mask": inputs["attention_mask"]}
    else:
        places = {"attention_mask": block_causal_mask(batch), "position_ids": inputs["position_ids"][None]}
    rows_1AK = inputs["audio_rows"][None]
    hidden_BSD = decoder(
        input_ids=inputs["input_ids"], audio_input_ids=rows_1AK, use_cache=False, **places
    ).last_hidden_state
    return hidden_BSD.flatten(0, 1)[inputs["kept"]]


def _fast(decoder: Any, batch: Batch) -> torch.Tensor:
    inputs = batch.inputs
    hidden = (decoder.embed_audio_tokens(inputs["audio_rows"]), decoder.embed_tokens(inputs["text_ids"]))
    rotation = rotation_of(decoder, hidden[0], inputs["position_ids"])
    sorting = Sorting(*(inputs[name] for name in ("order", "places", "kept_audio", "kept_text")))
    routes = Routes(Segments.of(batch), rotation, inputs["kept"], sorting)
    return decoder.norm(torch.cat(run_layers(decoder, hidden, routes)))

"""Decoder layers with a forward pass of their own, the one place where they take the native ones', and their batches.

A fast layer is the native layer, module by module and weight by weight; given `Routes` it computes the same on samples
laid end to end, without them it is the native layer still (generation goes that way).

Shapes: N positions laid end to end, A of them audio rows and T text, D hidden size, P positions that carry a target.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn

from speechtune.families.layers.kernels import Kernels, rms_norm
from speechtune.families.layers.ops import Segments
from speechtune.types import Batch

Layout = Literal["packed", "right", "left"]
"""Samples end to end, or padded on a side."""


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


class FastLayer(nn.Module):
    """Base of the families' fast layers; each also inherits the native layer that it takes the place of."""

    kernels: Kernels = "torch"

    def normed(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, norm.weight, norm.variance_epsilon, self.kernels)


def make_fast(
    model: nn.Module, fast_layers: Mapping[type[nn.Module], type[FastLayer]], kernels: Kernels = "torch"
) -> nn.Module:
    """Let the decoder layers of a loaded model be those that a family's table has for their native classes.

    Layers with dropout in their attention, or with another activation than SiLU, stay native.
    """
    for module in model.modules():
        fast, layer = fast_layers.get(type(module)), cast(Any, module)
        if fast is not None and not layer.self_attn.attention_dropout and layer.self_attn.config.hidden_act == "silu":
            layer.__class__, layer.kernels = fast, kernels
    return model


def is_fast(decoder: nn.Module) -> bool:
    """True if the layers of a decoder take `Routes`."""
    return isinstance(cast(Any, decoder).layers[0], FastLayer)


def run_layers(decoder: Any, hidden: Any, batch: Batch, sorting: Sorting | None = None) -> Any:
    """All layers of a decoder on a batch laid end to end; the last one goes on with the positions `kept` alone.

    `hidden` is one tensor (N, D), with `sorting` the pair (A, D), (T, D).
    """
    inputs = batch.inputs
    segments = Segments(batch.lengths, inputs["offsets"])
    cos_1NE, sin_1NE = decoder.rotary_emb(hidden[0] if sorting else hidden, inputs["position_ids"][None])
    routes = Routes(segments, (cos_1NE[0], sin_1NE[0]), None, sorting)
    for layer in decoder.layers[:-1]:
        hidden = layer(hidden, routes=routes)
    routes = replace(routes, segments=segments.needed(inputs["kept"]), kept=inputs["kept"])
    return decoder.layers[-1](hidden, routes=routes)


def native_inputs(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What native attention needs: the mask of a padded batch, the block-causal mask and the positions of a packed one.

    The latter mask is bool (1, 1, N, N): each position sees its sample's past.
    """
    if "attention_mask" in inputs:
        return {"attention_mask": inputs["attention_mask"]}
    positions_N = inputs["position_ids"]
    sample_N = (positions_N == 0).cumsum(0)
    causal_NN = torch.ones(len(sample_N), len(sample_N), dtype=torch.bool, device=sample_N.device).tril()
    mask_NN = causal_NN & (sample_N[:, None] == sample_N)
    return {"attention_mask": mask_NN[None, None], "position_ids": positions_N[None]}


def place_ids(
    ids: Sequence[np.ndarray], pad_id: int, layout: Layout
) -> tuple[dict[str, np.ndarray], list[int], tuple[int, ...]]:
    """Put the ids of all samples into one array.

    Returns:
        `input_ids` (1, N) or (B, S), `position_ids` (N,), the `offsets` between samples (B + 1,) and, where they are
        padded, an `attention_mask`; the place of each sample's first id in the flattened batch; the positions that
        each sample takes, padding included.
    """
    sizes = [len(ids_S) for ids_S in ids]
    lengths = sizes if layout == "packed" else [max(sizes)] * len(sizes)
    offsets = np.cumsum([0, *lengths])
    starts = [int(o) + (n - s if layout == "left" else 0) for o, n, s in zip(offsets, lengths, sizes, strict=False)]
    ids_N, real_N = np.full(offsets[-1], pad_id, np.int64), np.zeros(offsets[-1], np.int64)
    for start, ids_S in zip(starts, ids, strict=True):
        ids_N[start : start + len(ids_S)], real_N[start : start + len(ids_S)] = ids_S, 1
    arrays = {
        "input_ids": ids_N.reshape(1 if layout == "packed" else len(ids), -1),
        "position_ids": np.concatenate([np.arange(length) for length in lengths]),
        "offsets": offsets.astype(np.int32),
    }
    if layout != "packed":
        arrays["attention_mask"] = real_N.reshape(len(ids), -1)
    return arrays, starts, tuple(lengths)

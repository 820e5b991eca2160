"""Decoder layers with a forward pass of their own, and the one place where they take the native ones' place.

A fast layer is the native layer, module by module and weight by weight; given `Routes` it computes the same on samples
laid end to end, without them it is the native layer still (generation goes that way).

Shapes: N positions laid end to end, A of them audio rows and T text, D hidden size, P positions that carry a target.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from speechtune.families.layers.kernels import Kernels, rms_norm
from speechtune.families.layers.ops import Segments
from speechtune.types import Batch


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


def norm_by(norm: Any, x: torch.Tensor, kernels: Kernels) -> torch.Tensor:
    return rms_norm(x, norm.weight, norm.variance_epsilon, kernels)


def make_fast(
    model: nn.Module, fast_layers: Mapping[type[nn.Module], type[FastLayer]], kernels: Kernels = "torch"
) -> nn.Module:
    """Let the decoder layers of a loaded model be fast ones.

    Args:
        model: the base, on its device.
        fast_layers: the family's table, native layer class -> fast layer class.
        kernels: what computes norms and gated units.

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

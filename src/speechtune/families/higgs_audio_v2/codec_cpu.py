"""The native codec's layers on a CPU in float32: the same sums in another order, by faster kernels.

torch hands linear layers to MKL, whose kernels for processors of other makers than Intel stop at AVX2, and
convolutions to oneDNN in a layout that costs some of them half their speed. Here oneDNN gets both, with time before
channels: that is its fastest layout, and linear layers take it without a copy. Where values are many and cheap (24,000
steps a second times 64 channels) the work goes in pieces that stay in a core's cache: threads side by side share the
way to memory.

Names of tensors end in their dimensions: T time, C channels, I channels in, W values in a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

OPERATORS = ("_linear_pointwise", "_convolution_pointwise", "_reorder_convolution_weight")  # those of compiled code
CHUNK_VALUES = 2**15  # 128 KiB of float32: stays in a core's cache over five passes
TILE_VALUES, TILE_STEPS = 2**18, 1024  # a residual unit's piece: 1 MiB, and enough steps for one reading of the weights
PACKED_STEPS = 512  # weights are laid out for inputs about so long; the layout serves others too

Forward = Callable[[torch.Tensor], torch.Tensor]


def is_available() -> bool:
    """Whether torch has oneDNN and the operators that compiled code calls on CPUs."""
    mkldnn = torch.backends.mkldnn
    enabled: Any = mkldnn.enabled
    return bool(mkldnn.is_available() and enabled and all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS))


def fold_weight_norms(modules: Iterable[nn.Module]) -> None:
    """Compute normed weights once; native layers compute them in every call."""
    for module in modules:
        if is_parametrized(module, "weight"):
            remove_parametrizations(module, "weight", leave_parametrized=True)


def use_faster_layers(modules: Iterable[nn.Module]) -> None:
    """Give layers in evaluation mode, without parametrizations, forwards for one clip on one thread.

    Batches of several still take the native forwards. To be called with one thread, as the layers are: how a weight is
    laid out may depend on the number of threads, and the order of sums on the layout.
    """
    for module in modules:
        faster = _faster_forward(module)
        if faster is not None:
            module.forward = partial(_forward, module, faster)  # pyright: ignore[reportAttributeAccessIssue]


def _forward(module: nn.Module, faster: Forward, values: torch.Tensor) -> torch.Tensor:
    alone = len(values) == 1 and values.dtype == torch.float32
    return faster(values) if alone else type(module).forward(module, values)


def _faster_forward(module: Any) -> Forward | None:
    name = type(module).__name__
    gelu = type(getattr(module, "activation", None)).__name__ == "GELUActivation"
    if type(module) is nn.Linear:
        return partial(_linear, weight_OI=module.weight, bias=module.bias)
    if type(module) is nn.Conv1d:
        return _faster_convolution(module)
    if name == "Snake1d":
        return partial(_snake, module)
    if name == "DacResidualUnit":
        return partial(_residual_unit, module, _packed_convolution(module.conv1, padding=0))
    if name == "HubertGroupNormConvLayer" and gelu and module.conv.in_channels == 1:
        return partial(_normed_layer, module)
    if name == "HubertNoLayerNormConvLayer" and gelu:
        return partial(_on_time_first, _packed_convolution(module.conv, module.conv.padding[0], "gelu"))
    return None


def _faster_convolution(conv: nn.Conv1d) -> Forward:
    if conv.in_channels == 1 and conv.dilation == (1,):
        return partial(_convolution_of_one_channel, conv)
    if conv.kernel_size == conv.stride == (1,) and conv.groups == 1:
        return partial(_on_time_first, partial(_linear, weight_OI=conv.weight[:, :, 0], bias=conv.bias))
    return partial(_on_time_first, _packed_convolution(conv, int(conv.padding[0])))


def _time_first(values_1CT: torch.Tensor) -> torch.Tensor:
    """(T, C), contiguous; a copy unless the values were computed time first."""
    return values_1CT[0].T.contiguous()


def _on_time_first(work: Forward, values_1CT: torch.Tensor) -> torch.Tensor:
    return work(_time_first(values_1CT)).T[None]


def _linear(
    values: torch.Tensor, weight_OI: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"
) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(values, weight_OI, bias, activation, [], "none")


def _packed_convolution(conv: nn.Conv1d, padding: int, activation: str = "none") -> Forward:
    """The convolution of values (T, I), its weight laid out once as the kernel wants it."""
    sizes = ((0, padding), (1, *conv.stride), (1, *conv.dilation), conv.groups)
    weight = conv.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    input_size = (1, conv.in_channels, 1, PACKED_STEPS)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, input_size)
    return partial(_convolve, packed, conv.bias, sizes, activation)


def _convolve(
    packed: torch.Tensor, bias: torch.Tensor | None, sizes: tuple[Any, ...], activation: str, values_TI: torch.Tensor
) -> torch.Tensor:
    values_1I1T = values_TI.T[None, :, None]
    convolved = torch.ops.mkldnn._convolution_pointwise(values_1I1T, packed, bias, *sizes, activation, [], "none")
    return convolved[0, :, 0].T


def _windows(conv: nn.Conv1d, wave_11T: torch.Tensor) -> torch.Tensor:
    """What a convolution of one channel sums over, (T, W)."""
    (padding,), (size,), (stride,) = conv.padding, conv.kernel_size, conv.stride
    return functional.pad(wave_11T[0, 0], (int(padding), int(padding))).unfold(0, size, stride).contiguous()


def _convolution_of_one_channel(conv: nn.Conv1d, wave_11T: torch.Tensor) -> torch.Tensor:
    """As a product: the kernels of convolutions leave most of a vector empty where there is one channel."""
    return _linear(_windows(conv, wave_11T), conv.weight[:, 0], conv.bias).T[None]


def _normed_layer(layer: Any, wave_11T: torch.Tensor) -> torch.Tensor:
    """Convolution of one channel, norm of each channel over time and activation, in one pass over the result.

    Mean and variance of every channel follow from those of the windows: for weights w, w mean and w covariance w^T. So
    the norm becomes a factor on the weights, and a bias. A bias of the convolution itself would be taken away again.
    """
    windows_TW = _windows(layer.conv, wave_11T)
    weight_CW, norm = layer.conv.weight[:, 0].double(), layer.layer_norm
    mean_W = windows_TW.mean(0, dtype=torch.float64)
    centred_TW = windows_TW - mean_W
    covariance_WW = centred_TW.T @ centred_TW / len(windows_TW)
    variance_C = ((weight_CW @ covariance_WW) * weight_CW).sum(1)
    factor_C = norm.weight * (variance_C + norm.eps).rsqrt()
    bias_C = norm.bias - factor_C * (weight_CW @ mean_W)
    return _linear(windows_TW, (factor_C[:, None] * weight_CW).float(), bias_C.float(), "gelu").T[None]


def _snake(module: Any, values_1CT: torch.Tensor) -> torch.Tensor:
    """In the place of its input, which nothing else in the codec reads."""
    values_TC = _time_first(values_1CT)
    _snake_into(values_TC, module, values_TC)
    return values_TC.T[None]


def _snake_into(result_TC: torch.Tensor, module: Any, values_TC: torch.Tensor) -> None:
    """x + sin^2(alpha * x) / alpha, with the operations of the native class in their order."""
    alpha_1C = module.alpha[:, :, 0]
    inverse_1C = (alpha_1C + 1e-9).reciprocal()
    steps = max(1, CHUNK_VALUES // values_TC.shape[1])
    for values, result in zip(values_TC.split(steps), result_TC.split(steps), strict=True):
        periodic = torch.mul(values, alpha_1C).sin_().square_().mul_(inverse_1C)
        torch.add(values, periodic, out=result)


def _residual_unit(unit: Any, convolve: Forward, values_1CT: torch.Tensor) -> torch.Tensor:
    """Snake, convolution, snake, 1x1 convolution, sum: piece by piece, in the place of the input.

    `halo` is what the convolution sees on either side. The buffer holds the activated steps of a piece with both halos;
    the next piece begins with its last two, whose inputs are overwritten or about to be.
    """
    values_TC = _time_first(values_1CT)
    length, channels = values_TC.shape
    halo = int(unit.conv1.padding[0])
    steps = min(length, max(TILE_VALUES // channels, TILE_STEPS))
    buffer_TC = values_TC.new_zeros(steps + 2 * halo, channels)
    _snake_into(buffer_TC[halo : 2 * halo][:length], unit.snake1, values_TC[:halo])
    for start in range(0, length, steps):
        piece_TC, ahead_TC = values_TC[start : start + steps], values_TC[start + halo : start + steps + halo]
        _snake_into(buffer_TC[2 * halo :][: len(ahead_TC)], unit.snake1, ahead_TC)
        buffer_TC[2 * halo + len(ahead_TC) :] = 0
        convolved_TC = convolve(buffer_TC[: len(piece_TC) + 2 * halo])
        _snake_into(convolved_TC, unit.snake2, convolved_TC)
        piece_TC += _linear(convolved_TC, unit.conv2.weight[:, :, 0], unit.conv2.bias)
        if start + steps < length:
            buffer_TC[: 2 * halo] = buffer_TC[steps:].clone()
    return values_TC.T[None]

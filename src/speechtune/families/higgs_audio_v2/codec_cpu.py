"""Layers of the codec for encoding and decoding on a CPU in float32: the native sums in another order, by oneDNN.

torch hands linear layers to MKL, whose kernels for processors of other makers than Intel stop at AVX2, and
convolutions to oneDNN in a layout that costs some of them half their speed. Here oneDNN gets both, with time before
channels: that is its fastest layout, and linear layers take it without a copy. Where values are many and cheap (24,000
steps a second times 64 channels) the work goes in pieces that stay in a core's cache: threads side by side share the
way to memory.

Names of tensors end in their dimensions: T time, C channels, I channels in, W values in a window.
"""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from transformers.activations import GELUActivation
from transformers.models.dac.modeling_dac import DacResidualUnit, Snake1d
from transformers.models.hubert.modeling_hubert import HubertGroupNormConvLayer, HubertNoLayerNormConvLayer

OPERATORS = ("_linear_pointwise", "_convolution_pointwise", "_reorder_convolution_weight")  # those of compiled code
CHUNK_VALUES = 2**15  # 128 KiB of float32: stays in a core's cache over five passes
TILE_VALUES, TILE_STEPS = 2**18, 1024  # a residual unit's piece: 1 MiB, and enough steps for one reading of the weights
PACKED_STEPS = 512  # weights are laid out for inputs about so long; the layout serves others too


def is_available() -> bool:
    """Whether torch has oneDNN and the operators that compiled code calls on CPUs."""
    mkldnn = torch.backends.mkldnn
    enabled = cast(Any, mkldnn).enabled
    return bool(mkldnn.is_available() and enabled and all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS))


def fold_weight_norms(modules: Iterable[nn.Module]) -> None:
    """Compute normed weights once; native layers compute them in every call."""
    for module in modules:
        if is_parametrized(module, "weight"):
            remove_parametrizations(module, "weight", leave_parametrized=True)


def use_clip_layers(modules: Iterable[nn.Module]) -> None:
    """Turn layers in evaluation mode, without parametrizations, into those below, where there is one.

    To be called with one thread, as the layers are: how a weight is laid out may depend on the number of threads, and
    the order of sums on the layout.
    """
    for module in modules:
        clip_class = _clip_class(module)
        if clip_class is not None:
            module.__class__ = clip_class
            if isinstance(module, ClipLayer):
                module.lay_out()


def _clip_class(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is nn.Conv1d:
        if module.in_channels == 1 and module.dilation == (1,):
            return OneChannelConvolution
        pointwise = module.kernel_size == module.stride == (1,) and module.groups == 1
        return PointwiseConvolution if pointwise else Convolution
    if isinstance(module, HubertGroupNormConvLayer | HubertNoLayerNormConvLayer):
        if type(module.activation) is not GELUActivation:
            return None
        if isinstance(module, HubertNoLayerNormConvLayer):
            return GeluConvolution
        return NormedConvolution if module.conv.in_channels == 1 else None
    classes = {nn.Linear: Linear, Snake1d: Snake, DacResidualUnit: ResidualUnit}
    return classes.get(type(module))


def _is_one_clip(values: torch.Tensor) -> bool:
    return len(values) == 1 and values.dtype == torch.float32


class Linear(nn.Linear):
    """Linear layer."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _linear(input, self.weight, self.bias) if _is_one_clip(input) else super().forward(input)


class ClipLayer(nn.Module):
    """Base of layers that compute one clip their own way; of a batch of several they are the native layer."""

    def lay_out(self) -> None:
        """Lay out weights once, where a kernel wants them in a layout of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the native layer, (1, C, T)."""
        one_clip = _is_one_clip(args[0])
        return self.forward_clip(args[0][0].T).T[None] if one_clip else super().forward(*args, **kwargs)

    def forward_clip(self, values_TC: torch.Tensor) -> torch.Tensor:
        """Time before channels, in and out."""
        raise NotImplementedError


class PointwiseConvolution(ClipLayer, nn.Conv1d):
    """Convolution with windows of one step, which is a linear layer."""

    def forward_clip(self, values_TC: torch.Tensor) -> torch.Tensor:
        return _linear(values_TC.contiguous(), self.weight[:, :, 0], self.bias)


class OneChannelConvolution(ClipLayer, nn.Conv1d):
    """Convolution of one channel as a product: the kernels of convolutions leave most of a vector empty there."""

    def forward_clip(self, values_TC: torch.Tensor) -> torch.Tensor:
        return _linear(_windows(self, values_TC), self.weight[:, 0], self.bias)


class Convolution(ClipLayer, nn.Conv1d):
    """Any other convolution."""

    def lay_out(self) -> None:
        self.convolve = _packed_convolution(self, int(self.padding[0]))

    def forward_clip(self, values_TC: torch.Tensor) -> torch.Tensor:
        return self.convolve(values_TC.contiguous())


class GeluConvolution(ClipLayer, HubertNoLayerNormConvLayer):
    """Convolution and activation in one call."""

    def lay_out(self) -> None:
        self.convolve = _packed_convolution(self.conv, int(self.conv.padding[0]), "gelu")

    def forward_clip(self, values_TC: torch.Tensor) -> torch.Tensor:
        return self.convolve(values_TC.contiguous())


class NormedConvolution(ClipLayer, HubertGroupNormConvLayer):
    """Convolution of one channel, norm of each channel over time and activation, in one pass over the result.

    Mean and variance of every channel follow from those of the windows: for weights w, w mean and w covariance w^T. So
    the norm becomes a factor on the weights, and a bias. A bias of the convolution itself would be taken away again.
    """

    def forward_clip(self, values_TC: torch.Tensor) -> torch.Tensor:
        windows_TW = _windows(self.conv, values_TC)
        weight_CW, norm = self.conv.weight[:, 0].double(), self.layer_norm
        mean_W = windows_TW.mean(0, dtype=torch.float64)
        centred_TW = windows_TW - mean_W
        covariance_WW = centred_TW.T @ centred_TW / len(windows_TW)
        variance_C = ((weight_CW @ covariance_WW) * weight_CW).sum(1)
        factor_C = norm.weight * (variance_C + norm.eps).rsqrt()
        bias_C = norm.bias - factor_C * (weight_CW @ mean_W)
        return _linear(windows_TW, (factor_C[:, None] * weight_CW).float(), bias_C.float(), "gelu")


class Snake(ClipLayer, Snake1d):
    """x + sin^2(alpha * x) / alpha, in the place of its input, which nothing else in the codec reads."""

    def forward_clip(self, values_TC: torch.Tensor) -> torch.Tensor:
        values_TC = values_TC.contiguous()
        _snake_into(values_TC, self.alpha, values_TC)
        return values_TC


class ResidualUnit(ClipLayer, DacResidualUnit):
    """Snake, convolution, snake, 1x1 convolution, sum: piece by piece, in the place of the input."""

    def lay_out(self) -> None:
        self.convolve = _packed_convolution(self.conv1, padding=0)

    def forward_clip(self, values_TC: torch.Tensor) -> torch.Tensor:
        """The buffer holds the activated steps of a piece with a halo, what the convolution sees, on either side.

        The next piece begins with its last two halos, whose inputs are overwritten or about to be.
        """
        values_TC = values_TC.contiguous()
        length, channels = values_TC.shape
        halo = int(self.conv1.padding[0])
        steps = min(length, max(TILE_VALUES // channels, TILE_STEPS))
        buffer_TC = values_TC.new_zeros(steps + 2 * halo, channels)
        _snake_into(buffer_TC[halo : 2 * halo][:length], self.snake1.alpha, values_TC[:halo])
        for start in range(0, length, steps):
            piece_TC, ahead_TC = values_TC[start : start + steps], values_TC[start + halo : start + steps + halo]
            _snake_into(buffer_TC[2 * halo :][: len(ahead_TC)], self.snake1.alpha, ahead_TC)
            buffer_TC[2 * halo + len(ahead_TC) :] = 0
            convolved_TC = self.convolve(buffer_TC[: len(piece_TC) + 2 * halo])
            _snake_into(convolved_TC, self.snake2.alpha, convolved_TC)
            piece_TC += _linear(convolved_TC, self.conv2.weight[:, :, 0], self.conv2.bias)
            if start + steps < length:
                buffer_TC[: 2 * halo] = buffer_TC[steps:].clone()
        return values_TC


def _linear(
    values: torch.Tensor, weight_OI: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"
) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(values, weight_OI, bias, activation, [], "none")


def _packed_convolution(
    conv: nn.Conv1d, padding: int, activation: str = "none"
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The convolution of values (T, I), its weight laid out once as the kernel wants it."""
    sizes = ((0, padding), (1, *conv.stride), (1, *conv.dilation), conv.groups)
    weight = conv.weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    input_size = (1, conv.in_channels, 1, PACKED_STEPS)
    packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, input_size)

    def convolve(values_TI: torch.Tensor) -> torch.Tensor:
        values_1I1T = values_TI.T[None, :, None]
        options = (*sizes, activation, [], "none")
        return torch.ops.mkldnn._convolution_pointwise(values_1I1T, packed, conv.bias, *options)[0, :, 0].T

    return convolve


def _windows(conv: nn.Conv1d, wave_T1: torch.Tensor) -> torch.Tensor:
    """What a convolution of one channel sums over, (T, W)."""
    (padding,), (size,), (stride,) = conv.padding, conv.kernel_size, conv.stride
    return functional.pad(wave_T1[:, 0], (int(padding), int(padding))).unfold(0, size, stride).contiguous()


def _snake_into(result_TC: torch.Tensor, alpha_1C1: torch.Tensor, values_TC: torch.Tensor) -> None:
    """The snake, with the operations of the native class in their order."""
    alpha_1C = alpha_1C1[:, :, 0]
    inverse_1C = (alpha_1C + 1e-9).reciprocal()
    steps = max(1, CHUNK_VALUES // values_TC.shape[1])
    for values, result in zip(values_TC.split(steps), result_TC.split(steps), strict=True):
        periodic = torch.mul(values, alpha_1C).sin_().square_().mul_(inverse_1C)
        torch.add(values, periodic, out=result)

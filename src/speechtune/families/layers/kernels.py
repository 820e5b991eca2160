"""Norm, gated unit and rotary embedding of the decoders, in plain torch or with Liger's kernels.

The arithmetic is that of transformers' native classes: the norm in float32, everything else in the dtype of its input.
Fewer passes over memory round less often, so the results differ from the native ones by rounding alone.

Of Liger (https://github.com/linkedin/Liger-Kernel) the norm and the gated unit are used. Its rotary embedding writes
into queries and keys without autograd's knowledge, and the two passes below cost little; it is left out.
"""

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import nn

from speechtune.config import SpeedConfig
from speechtune.errors import ConfigError

Kernels = Literal["torch", "compiled", "liger"]


def choose_kernels(speed: SpeedConfig, device: torch.device) -> Kernels:
    """The kernels that `speed.liger` and `speed.compile` ask for.

    Raises ConfigError: Liger on a device other than a GPU, or not installed.
    """
    if not speed.liger:
        return "compiled" if speed.compile else "torch"
    if device.type != "cuda":
        raise ConfigError(
            f"speed.liger: Liger's kernels need a GPU, this run is on {device.type}; set speed.liger=false"
        )
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("speed.liger: Liger is not installed; pip install 'speechtune[liger]', or speed.liger=false")
    return "liger"


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float, kernels: Kernels = "torch") -> torch.Tensor:
    """Root mean square norm over the last dimension (arXiv 1910.07467), computed in float32, in `hidden`'s dtype.

    torch's norm, fused where torch has it or by torch.compile, rounds once; Liger's before the weight too, as the
    native class does.
    """
    if kernels == "compiled":
        return _compiled(rms_norm)(hidden, weight, eps)
    if kernels == "liger":
        # Not in place: the gradient it would write into may be another node's too.
        return _liger()[0].apply(hidden, weight, eps, 0.0, "llama", False)
    if not hidden.is_cuda and hidden.dtype == weight.dtype == torch.float32 and not weight.requires_grad:
        return cast(torch.Tensor, _FrozenNorm.apply(hidden, weight, eps))
    # CUDA's autocast would copy the input to float32, and hand on float32; the norm computes in it anyway.
    with torch.autocast("cuda", enabled=False) if hidden.is_cuda else nullcontext():
        return nn.functional.rms_norm(hidden, weight.shape, weight, eps).to(hidden.dtype)


class _FrozenNorm(torch.autograd.Function):
    """The norm in float32 with a weight that is not trained; torch fuses it on GPUs only."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        scale = length.square_().div_(hidden.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(hidden, weight, scale)
        return (hidden * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, scale = ctx.saved_tensors
        grad = grad * weight
        along = torch.linalg.vecdot(grad, hidden)[..., None].mul_(scale**3).div_(hidden.shape[-1])
        return grad.mul_(scale).addcmul_(hidden, along, value=-1), None, None


def silu_mul(gate: torch.Tensor, up: torch.Tensor, kernels: Kernels = "torch") -> torch.Tensor:
    """silu(gate) * up, the gated unit's activation (arXiv 2002.05202).

    Liger keeps no silu(gate) for the backward pass, a third less, and writes the gradients into the memory of `gate`
    and `up`: they must not be used again. Halves of one tensor are copied first.
    """
    if kernels == "compiled":
        return _compiled(silu_mul)(gate, up)
    return _liger()[1].apply(gate, up) if kernels == "liger" else nn.functional.silu(gate) * up


def rope(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embedding (arXiv 2104.09864) of queries and keys with their heads at dimension 1, in two passes.

    `cos` and `sin` are (..., R) without the heads, R <= D even, their halves alike, and get no gradient; entries from R
    on pass as they are.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _Rotate.apply(query, cos, sin), _Rotate.apply(key, cos, sin)  # pyright: ignore[reportReturnType]


class _Rotate(torch.autograd.Function):
    """The gradient of a rotation is the rotation back."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(cos, sin)
        return _rotated(hidden, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
    width, half = cos.shape[-1], cos.shape[-1] // 2
    result = torch.empty_like(hidden)
    torch.mul(hidden[..., :width], cos, out=result[..., :width])
    result[..., :half].addcmul_(hidden[..., half:width], sin[..., :half], value=-direction)
    result[..., half:width].addcmul_(hidden[..., :half], sin[..., half:], value=direction)
    if width < hidden.shape[-1]:
        result[..., width:] = hidden[..., width:]
    return result


@cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """One graph for all lengths: a packed batch hardly ever has that of the one before."""
    return torch.compile(function, dynamic=True)


@cache
def _liger() -> tuple[Any, Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction  # pyright: ignore[reportMissingImports]

    return cast(Any, LigerRMSNormFunction), cast(Any, LigerSiLUMulFunction)

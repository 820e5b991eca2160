"""Building blocks of the fast forward passes: attention, linear layers with LoRA, and the loss of a head.

Each piece computes what the native layers compute, within rounding, with less of it done: attention inside each sample
of a packed or padded batch without a mask, LoRA without intermediate results, cross-entropy without stored logits.

Shapes: N positions of a batch laid end to end, H query heads, G key heads, E head width, D hidden size, P positions
that carry a target, K labels of a position, V classes, r LoRA rank.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any, Self, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional

from speechtune.families.layers.cpu import MOST_POSITIONS, causal_attention, product

IGNORE = -100
LOGITS_PER_CHUNK = 2**20  # of the cross-entropy: 4 MB on a CPU, near its caches
LOGITS_PER_GPU_CHUNK = 2**27


@dataclass(frozen=True, slots=True)
class Segments:
    """The samples of a batch laid end to end: N positions, attention within each.

    Attributes:
        lengths: positions of each sample, known on the CPU so that nothing waits for a device.
        offsets: int32 tensor (number of samples + 1,) on the device: where each starts, and the end.
        first: the first position of each sample whose result is needed; not used on a GPU.
    """

    lengths: tuple[int, ...]
    offsets: torch.Tensor
    first: tuple[int, ...] = ()

    def needed(self, kept: torch.Tensor) -> Self:
        """The same where only the positions `kept` are needed; on a GPU as they are, since asking would wait for it."""
        if not kept.is_cpu:
            return self
        starts, ends = self.offsets[:-1].long(), self.offsets[1:].long()
        owners = torch.bucketize(kept, ends, right=True)
        first = ends.clone().scatter_reduce(0, owners, kept, "amin") - starts
        return replace(self, first=tuple(first.tolist()))


def attend(q_NHE: torch.Tensor, k_NGE: torch.Tensor, v_NGE: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Causal attention within each segment; returns (N, H, E).

    On a GPU in half precision one call of torch's variable-length kernel (torch >= 2.10), on a CPU in float32 blocks of
    plain products, elsewhere one call of scaled_dot_product_attention per run of segments of one length.
    """
    if q_NHE.is_cuda and q_NHE.dtype in (torch.float16, torch.bfloat16) and (kernel := _varlen_kernel()) is not None:
        return kernel(q_NHE, k_NGE, v_NGE, segments.offsets, max(segments.lengths))
    if not q_NHE.is_cuda and q_NHE.dtype == torch.float32 and max(segments.lengths) <= MOST_POSITIONS:
        parts = (x.split(list(segments.lengths)) for x in (q_NHE, k_NGE, v_NGE))
        first = segments.first or (0,) * len(segments.lengths)
        outputs = [causal_attention(*heads) for heads in zip(*parts, first, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    outputs: list[torch.Tensor] = []
    sizes = [(len(list(run)), length) for length, run in groupby(segments.lengths)]
    for q, k, v, (count, length) in zip(
        *(x.split([count * length for count, length in sizes]) for x in (q_NHE, k_NGE, v_NGE)), sizes, strict=True
    ):
        heads = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        out_BHSE = functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(out_BHSE.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@cache
def _varlen_kernel() -> Callable[..., torch.Tensor] | None:
    """Torch's variable-length attention behind one signature; it came with 2.10 and changed its own in 2.11."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    if "enable_gqa" in known:
        options["enable_gqa"] = True

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, longest: int) -> torch.Tensor:
        if "enable_gqa" not in known:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return cast(torch.Tensor, varlen_attn(q, k, v, offsets, offsets, longest, longest, **options))

    return kernel


class _Reorder(torch.autograd.Function):
    """A permutation of rows; the gradient comes back by the inverse, where index_select would add row by row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


def reorder(x: torch.Tensor, order_N: torch.Tensor, inverse_N: torch.Tensor) -> torch.Tensor:
    """Rows of `x` in another order; `inverse_N` is the order that leads back."""
    return cast(torch.Tensor, _Reorder.apply(x, order_N, inverse_N))


class _LoraLinear(torch.autograd.Function):
    """x W^T + s (x A^T) B^T for a frozen W, with the sums taken inside the products.

    In float32 as x (W + s B A)^T: adding the adapter to W costs r additions a weight, adding it to the output r a
    position and channel, in the forward pass and again in the backward pass. In half precision W would lose the
    adapter's digits, and x A^T is kept instead.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        ctx.scaling = scaling
        if x.dtype == torch.float32:
            ctx.save_for_backward(x, w, a, b)
            return product(x, torch.addmm(w, b, a, alpha=scaling))
        down = x @ a.T
        ctx.save_for_backward(x, w, a, b, down)
        return (x @ w.T).addmm_(down, b.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x, w, a, b, *kept), grad = ctx.saved_tensors, grads[0]
        grad_down = product(grad, b.T).mul_(ctx.scaling)
        down, grad_x = kept[0] if kept else product(x, a), None
        if ctx.needs_input_grad[0] and kept:
            grad_x = (grad @ w).addmm_(grad_down, a)
        elif ctx.needs_input_grad[0]:
            grad_x = product(grad, torch.addmm(w, b, a, alpha=ctx.scaling).T)
        grad_b = product(down.T, grad.T).mul_(ctx.scaling).T
        return grad_x, None, product(grad_down.T, x.T), grad_b, None


class _FrozenLinear(torch.autograd.Function):
    """x W^T for a frozen W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(w)
        return product(x, w)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return product(grads[0], ctx.saved_tensors[0].T), None


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Call a linear layer on (N, D), by a short way where its weights are frozen, with or without a plain LoRA."""
    if type(module) is nn.Linear and module.bias is None and not module.weight.requires_grad:
        dtype = _compute_dtype(x)
        return cast(torch.Tensor, _FrozenLinear.apply(x.to(dtype), module.weight.to(dtype)))
    if type(module) is not LoraLinear or module.disable_adapters or module.merged or module.lora_variant:
        return module(x)
    names = [name for name in module.active_adapters if name in module.lora_A]
    base, dropout = module.base_layer, module.lora_dropout[names[0]] if len(names) == 1 else None
    if len(names) != 1 or type(base) is not nn.Linear or base.weight.requires_grad:
        return module(x)
    a, b = (cast(nn.Linear, part[names[0]]) for part in (module.lora_A, module.lora_B))
    if b.bias is not None or (base.bias is not None and base.bias.requires_grad):
        return module(x)
    scaling = module.scaling[names[0]]
    dtype = _compute_dtype(x)
    if isinstance(dropout, nn.Dropout) and dropout.p and module.training:
        wide, down = base(x), functional.linear(dropout(x.to(a.weight.dtype)).to(dtype), a.weight.to(dtype))
        return torch.addmm(wide, down, b.weight.to(dtype).T, alpha=scaling)
    parts = (part.to(dtype) for part in (x, base.weight, a.weight, b.weight))
    out = cast(torch.Tensor, _LoraLinear.apply(*parts, scaling))
    return out if base.bias is None else out + base.bias


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else x.dtype


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy behind a frozen head; the gradient is found beside the loss, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, hidden_PD: torch.Tensor, weight_OD: torch.Tensor, targets_PK: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        total = hidden_PD.new_zeros((), dtype=torch.float32)
        grad_PD = torch.empty_like(hidden_PD) if wanted else None
        for start in range(0, len(hidden_PD), chunk):
            part = slice(start, start + chunk)
            targets = targets_PK[part].reshape(-1)
            kept = targets != IGNORE
            places = targets.clamp_min(0)[:, None]
            logits = product(hidden_PD[part], weight_OD).float().view(len(targets), -1)
            log_norm = logits.logsumexp(-1)
            total += ((log_norm - logits.gather(1, places)[:, 0]) * kept).sum()
            if grad_PD is not None:
                logits.sub_(log_norm[:, None]).exp_()
                logits.scatter_add_(1, places, logits.new_full((len(targets), 1), -1.0))
                logits.mul_(kept[:, None])
                grad_PD[part] = product(logits.view(-1, len(weight_OD)).to(hidden_PD.dtype), weight_OD.T)
        if grad_PD is not None:
            ctx.save_for_backward(grad_PD)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad_PD,) = ctx.saved_tensors
        return grad_PD * grads[0].to(grad_PD.dtype), None, None, None


def head_loss(head: nn.Module, hidden_PD: torch.Tensor, targets_PK: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of K labels a position, each over its own V of the head's K * V outputs; a float32 scalar.

    Targets are int64, -100 where there is none; (P,) for K = 1.
    """
    frozen = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad
    if not frozen:
        logits = head(hidden_PD).float().view(targets_PK.numel(), -1)
        return functional.cross_entropy(logits, targets_PK.flatten(), ignore_index=IGNORE, reduction="sum")
    weight = cast(nn.Linear, head).weight
    dtype = _compute_dtype(hidden_PD)
    room = LOGITS_PER_GPU_CHUNK if hidden_PD.is_cuda else LOGITS_PER_CHUNK
    chunk = max(1, room // len(weight))
    parts = (hidden_PD.to(dtype), weight.to(dtype), targets_PK.view(len(hidden_PD), -1), chunk)
    return cast(torch.Tensor, _LinearCrossEntropy.apply(*parts))

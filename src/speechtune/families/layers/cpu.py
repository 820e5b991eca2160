"""Products of float32 matrices, and causal attention made of them, for training on a CPU.

torch hands products to MKL, whose kernels for processors of other makers than Intel stop at AVX2; oneDNN, which torch
has for convolutions and compiled code, takes AVX-512 wherever it is (`bench/products.py`).

torch's flash kernel for CPUs multiplies small tiles and computes the probabilities twice; with plain products over
blocks of queries, each with the keys before it, that keep the probabilities, training on samples of some hundred
positions is some 15 % faster. Kept probabilities take memory, so long samples stay with torch's kernel.

Shapes: S positions of one sample, H query heads in G groups, Q = S * H / G rows of queries, E head width.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

import torch
from torch.nn import functional

BLOCK = 64  # queries; the keys after them within the block are computed for nothing
MOST_POSITIONS = 1536  # above, the probabilities of a layer outgrow the activations of the rest


@cache
def _onednn() -> Any:
    """The operator that torch.compile calls for linear layers on CPUs; None where torch has not both libraries."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if both else None


def product(x_NI: torch.Tensor, w_OI: torch.Tensor) -> torch.Tensor:
    """x w^T (N, O) of two matrices, for use inside autograd functions: it has no gradient of its own.

    A transposed view of a matrix costs a copy as `x_NI` and nothing as `w_OI`.
    `torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off.
    """
    if x_NI.is_cpu and x_NI.dtype == w_OI.dtype == torch.float32 and cast(Any, torch.backends.mkldnn).enabled:
        operator = _onednn()
        if operator is not None:
            return operator(x_NI, w_OI, None, "none", [], "")
    return functional.linear(x_NI, w_OI)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_SHE: torch.Tensor, k_SGE: torch.Tensor, v_SGE: torch.Tensor, first: int) -> torch.Tensor:
        size, heads, width = q_SHE.shape
        groups = k_SGE.shape[1]
        ctx.scale, ctx.shared, ctx.first, kept = width**-0.5, heads // groups, first, []
        # A group's queries as the rows of one matrix, the heads of a position next to each other.
        q_GQE = (q_SHE * ctx.scale).view(size, groups, -1, width).transpose(0, 1).reshape(groups, -1, width)
        k_GES, v_GSE = k_SGE.permute(1, 2, 0).contiguous(), v_SGE.transpose(0, 1).contiguous()
        out_GQE, later = torch.zeros_like(q_GQE), _later(ctx.shared)
        for start, end, rows in _blocks(first, size, ctx.shared):
            weights = q_GQE[:, rows] @ k_GES[:, :, :end]
            weights[..., start:].masked_fill_(later[: weights.shape[1], : end - start], -math.inf)
            kept.append(weights.softmax(-1))
            torch.bmm(kept[-1], v_GSE[:, :end], out=out_GQE[:, rows])
        ctx.save_for_backward(q_GQE, k_GES, v_GSE, out_GQE, *kept)
        return out_GQE.view(groups, size, -1, width).transpose(0, 1).reshape(size, heads, width)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q_GQE, k_GES, v_GSE, out_GQE, *kept = ctx.saved_tensors
        groups, size, width = v_GSE.shape
        grad_GQE = grads[0].reshape(size, groups, -1, width).transpose(0, 1).reshape(groups, -1, width)
        # The softmax's gradient needs the sum over keys of P dP, which is the product of output and its gradient.
        weight_GQ1 = (grad_GQE * out_GQE).sum(-1, keepdim=True)
        k_GSE, v_GES = k_GES.transpose(1, 2), v_GSE.transpose(1, 2)
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q_GQE, v_GSE, v_GSE))
        for (_, end, rows), weights in zip(_blocks(ctx.first, size, ctx.shared), kept, strict=True):
            grad = grad_GQE[:, rows]
            grad_v[:, :end].baddbmm_(weights.transpose(1, 2), grad)
            scores = (grad @ v_GES[:, :, :end]).sub_(weight_GQ1[:, rows]).mul_(weights)
            torch.bmm(scores, k_GSE[:, :end], out=grad_q[:, rows])
            grad_k[:, :end].baddbmm_(scores.transpose(1, 2), q_GQE[:, rows])
        grad_q_SHE = grad_q.mul_(ctx.scale).view(groups, size, -1, width).transpose(0, 1).reshape(size, -1, width)
        return grad_q_SHE, grad_k.transpose(0, 1), grad_v.transpose(0, 1), None


def _blocks(first: int, size: int, shared: int) -> Iterator[tuple[int, int, slice]]:
    """First position and end of each block from `first` on, and its rows where `shared` heads share a key."""
    for start in range(first, size, BLOCK):
        end = min(start + BLOCK, size)
        yield start, end, slice(start * shared, end * shared)


@cache
def _later(shared: int) -> torch.Tensor:
    """Within a block: which keys (columns) come after a query (rows)."""
    return torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1).repeat_interleave(shared, 0)


def causal_attention(q_SHE: torch.Tensor, k_SGE: torch.Tensor, v_SGE: torch.Tensor, first: int = 0) -> torch.Tensor:
    """softmax(q k^T / sqrt(E)) v (Vaswani et al. 2017), (S, H, E), over the positions up to each query's own.

    Before position `first` it is zero, where nobody needs it.
    """
    return cast(torch.Tensor, _CausalAttention.apply(q_SHE, k_SGE, v_SGE, first))

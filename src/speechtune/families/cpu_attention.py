"""Causal attention for training on a CPU: matrix products over blocks of queries, each with the keys before it.

torch's flash kernel for CPUs keeps no probabilities and multiplies small tiles; on samples of some hundred positions
plain products of the same size run about three times as fast forward and backward (`bench/attention.py`). The
probabilities are kept, so that long samples stay with torch's kernel.

Shapes: S positions of one sample, H query heads in G groups of R, E head width, C queries of a block.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch

BLOCK = 64  # queries; the keys after them within the block are computed for nothing
MOST_POSITIONS = 1536  # above, the probabilities of a layer outgrow the activations of the rest


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_SHE: torch.Tensor, k_SGE: torch.Tensor, v_SGE: torch.Tensor) -> torch.Tensor:
        size, heads, width = q_SHE.shape
        groups = k_SGE.shape[1]
        q_GSRE = q_SHE.view(size, groups, heads // groups, width).transpose(0, 1).contiguous()
        k_GES, v_GSE = k_SGE.permute(1, 2, 0).contiguous(), v_SGE.transpose(0, 1).contiguous()
        ctx.scale, kept, outputs = 1 / math.sqrt(width), [], []
        for start in range(0, size, BLOCK):
            end = min(start + BLOCK, size)
            queries = q_GSRE[:, start:end].flatten(1, 2)
            scores = (queries @ k_GES[:, :, :end]).mul_(ctx.scale)
            later = torch.ones(end - start, end - start, dtype=torch.bool).triu_(1)[:, None]
            scores.view(groups, end - start, -1, end)[..., start:].masked_fill_(later, -math.inf)
            kept.append(scores.softmax(-1))
            outputs.append((kept[-1] @ v_GSE[:, :end]).view(groups, end - start, -1, width))
        out_GSRE = torch.cat(outputs, 1)
        ctx.save_for_backward(q_GSRE, k_GES, v_GSE, out_GSRE, *kept)
        return out_GSRE.transpose(0, 1).reshape(size, heads, width)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q_GSRE, k_GES, v_GSE, out_GSRE, *kept = ctx.saved_tensors
        size, width = v_GSE.shape[1:]
        grad_GSRE = grads[0].reshape(size, len(q_GSRE), -1, width).transpose(0, 1).contiguous()
        # The softmax's gradient needs the sum over keys of P dP, which is the product of output and its gradient.
        weight_GSR1 = (grad_GSRE * out_GSRE).sum(-1, keepdim=True)
        k_GSE, v_GES = k_GES.transpose(1, 2), v_GSE.transpose(1, 2)
        grad_k, grad_v, grad_q = torch.zeros_like(v_GSE), torch.zeros_like(v_GSE), []
        for start, weights in zip(range(0, size, BLOCK), kept, strict=True):
            end = min(start + BLOCK, size)
            block = slice(start, end)
            grad = grad_GSRE[:, block].flatten(1, 2)
            grad_v[:, :end].baddbmm_(weights.transpose(1, 2), grad)
            scores = (grad @ v_GES[:, :, :end]).sub_(weight_GSR1[:, block].flatten(1, 2)).mul_(weights).mul_(ctx.scale)
            grad_q.append((scores @ k_GSE[:, :end]).view(len(scores), end - start, -1, width))
            grad_k[:, :end].baddbmm_(scores.transpose(1, 2), q_GSRE[:, block].flatten(1, 2))
        grad_q_SHE = torch.cat(grad_q, 1).transpose(0, 1).reshape(size, -1, width)
        return grad_q_SHE, grad_k.transpose(0, 1), grad_v.transpose(0, 1)


def causal_attention(q_SHE: torch.Tensor, k_SGE: torch.Tensor, v_SGE: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(E)) v (Vaswani et al. 2017) over the positions up to each query's own; returns (S, H, E)."""
    return cast(torch.Tensor, _CausalAttention.apply(q_SHE, k_SGE, v_SGE))

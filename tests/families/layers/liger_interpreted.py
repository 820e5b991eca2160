"""Liger's kernels against the plain ones, run on the CPU by Triton's interpreter; prints the greatest differences.

A program of its own: the interpreter must be asked for before Triton is imported.
"""

from __future__ import annotations

import json
import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm as liger_rms_norm
from triton.runtime import interpreter

from speechtune.families.layers.kernels import Kernels, rms_norm, silu_mul

converted = interpreter._implicit_cvt


def convert(argument: Any) -> Any:
    """The interpreter leaves Python floats as they are; on a GPU they become float32."""
    if isinstance(argument, float):
        return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)
    return converted(argument)


interpreter._implicit_cvt = convert
liger_rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # it takes CUDA's own, which no interpreter has


def both(kernels: Kernels, dtype: torch.dtype) -> list[torch.Tensor]:
    """Norm and gated unit of fixed inputs, and all gradients."""
    generator = torch.Generator().manual_seed(0)
    hidden, gate, up = (torch.randn(2, 3, 96, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    weight = torch.randn(96, generator=generator).to(dtype)
    outputs = [rms_norm(hidden, weight, 1e-5, kernels), silu_mul(gate * 1, up * 1, kernels)]
    torch.stack([output.float().square().sum() for output in outputs]).sum().backward()
    found = [*outputs, hidden.grad, gate.grad, up.grad]
    return [tensor.detach().float() for tensor in found if tensor is not None]


names = ("norm", "unit", "norm gradient", "gate gradient", "up gradient")
for dtype in (torch.float32, torch.float16):  # of bfloat16 the interpreter makes NaN: numpy has no such type
    pairs = zip(both("torch", dtype), both("liger", dtype), strict=True)
    errors = [float((plain - liger).norm() / plain.norm()) for plain, liger in pairs]
    print(json.dumps({"dtype": str(dtype), **dict(zip(names, errors, strict=True))}))

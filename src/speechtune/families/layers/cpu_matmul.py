"""Products of float32 matrices, on x86 processors by oneDNN.

torch hands them to MKL, whose kernels for processors of other makers than Intel stop at AVX2; oneDNN, which torch has
for convolutions and compiled code, takes AVX-512 wherever it is (`bench/products.py`).
"""

from functools import cache
from typing import Any, cast

import torch
from torch.nn import functional


@cache
def _onednn() -> Any:
    """The operator that torch.compile calls for linear layers on CPUs; None where torch has not both libraries."""
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if both else None


def product(x_NI: torch.Tensor, w_OI: torch.Tensor) -> torch.Tensor:
    """x w^T of two matrices, for use inside autograd functions: it has no gradient of its own.

    `torch.backends.mkldnn.flags(enabled=False)` turns oneDNN off.

    Args:
        x_NI: rows; a transposed view of a matrix costs a copy.
        w_OI: weights; a transposed view costs nothing.

    Returns:
        (N, O).
    """
    if x_NI.is_cpu and x_NI.dtype == w_OI.dtype == torch.float32 and cast(Any, torch.backends.mkldnn).enabled:
        operator = _onednn()
        if operator is not None:
            return operator(x_NI, w_OI, None, "none", [], "")
    return functional.linear(x_NI, w_OI)

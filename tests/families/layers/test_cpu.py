"""Products on a CPU against float64, that they are those of oneDNN where they may be, and what its kernels take."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch.profiler import profile

from speechtune.families.layers.cpu import product
from speechtune.families.layers.ops import linear

FLAGS = cast(Any, torch.backends.mkldnn).flags
X86 = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def matrix(rows: int, columns: int, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return torch.randn(columns, rows).T
    return torch.randn(rows, 2 * columns)[:, columns:] if layout == "slice" else torch.randn(rows, columns)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("x_layout", ["plain", "transposed", "slice"])
@pytest.mark.parametrize("w_layout", ["plain", "transposed", "slice"])
@pytest.mark.parametrize("sizes", [(0, 5, 3), (1, 1, 1), (1, 64, 33), (130, 16, 70)])
def test_product(sizes: tuple[int, int, int], w_layout: str, x_layout: str, enabled: bool) -> None:
    torch.manual_seed(0)
    rows, width, out = sizes
    x, w = matrix(rows, width, x_layout), matrix(out, width, w_layout)
    with FLAGS(enabled=enabled):
        found = product(x, w)
    torch.testing.assert_close(found, (x.double() @ w.double().T).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_frozen_layer_is_torchs(dtype: torch.dtype) -> None:
    """Also with an input that needs no gradient, as a first layer's."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 7, bias=False, dtype=dtype).requires_grad_(False)
    x, weight = torch.randn(20, 12, dtype=dtype, requires_grad=True), torch.randn(20, 7, dtype=dtype)
    found = [(out.detach(), *torch.autograd.grad((out * weight).sum(), x)) for out in (linear(layer, x), layer(x))]
    torch.testing.assert_close(found[0], found[1])
    assert not linear(layer, x.detach()).requires_grad


@pytest.mark.skipif(not X86, reason="torch has not both libraries here")
def test_onednn_multiplies() -> None:
    """Guards against a way of calling it that quietly falls back to the slower library."""
    layer, x = nn.Linear(64, 64, bias=False).requires_grad_(False), torch.randn(64, 64, requires_grad=True)
    with profile() as profiled:
        linear(layer, x).sum().backward()
    called = {event.key: event.count for event in profiled.key_averages()}
    assert called["mkldnn::_linear_pointwise"] == 2
    assert "aten::mm" not in called


MEMORY = """
import torch
from speechtune.commands.guarded import limit_kernel_caches
from speechtune.families.layers.cpu import product

def resident() -> int:
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) // 1024

limit_kernel_caches()
w, before = torch.randn(512, 256), resident()
for rows in range(500, 1500, 2):
    product(product(torch.ones(rows, 256), w), w.T)
print(resident() - before)
"""


@pytest.mark.skipif(not X86 or not sys.platform.startswith("linux"), reason="no oneDNN, or no /proc")
def test_kernels_of_earlier_batches_are_let_go() -> None:
    """Issue: each number of rows has a kernel of its own; a thousand of them kept took 1.7 GB in the long run."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400, "MiB"

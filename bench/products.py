"""What the fast forward pass has of its own on a CPU, beside torch: products of matrices, and attention.

Lengths and widths are those of `training.py`; attention forward and backward. Then what each brings a training run:
the same run with torch's products, and with torch's attention.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from meter import quiet
from ours import prepare, train_ours
from torch.nn import functional

from speechtune.families.layers import ops as fast
from speechtune.families.layers.cpu import causal_attention, product
from training import SAMPLES, TIMED_STEPS

POSITIONS, WIDTHS = 3_000, ((256, 512), (512, 256))
LENGTHS, HEADS, GROUPS, HEAD_WIDTH = (200, 430, 900), 4, 2, 64
CALLS = 20


def measure(pairs: int = 9) -> dict[str, list[float]]:
    """Time of torch over ours (above 1: ours is faster), and operations a second."""
    result: dict[str, list[float]] = {}
    for wide, out in WIDTHS:
        x, w = torch.randn(POSITIONS, wide), torch.randn(out, wide)
        name = f"product {wide} to {out}"
        for theirs, ours in in_pairs(pairs, lambda: functional.linear(x, w), lambda: product(x, w)):  # noqa: B023
            result.setdefault(f"{name}: torch / ours", []).append(theirs / ours)
            result.setdefault(f"{name}: GFLOP/s", []).append(2 * POSITIONS * wide * out / ours / 1e9)
    for length in LENGTHS:
        heads = [torch.randn(length, count, HEAD_WIDTH, requires_grad=True) for count in (HEADS, GROUPS, GROUPS)]
        sides = [lambda step=step: differentiated(step, heads) for step in (torchs_attention, causal_attention)]  # noqa: B023
        for theirs, ours in in_pairs(pairs, *sides):
            result.setdefault(f"attention, {length} positions: torch / ours", []).append(theirs / ours)
    return result | in_training(pairs)


def in_training(pairs: int) -> dict[str, list[float]]:
    """Tokens a second of training on mixed lengths over those of the same run with one of torch's own parts."""
    parts = {"torch's products": lambda: cast(Any, torch.backends.mkldnn).flags(enabled=False)}
    parts["torch's attention"] = torch_attends
    result: dict[str, list[float]] = {}
    with quiet(), tempfile.TemporaryDirectory(prefix="speechtune-bench-") as name:
        folder = Path(name)
        data = prepare(folder, "mixed", SAMPLES)
        for _ in range(pairs):
            rates = {}
            for part, using in ({"": nullcontext} | parts).items():
                with using():
                    rates[part] = train_ours(folder / "base", data, folder / "runs", TIMED_STEPS + 1)[0].rate().wall
            for part in parts:
                result.setdefault(f"training, mixed lengths: ours / with {part}", []).append(rates[""] / rates[part])
    return result


@contextmanager
def torch_attends() -> Iterator[None]:
    """As for samples too long for ours."""
    before, fast.MOST_POSITIONS = fast.MOST_POSITIONS, 0
    try:
        yield
    finally:
        fast.MOST_POSITIONS = before


def torchs_attention(q_SHE: torch.Tensor, k_SGE: torch.Tensor, v_SGE: torch.Tensor) -> torch.Tensor:
    """What the native classes call."""
    heads = (x.transpose(0, 1)[None] for x in (q_SHE, k_SGE, v_SGE))
    return functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def differentiated(attention: Callable[..., torch.Tensor], heads: list[torch.Tensor]) -> None:
    """Forward and backward pass."""
    out_SHE = attention(*heads)
    torch.autograd.grad(out_SHE, heads, torch.ones_like(out_SHE))


def in_pairs(pairs: int, theirs: Callable[[], object], ours: Callable[[], object]) -> list[tuple[float, float]]:
    """Seconds a call of both, one pair before them unmeasured."""
    return [(seconds(theirs), seconds(ours)) for _ in range(pairs + 1)][1:]


def seconds(work: Callable[[], object]) -> float:
    """Seconds a call."""
    started = time.perf_counter()
    for _ in range(CALLS):
        work()
    return (time.perf_counter() - started) / CALLS

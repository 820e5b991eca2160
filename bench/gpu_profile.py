"""Where the time of a step goes: kernels by group, and how long the GPU had nothing to do."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

GROUPS = {  # the first that fits a kernel's name counts
    "attention": r"flash|fmha|attention|sdpa|softmax_warp|attn",
    "optimizer": r"adam|multi_tensor|foreach|lerp",
    "matmul": r"gemm|gemv|cutlass|nvjet|cublas|xmma|wgmma|splitk|dot_kernel|convol|conv2d|fprop|dgrad|wgrad|matmul|"
    r"::mm|::bmm|::addmm|mkl|dnn",
    "copy/index": r"memcpy|memset|copy|index|gather|scatter|cat|nonzero|masked|select|embedding|fill|sort|scan|"
    r"compact|to_empty|arange|DeviceSelect|DeviceReduce",
    "elementwise/norm": r"elementwise|vectorized|reduce|norm|softmax|silu|gelu|rope|swiglu|dropout|triton|::add|::mul|"
    r"::sum|::mean|::pow|::rsqrt|::sigmoid|::neg|::div|::sub|::bernoulli|::cos|::sin|::where|nll|loss|logsumexp",
}
NOT_KERNELS = re.compile(r"ProfilerStep|^Optimizer\.|^gpu_user_annotation|^cuda[A-Z]")

Interval = tuple[str, float, float]
"""Kernel, start and end in microseconds."""


def group_of(name: str) -> str:
    """Group of a kernel, or of an operator where there is no GPU."""
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def breakdown(kernels: Iterable[Interval], wall_us: float) -> dict[str, float]:
    """Share of the wall time per group, and of the time in which no kernel ran.

    Kernels that overlap count for what each adds to the time in which any ran, so that the shares sum to 1.
    """
    spent: dict[str, float] = defaultdict(float)
    busy_until = float("-inf")
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        added = max(0.0, end - max(start, busy_until))
        spent[group_of(name)] += added
        busy_until = max(busy_until, end)
    wall_us = max(wall_us, sum(spent.values()))
    shares = {group: spent.get(group, 0.0) / wall_us for group in (*GROUPS, "other")}
    return shares | {"idle": max(0.0, 1.0 - sum(shares.values()))}


def intervals(profiler: Any, device: torch.device) -> list[Interval]:
    """Kernels of a profile; without a GPU each operator's own time, laid end to end: nothing runs beside it."""
    if device.type == "cuda":
        return [
            (event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
            and not NOT_KERNELS.search(event.name)
        ]
    found, now = [], 0.0
    for event in profiler.key_averages():
        found.append((event.key, now, now + event.self_cpu_time_total))
        now += event.self_cpu_time_total
    return found

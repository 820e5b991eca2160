"""Training throughput at released dimensions, beside plain transformers + PEFT in the same process.

    python bench/gpu.py                                        # a CUDA device, the released dimensions, random weights
    python bench/gpu.py --device cpu --scale tiny --passes 1   # the same script, scaled down

Both sides train the same made-up samples with the same LoRA, optimizer, clipping and autocast, one optimizer step per
micro-batch, batches collated before. The toolkit's packed micro-batches hold at most the budget of real positions; the
padded ones, the peer's too, are of like length and hold at most the budget, padding included: the best that padding can
do. The peer is the native forward with its own loss. Writes
bench/results/gpu-<device>.json and a table in Markdown beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_profile
import gpu_setup
import peft
import torch
import transformers
from flop_rules import flop_rules
from flops import count_flops, mfu, peak_flops
from torch import nn

from speechtune.config import TrainConfig
from speechtune.lora.apply import trainable
from speechtune.precision import PrecisionPlan, plan_precision
from speechtune.training.job import Objective
from speechtune.training.loop import make_optimizer

RESULTS = Path(__file__).parent / "results"
SIDES: dict[str, dict[str, Any]] = {
    "packed": {"packing": True, "fast": True},
    "packed+liger": {"packing": True, "fast": True, "kernels": "liger"},
    "packed+compile": {"packing": True, "fast": True, "kernels": "compiled"},
    "padded": {"packing": False, "fast": False},
    "peer": {"packing": False, "fast": False},
}
TARGETS = {
    "attention": {
        "higgs_audio_v2": "attention",
        "phi4_multimodal": r"model\.layers\.\d+\.self_attn\.(qkv|o)_proj",
    },
    "all": {"higgs_audio_v2": "all", "phi4_multimodal": "language"},
}
HEADINGS = ["family", "LoRA", "lengths", "budget", "side", "tokens/s", "audio s/s", "MFU (4N)", "peak GiB", "padding"]


@dataclass(frozen=True)
class Row:
    """One measurement. `seconds` and operations are sums over the passes; None where it did not fit, or is not known.

    `padding` is the share of the positions computed that are padding.
    """

    family: str
    lora: str
    lengths: str
    budget: int
    side: str
    tokens_per_second: float | None
    audio_seconds_per_second: float | None
    mfu_4n: float | None
    formula: str
    seconds: float | None
    flops_4n: float
    computed_flops: float | None
    peak_gib: float | None
    padding: float
    breakdown: dict[str, float]
    error: str = ""


@dataclass(frozen=True)
class Work:
    """The micro-batches of one side: what goes to the device, how to get a loss from it, and what they hold."""

    inputs: Sequence[Any]
    loss: Callable[[Any], torch.Tensor]
    num_tokens: int
    audio_seconds: float
    padding: float
    flops_4n: float
    computed_flops: float | None
    formula: str


def make_work(family: Any, model: nn.Module, plan: PrecisionPlan, side: str, args: tuple[str, int]) -> Work:
    """Draw the samples, cut and collate them, and count their operations."""
    kind, budget = args
    samples = gpu_setup.make_samples(family, gpu_setup.make_lengths(kind, budget))
    groups = gpu_setup.cut(samples, budget, packed=family.config.batch.packing)
    batches = [family.collate(group) for group in groups]
    counts = [count_flops(model, flop_rules(family, model, batch), batch.num_tokens) for batch in batches]
    tokens = sum(batch.num_tokens for batch in batches)
    computed = sum(batch.inputs["input_ids"].numel() for batch in batches)
    sizes = (tokens, sum(batch.audio_seconds for batch in batches), 1 - tokens / computed)
    flops_4n, flops = sum(c.model_flops_4n for c in counts), sum(c.computed_flops for c in counts)
    formula = f"4 x {counts[0].active_parameters:,} active non-embedding parameters x {tokens:,} real tokens"
    if side != "peer":
        objective = Objective(model, family, plan, {})
        batches = [batch.pin_memory() if plan.device.type == "cuda" else batch for batch in batches]
        return Work(batches, lambda batch: objective(batch, batch.target_counts)[0], *sizes, flops_4n, flops, formula)
    inputs = [pinned(gpu_setup.peer_inputs(family, group), plan.device) for group in groups]

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(plan.device.type, plan.autocast, enabled=plan.autocast is not None):
            return gpu_setup.peer_loss(model, batch)

    return Work(inputs, loss, *sizes, flops_4n, None, formula)  # its heads run over every position


def train_pass(work: Work, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """One optimizer step per micro-batch."""
    parameters = list(trainable(model).values())
    for inputs in work.inputs:
        if isinstance(inputs, dict):
            moved: Any = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
        else:
            moved = inputs.to(device)
        optimizer.zero_grad(set_to_none=True)
        work.loss(moved).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def pinned(inputs: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors where a GPU fetches them without waiting, as a loader lays them in training."""
    return {name: tensor.pin_memory() for name, tensor in inputs.items()} if device.type == "cuda" else inputs


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(work: Work, model: nn.Module, device: torch.device, passes: int) -> tuple[float, float | None, dict]:
    """Seconds of `passes` passes after two unmeasured ones, peak memory in GiB, and a profile of one more pass."""
    optimizer = make_optimizer(list(trainable(model).values()), TrainConfig(), device)
    on_gpu = device.type == "cuda"
    for _ in range(2 if on_gpu else 1):
        train_pass(work, model, optimizer, device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    started = time.perf_counter()
    for _ in range(passes):
        train_pass(work, model, optimizer, device)
    synchronize(device)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=activities) as profiler:
        started = time.perf_counter()
        train_pass(work, model, optimizer, device)
        synchronize(device)
        wall_us = 1e6 * (time.perf_counter() - started)
    return seconds, peak, gpu_profile.breakdown(gpu_profile.intervals(profiler, device), wall_us)


def measure_side(name: str, lora: str, side: str, options: argparse.Namespace, plan: PrecisionPlan) -> list[Row]:
    """All lengths and budgets on one model, made for this side alone and given back afterwards."""
    family = gpu_setup.make_family(name, tiny=options.scale == "tiny", **SIDES[side])
    model = gpu_setup.make_model(family, plan, TARGETS[lora][name])
    rows = []
    for kind in options.lengths:
        for budget in options.budgets:
            work = make_work(family, model, plan, side, (kind, budget))
            rows.append(measure_row((name, lora, kind, budget, side), work, model, plan.device, options.passes))
            print(table(rows[-1:], headings=False), flush=True)
    del model
    release(plan.device)
    return rows


def measure_row(
    what: tuple[str, str, str, int, str], work: Work, model: nn.Module, device: torch.device, passes: int
) -> Row:
    """One measurement, or that it did not fit."""
    seconds, gib, shares, error = None, None, {}, ""
    try:
        seconds, gib, shares = measure(work, model, device, passes)
    except torch.OutOfMemoryError:
        error = "out of memory"
    if error:  # outside the handler, whose traceback would keep what did not fit
        model.zero_grad(set_to_none=True)
        release(device)
    return Row(
        *what,
        tokens_per_second=passes * work.num_tokens / seconds if seconds else None,
        audio_seconds_per_second=passes * work.audio_seconds / seconds if seconds else None,
        mfu_4n=mfu(passes * work.flops_4n, seconds, peak_flops(device_name(device))) if seconds else None,
        formula=work.formula,
        seconds=seconds,
        flops_4n=passes * work.flops_4n,
        computed_flops=work.computed_flops and passes * work.computed_flops,
        peak_gib=gib,
        padding=work.padding,
        breakdown=shares,
        error=error,
    )


def release(device: torch.device) -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """torch's name of the GPU, or the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{platform.machine()}"


def table(rows: Sequence[Row], *, headings: bool = True) -> str:
    """The measurements as a table in Markdown."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)] if headings else []
    for row in rows:
        cells = [row.family, row.lora, row.lengths, f"{row.budget:,}", row.side]
        cells += [row.error or _number(row.tokens_per_second, ",.0f"), _number(row.audio_seconds_per_second, ",.1f")]
        cells += [_number(row.mfu_4n, ".1%"), _number(row.peak_gib, ".1f"), f"{row.padding:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def breakdown_table(rows: Sequence[Row]) -> str:
    """Shares of the step by group of kernels, in Markdown."""
    groups = [*gpu_profile.GROUPS, "other", "idle"]
    lines = [f"| family | LoRA | lengths | budget | side | {' | '.join(groups)} |", "|" + "---|" * (5 + len(groups))]
    for row in rows:
        cells = [row.family, row.lora, row.lengths, f"{row.budget:,}", row.side]
        lines.append(f"| {' | '.join(cells + [_number(row.breakdown.get(group), '.0%') for group in groups])} |")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def versions(device: torch.device) -> dict[str, Any]:
    """Hardware and libraries."""
    found = {"device": device_name(device), "python": platform.python_version(), "torch": torch.__version__}
    found |= {"transformers": transformers.__version__, "peft": peft.__version__, "cuda": torch.version.cuda}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"memory_gib": properties.total_memory / 2**30, "multiprocessors": properties.multi_processor_count}
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=["released", "tiny"], default="released")
    parser.add_argument("--families", nargs="+", choices=list(gpu_setup.RELEASED), default=list(gpu_setup.RELEASED))
    parser.add_argument("--lora", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--lengths", nargs="+", choices=["mixed", "equal"], default=["mixed", "equal"])
    parser.add_argument("--budgets", nargs="+", type=int, default=[4096, 8192, 16384])
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=["packed", "padded", "peer"])
    parser.add_argument("--passes", type=int, default=3, help="measured passes over about four budgets of samples")
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; --device cpu --scale tiny runs the same script scaled down")
    plan = plan_precision("auto", device=device)
    found = versions(device)
    print(json.dumps(found), table([]), sep="\n", flush=True)
    sides = [(name, lora, side) for name in options.families for lora in options.lora for side in options.sides]
    rows = [row for name, lora, side in sides for row in measure_side(name, lora, side, options, plan)]
    print(breakdown_table(rows))
    peak = peak_flops(found["device"])
    basis = {"peak_dense_bf16_flops": peak, "mfu": "4 x active non-embedding parameters x real tokens / seconds / peak"}
    result = {**found, "scale": options.scale, "precision": plan.name, "passes": options.passes, **basis}
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / f"gpu-{found['device'].replace(' ', '-').replace('/', '-')}.json"
    file.write_text(json.dumps({**result, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(f"{table(rows)}\n\n{breakdown_table(rows)}\n", encoding="utf-8")
    print(f"written: {file}")


if __name__ == "__main__":
    main()

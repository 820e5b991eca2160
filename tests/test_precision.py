"""Precision plans by compute capability, as seen from any machine: the device is named, not asked."""

from __future__ import annotations

import pytest
import torch

from speechtune.errors import ConfigError
from speechtune.precision import PrecisionPlan, plan_precision

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPUS = {  # compute capability -> the plan that `auto` makes
    (6, 1): "fp32",
    (7, 0): "fp16",
    (7, 5): "fp16",
    (8, 0): "bf16",
    (8, 6): "bf16",
    (8, 9): "bf16",
    (9, 0): "bf16",
    (10, 0): "bf16",
    (12, 0): "bf16",
}
FIELDS = {"bf16": (BF16, BF16, False), "fp16": (FP16, FP16, True), "fp32": (FP32, None, False)}
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


def on_gpu(requested: str, capability: tuple[int, int], **values: bool) -> PrecisionPlan:
    return plan_precision(requested, device=CUDA, capability=capability, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("capability", "name", "dtype", "scaler"),
    [
        ((9, 0), "bf16", torch.bfloat16, False),
        ((8, 9), "bf16", torch.bfloat16, False),
        ((8, 0), "bf16", torch.bfloat16, False),
        ((7, 5), "fp16", torch.float16, True),
        ((7, 0), "fp16", torch.float16, True),
        ((6, 1), "fp32", torch.float32, False),
    ],
)
def test_auto_goes_by_compute_capability(
    capability: tuple[int, int], name: str, dtype: torch.dtype, scaler: bool
) -> None:
    """`torch.cuda.is_bf16_supported()` says yes on a T4 (7.5), where bfloat16 is emulated and slow."""
    plan = on_gpu("auto", capability)
    assert (plan.name, plan.base_dtype, plan.scaler, plan.device) == (name, dtype, scaler, CUDA)
    assert plan.autocast == (None if name == "fp32" else dtype)
    assert "compute capability {}.{}".format(*capability) in plan.reason


def test_a_cpu_computes_in_float32() -> None:
    plan = plan_precision("auto", device=CPU)
    assert (plan.name, plan.base_dtype, plan.autocast, plan.scaler) == ("fp32", torch.float32, None, False)
    assert "CPU" in plan.reason


def test_bf16_may_be_asked_for_on_a_cpu() -> None:
    plan = plan_precision("bf16", device=CPU)
    assert (plan.base_dtype, plan.autocast, plan.scaler) == (torch.bfloat16, torch.bfloat16, False)
    assert "train.precision=bf16" in plan.reason


@pytest.mark.parametrize("capability", [(9, 0), (8, 0), (7, 5), (7, 0), (6, 1)])
def test_what_is_asked_for_is_done_or_refused(capability: tuple[int, int]) -> None:
    assert on_gpu("fp32", capability).autocast is None
    fp16 = on_gpu("fp16", capability)
    assert fp16.autocast == torch.float16 and fp16.scaler
    if capability < (8, 0):
        with pytest.raises(ConfigError, match=r"train\.precision=bf16.*only emulates.*fp16 or auto"):
            on_gpu("bf16", capability)
    else:
        assert on_gpu("bf16", capability).autocast == torch.bfloat16


def test_fp16_on_a_cpu_is_refused_with_the_alternatives() -> None:
    with pytest.raises(ConfigError, match=r"train\.precision=fp16.*fp32 or bf16"):
        plan_precision("fp16", device=CPU)


@pytest.mark.parametrize("capability", [(9, 0), (7, 5), (6, 1)])
def test_full_fine_tuning_keeps_float32_weights(capability: tuple[int, int]) -> None:
    """AdamW on float16 weights gives NaN after a step, and on bfloat16 weights loses the small updates."""
    plan, with_lora = on_gpu("auto", capability, full_finetune=True), on_gpu("auto", capability)
    assert plan.base_dtype == torch.float32
    assert (plan.name, plan.autocast, plan.scaler) == (with_lora.name, with_lora.autocast, with_lora.scaler)


def test_the_plan_is_told_in_one_line() -> None:
    line = on_gpu("auto", (7, 5)).describe()
    assert line.startswith("fp16 on cuda: compute capability 7.5") and "gradient scaler" in line and "\n" not in line
    assert "scaler" not in plan_precision("auto", device=CPU).describe()


@pytest.mark.parametrize("requested", ["auto", "bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", GPUS)
def test_every_plan_of_every_gpu(requested: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two-digit majors are newer than 9.0; nobody asks torch whether bfloat16 is supported: it counts emulation."""

    def never(*_: object, **__: object) -> bool:
        raise AssertionError("is_bf16_supported was asked")

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", never)
    shown = ".".join(map(str, capability))
    if requested == "bf16" and capability < (8, 0):
        with pytest.raises(ConfigError, match=rf"compute capability {shown} only emulates bfloat16"):
            on_gpu(requested, capability)
        return
    plan = on_gpu(requested, capability)
    wanted = GPUS[capability] if requested == "auto" else requested
    assert plan.name == wanted and (plan.base_dtype, plan.autocast, plan.scaler) == FIELDS[wanted]
    reason = f"compute capability {shown} has" if requested == "auto" else f"asked for by train.precision={requested}"
    assert plan.reason.startswith(reason)
    assert plan.describe().startswith(f"{wanted} on cuda: {reason}") and "adapters float32" in plan.describe()


def test_the_device_is_asked_for_its_capability_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a TITAN RTX: `is_bf16_supported()` is true there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    plan = plan_precision()
    assert (plan.name, plan.device, plan.scaler) == ("fp16", CUDA, True)

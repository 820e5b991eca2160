"""The precision of a run: dtypes of base, adapter and computation, chosen once for the device, with the reason."""

from dataclasses import dataclass
from typing import Literal

import torch

from speechtune.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """Dtypes of a run. Trainable parameters are always float32; `autocast` None means no autocast."""

    name: Literal["bf16", "fp16", "fp32"]
    device: torch.device
    base_dtype: torch.dtype
    autocast: torch.dtype | None
    scaler: bool
    reason: str

    def describe(self) -> str:
        """One line for the console."""
        scaled = ", gradient scaler" if self.scaler else ""
        return f"{self.name} on {self.device.type}: {self.reason} (adapters float32{scaled})"


def plan_precision(
    requested: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    *,
    full_finetune: bool = False,
    device: torch.device | None = None,
    capability: tuple[int, int] | None = None,
) -> PrecisionPlan:
    """Choose dtypes by compute capability, never by `is_bf16_supported`, which counts emulation.

    Args:
        requested: auto, or a precision the user insists on.
        full_finetune: all weights are trained, so they are kept in float32.
        device: where the run takes place; None picks this process's device.
        capability: CUDA compute capability; None asks the device. Given in tests to plan for another GPU.

    Raises ConfigError: the request cannot be met on this device.
    """
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda" and capability is None:
        capability = torch.cuda.get_device_capability(device)
    gpu = None if capability is None else f"compute capability {capability[0]}.{capability[1]}"
    name, reason = requested, f"asked for by train.precision={requested}"
    if name == "auto":
        if capability is None:
            name, reason = "fp32", "a CPU computes fastest and safest in float32"
        elif capability >= (8, 0):
            name, reason = "bf16", f"{gpu} has bfloat16 units"
        elif capability >= (7, 0):
            name, reason = "fp16", f"{gpu} has float16 units, no bfloat16"
        else:
            name, reason = "fp32", f"{gpu} has no half-precision units"
    if name == "fp16" and capability is None:
        raise ConfigError(
            "train.precision=fp16 is for GPUs of compute capability 7.x; a CPU only emulates float16: use fp32 or bf16"
        )
    if name == "bf16" and capability is not None and capability < (8, 0):
        raise ConfigError(f"train.precision=bf16: {gpu} only emulates bfloat16; use train.precision=fp16 or auto")
    half = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[name]
    base = torch.float32 if half is None or full_finetune else half
    return PrecisionPlan(name, device, base, half, name == "fp16", reason)

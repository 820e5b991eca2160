"""LoRA adapters: apply them, list what they train, get their tensors in and out, and refuse a poor fit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from speechtune.config import LoraSettings
from speechtune.errors import AdapterError
from speechtune.families.base import Family

WEIGHTS_NAME = "adapter_model.safetensors"
CONFIG_NAME = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class TowerCount:
    """Parameters of one part of the model: those of the base, and those trained (an adapter's included)."""

    tower: str
    total: int
    trainable: int


def target_pattern(family: Family, settings: LoraSettings) -> str:
    """The regex over module names that a preset or the user's own regex stands for."""
    return family.lora_presets.get(settings.targets, settings.targets)


def matching_modules(model: nn.Module, pattern: str) -> list[str]:
    """Names of the linear layers a pattern matches in full, as PEFT matches them.

    Raises:
        AdapterError: the pattern is no regex, or matches nothing.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"lora.targets={pattern!r}: neither a preset nor a valid regex: {error}") from None
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linear if regex.fullmatch(name)]
    if not names:
        examples = ", ".join(sorted({name for name in linear if "layers.0." in name})[:6])
        raise AdapterError(
            f"lora.targets={pattern!r} matches none of the model's {len(linear)} linear layers; their names look like: "
            f"{examples}"
        )
    return names


def apply_lora(model: nn.Module, family: Family, settings: LoraSettings, seed: int) -> PeftModel:
    """Freeze `model` and inject a fresh adapter with float32 weights.

    Args:
        model: the base, changed in place.
        family: supplies the presets.
        settings: rank, alpha, targets and variants.
        seed: of lora_A's initialisation, so that every rank starts alike.

    Raises:
        AdapterError: the targets match nothing.
    """
    pattern = target_pattern(family, settings)
    matching_modules(model, pattern)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides by it; a float is fine
        lora_dropout=settings.dropout,
        target_modules=pattern,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        modules_to_save=list(settings.modules_to_save) or None,
    )
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, lora)  # pyright: ignore[reportArgumentType, reportReturnType]
    except ValueError as error:
        raise AdapterError(f"lora: PEFT cannot apply the adapter: {error}") from None


def freeze(model: nn.Module, pattern: str) -> list[str]:
    """Freeze the parameters whose whole name matches, and return their names.

    Raises:
        AdapterError: the pattern is no regex, or matches nothing.
    """
    try:
        names = [name for name, _ in model.named_parameters() if re.fullmatch(pattern, name)]
    except re.error as error:
        raise AdapterError(f"train.freeze={pattern!r}: not a valid regex: {error}") from None
    if not names:
        raise AdapterError(f"train.freeze={pattern!r} matches no parameter of the model")
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return names


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def frozen(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Frozen parameters with their names."""
    return ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)


def count_by_tower(model: nn.Module, family: Family) -> list[TowerCount]:
    """Parameters of the base, and trainable ones, of each part of the model, largest first."""
    totals: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        row = totals.setdefault(family.tower(name), [0, 0])
        row[0] += 0 if "lora_" in name else parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    ordered = sorted(totals.items(), key=lambda item: -item[1][0])
    return [TowerCount(tower, total, trained) for tower, (total, trained) in ordered]


def adapter_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names they have on disk."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def lora_b_norms(state: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Norm of every lora_B: zero means never trained."""
    return {name: float(tensor.float().norm()) for name, tensor in state.items() if "lora_B" in name}


def load_adapter(model: nn.Module, directory: Path, *, is_trainable: bool = False) -> PeftModel:
    """Put a saved adapter onto its base, and refuse what PEFT only warns about.

    Raises:
        AdapterError: files are missing or unreadable, keys are missing or left over, shapes differ, or every lora_B
            is zero.
    """
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise AdapterError(f"{directory}: no {name}; not a PEFT adapter folder")
    try:
        stored = load_file(directory / WEIGHTS_NAME)
        loaded = PeftModel.from_pretrained(model, str(directory), is_trainable=is_trainable)  # pyright: ignore[reportArgumentType]
    except SafetensorError as error:
        raise AdapterError(f"{directory}/{WEIGHTS_NAME}: not a readable safetensors file: {error}") from None
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise AdapterError(f"{directory}: the adapter does not load: {error}") from None
    wanted = adapter_state(loaded)
    missing, extra = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    if missing or extra:
        raise AdapterError(
            f"{directory}: the adapter does not belong to this base: {len(missing)} tensors missing "
            f"(first {missing[:2]}), {len(extra)} left over (first {extra[:2]})"
        )
    norms = lora_b_norms(stored)
    if norms and not any(norms.values()):
        raise AdapterError(f"{directory}: every lora_B is zero: this adapter was never trained")
    return loaded


def read_keys(directory: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a saved adapter's tensors, from the header alone."""
    with safe_open(directory / WEIGHTS_NAME, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def describe_settings(settings: LoraSettings, pattern: str) -> dict[str, Any]:
    """What makes two adapters interchangeable for a resume."""
    return {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "targets": pattern,
        "rslora": settings.rslora,
        "dora": settings.dora,
        "modules_to_save": list(settings.modules_to_save),
    }


def stored_base(directory: Path) -> str | None:
    """The base an adapter says it was trained on.

    Raises:
        AdapterError: no readable adapter_config.json.
    """
    try:
        return json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise AdapterError(f"{directory}/{CONFIG_NAME}: not readable: {error}") from None

"""LoRA adapters on a model: apply a fresh one, load a saved one, switch it, list what is trained, collect tensors."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from speechtune.config import LoraSettings
from speechtune.errors import AdapterError
from speechtune.family import Family
from speechtune.lora.files import StoredAdapter, read_adapter

ADAPTER = "default"
"""Name under which PEFT keeps the adapter that is trained here; others on the model belong to its base."""


@dataclass(frozen=True, slots=True)
class ComponentCount:
    """Parameters of one component of the model: those of the base, and those trained (an adapter's included)."""

    component: str
    total: int
    trainable: int


def target_pattern(family: Family, settings: LoraSettings) -> str:
    """The regex over module names that a preset or the user's own regex stands for."""
    return family.lora_presets.get(settings.targets, settings.targets)


def interchangeable(family: Family, settings: LoraSettings) -> Mapping[str, object]:
    """What must be the same for a resume to go on with another run's adapter."""
    values = settings.model_dump(mode="json", exclude={"enabled", "dropout"})
    return values | {"targets": target_pattern(family, settings)}


def matching_modules(model: nn.Module, pattern: str) -> list[str]:
    """Names of the linear layers a pattern matches in full, as PEFT matches them.

    Raises AdapterError: the pattern is no regex, or matches nothing.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise AdapterError(f"lora.targets={pattern!r}: neither a preset nor a valid regex: {error}") from None
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | LoraLayer)]
    names = [name for name in linear if regex.fullmatch(name)]
    if not names:
        examples = ", ".join(sorted({name for name in linear if "layers.0." in name})[:6])
        raise AdapterError(
            f"lora.targets={pattern!r} matches none of the model's {len(linear)} linear layers; their names look like: "
            f"{examples}"
        )
    return names


def apply_lora(model: nn.Module, family: Family, settings: LoraSettings, seed: int) -> PeftModel:
    """Freeze the base and inject a fresh adapter with float32 weights, in place; with one seed all ranks start alike.

    Raises AdapterError: the targets match nothing.
    """
    pattern = target_pattern(family, settings)
    matching_modules(plain_model(model), pattern)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides by it; a float is fine
        lora_dropout=settings.dropout,
        target_modules=pattern,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        modules_to_save=list(settings.modules_to_save) or None,
        trainable_token_indices=family.token_indices(settings.trainable_tokens) or None,
    )
    torch.manual_seed(seed)
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(ADAPTER, lora)
            adapted = model
        else:
            adapted = cast(PeftModel, get_peft_model(model, lora))  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise AdapterError(f"lora: PEFT cannot apply the adapter: {error}") from None
    activate(adapted)
    for parameter in trainable(adapted).values():
        parameter.data = parameter.data.float()  # PEFT leaves modules_to_save in the base's dtype
    on_meta = next(adapted.parameters()).is_meta  # a skeleton, for counting
    if not on_meta and family.initial_adapter is not None:
        _start_from(adapted, family.initial_adapter)
    return adapted


def plain_model(model: nn.Module) -> nn.Module:
    """The model inside a PEFT wrapper, adapters injected, or the model itself."""
    return cast(nn.Module, model.get_base_model()) if isinstance(model, PeftModel) else model


def carried_adapters(model: PeftModel) -> list[str]:
    """Frozen adapters that belong to the base: all but the one this package trains."""
    return [name for name in model.peft_config if name != ADAPTER]


def activate(model: PeftModel) -> None:
    """Switch every adapter on and let only our own be trained."""
    carried = carried_adapters(model)
    if not carried:
        return
    cast(Any, model.base_model).set_adapter([*carried, ADAPTER])  # PEFT had silently switched the others off
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and not any(f".{other}." in f"{name}." for other in carried))


@contextmanager
def adapter_off(model: PeftModel) -> Iterator[None]:
    """Switch our own adapter off inside a `with` block: the base answers, with the adapters that belong to it."""
    carried = carried_adapters(model)
    if not carried:
        with model.disable_adapter():
            yield
        return
    cast(Any, model.base_model).set_adapter(carried)
    try:
        yield
    finally:
        activate(model)


def _start_from(adapted: PeftModel, directory: Path) -> None:
    """Copy a saved adapter's weights into a fresh one of the same shape."""
    source, live = read_adapter(directory), adapter_state(adapted)
    has, asked = (_scale(config) for config in (source.config, adapted.peft_config[ADAPTER]))
    if has != asked:
        raise AdapterError(f"{directory}: the adapter to go on from has {has}, this run's lora section says {asked}")
    stored = source.tensors
    if {name: t.shape for name, t in stored.items()} != {name: t.shape for name, t in live.items()}:
        raise AdapterError(
            f"{directory}: the adapter to go on from has other tensors than this run's: {len(stored)} and {len(live)}, "
            f"only there {sorted(set(stored) - set(live))[:2]}, only here {sorted(set(live) - set(stored))[:2]}; set "
            "lora.targets to what it adapts, without modules_to_save or trainable_tokens"
        )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(stored[name])  # the state's tensors share memory with the parameters


def _scale(config: PeftConfig) -> dict[str, object]:
    """What, besides its tensors, says how strongly an adapter changes its base."""
    assert isinstance(config, LoraConfig)
    return {"rank": config.r, "alpha": config.lora_alpha, "rslora": config.use_rslora, "dora": config.use_dora}


def freeze(model: nn.Module, pattern: str) -> list[str]:
    """Freeze the parameters whose full name matches, and return their names.

    Raises AdapterError: the pattern is no regex, or matches nothing.
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


def count_by_component(model: nn.Module, family: Family) -> list[ComponentCount]:
    """Parameters of the base, and trainable ones, of each component of the model, largest first."""
    totals: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        row = totals.setdefault(family.component(name), [0, 0])
        row[0] += 0 if "lora_" in name else parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    ordered = sorted(totals.items(), key=lambda item: -item[1][0])
    return [ComponentCount(component, total, trained) for component, (total, trained) in ordered]


def adapter_state(model: PeftModel, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names they have on disk; `state` are the model's at another moment."""
    return get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)


def load_adapter(model: nn.Module, stored: StoredAdapter) -> PeftModel:
    """Put a saved adapter onto its base for inference, and refuse what PEFT only warns about.

    Raises AdapterError: missing or extra keys, other shapes, another layout (the message names the command to convert).
    """
    config = copy.deepcopy(stored.config)
    config.inference_mode = True
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(ADAPTER, config)
            loaded = model
        else:
            loaded = PeftModel(cast(PreTrainedModel, model), config, ADAPTER)
        set_peft_model_state_dict(loaded, dict(stored.tensors), ADAPTER)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        reason = stored.layout_hint or f"the adapter does not load: {error}"
        raise AdapterError(f"{stored.directory}: {reason}") from None
    activate(loaded)
    wanted = adapter_state(loaded)
    missing, extra = sorted(set(wanted) - set(stored.tensors)), sorted(set(stored.tensors) - set(wanted))
    if missing or extra:
        reason = stored.layout_hint or (
            f"the adapter does not belong to this base: {len(missing)} tensors missing (first {missing[:2]}), "
            f"{len(extra)} left over (first {extra[:2]})"
        )
        raise AdapterError(f"{stored.directory}: {reason}")
    return loaded.eval()


def model_tensors(model: nn.Module, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The tensors a save of this model must hold: the adapter's, or all of a model trained in full.

    `state` holds the model's tensors at another moment, by its own names; None takes those it has now.
    """
    if isinstance(model, PeftModel):
        return adapter_state(model, state)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}  # a tied head is saved once, under the embedding's name
    tensors = model.state_dict() if state is None else state
    return {name: tensor for name, tensor in tensors.items() if name not in tied}

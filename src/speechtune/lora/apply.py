"""LoRA adapters on a model: apply a fresh one, load a saved one, switch it, list what is trained, collect tensors."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from speechtune.config import LoraSettings
from speechtune.errors import AdapterError, ConfigError
from speechtune.family import NATIVE, Family
from speechtune.lora.additions import addition_state, addition_tensors
from speechtune.lora.base_identity import check_base
from speechtune.lora.files import OTHER_TARGETS, StoredAdapter, adapter_folder, addition_files, read_adapter
from speechtune.lora.layouts import in_layout
from speechtune.lora.strength import set_strength
from speechtune.precision import PrecisionPlan

ADAPTER = "default"
"""Name under which PEFT keeps the adapter that is trained here; others on the model belong to its base."""
OUR_NAMES = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "use_dora": "dora"}
FREE = re.compile(
    "peft_type|task_type|auto_mapping|peft_version|base_model_name_or_path|revision|inference_mode|lora_dropout|bias|"
    "(target|exclude)_modules|layers_(to_transform|pattern)|modules_to_save|trainable_token_indices|megatron_core|"
    "(runtime|eva|corda|loftq|lora_ga)_config|ensure_weight_tying"
)
"""What two configurations of adapters with the same tensors may have different without another answer."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that take from the base's weights what they put into the adapter."""
EMBEDDING = re.compile(r"\.(embed_tokens|lm_head)\.")


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
    values = settings.model_dump(mode="json", exclude={"enabled", "dropout", "initial"})
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


def open_initial(family: Family, settings: LoraSettings) -> StoredAdapter | None:
    """The adapter that `lora.initial` names, in the native layout; None where it names none.

    Raises AdapterError, ConfigError: as `read_adapter` and `require_usable`.
    """
    if settings.initial is None:
        return None
    stored = read_adapter(adapter_folder(settings.initial), family.adapter_layouts)
    require_usable(family, stored)
    return in_layout(stored, NATIVE, family.adapter_layouts)


def require_usable(family: Family, stored: StoredAdapter) -> None:
    """Refuse an adapter that no base of the family could carry.

    Raises AdapterError: it changes what none of the family may; ConfigError: its base could have been prepared in
    several ways, none of them named.
    """
    issues = family.adapter_issues(stored.config, stored.tensors, stored.directory)
    if refused := [issue.message for issue in issues if issue.severity == "error"]:
        raise AdapterError(f"{stored.directory}: {'; '.join(refused)}")
    if stored.identity is None and (question := family.unclear_base(stored.tensors)):
        raise ConfigError(f"{stored.directory}: {question}")


def load_base(family: Family, plan: PrecisionPlan, stored: StoredAdapter | None) -> nn.Module:
    """Load the base, which must be the one that an adapter was trained on, where it is known.

    Raises ConfigError: it does not load, or nothing says how it was prepared; AdapterError: it is another one.
    """
    if stored is None:
        return family.load(plan)
    require_usable(family, stored)
    base = family.load(plan)
    if stored.identity:
        check_base(stored.identity, stored.directory, family, base, plan)
    return base


def apply_lora(
    model: nn.Module, family: Family, settings: LoraSettings, seed: int, initial: StoredAdapter | None = None
) -> PeftModel:
    """Freeze the base and inject an adapter with float32 weights, in place; with one seed all ranks start alike.

    It starts from the weights of `initial` or of the family's own initial adapter, else afresh.

    Raises AdapterError: the targets match nothing, or the initial adapter is of another shape or scale.
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
    if initial is None and not is_skeleton(adapted) and family.initial_adapter is not None:
        initial = read_adapter(family.initial_adapter)
    if initial is not None:
        _start_from(adapted, initial)
    return adapted


def is_skeleton(model: nn.Module) -> bool:
    """Whether a model is without weights, for counting and matching."""
    return next(model.parameters()).is_meta


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


def _start_from(adapted: PeftModel, source: StoredAdapter) -> None:
    """Copy a saved adapter's weights into a fresh one of the same shape and scale; a skeleton is only compared."""
    has, asked = (_scale(cast(LoraConfig, config)) for config in (source.config, adapted.peft_config[ADAPTER]))
    if has != asked:
        names = [name for name in {**has, **asked} if has.get(name) != asked.get(name)]
        theirs, ours = ({name: values.get(name) for name in names} for values in (has, asked))
        raise AdapterError(
            f"{source.directory}: the adapter to start from has {theirs}, this run's lora section says {ours}"
        )
    live, base = adapter_state(adapted), adapted.state_dict()
    stored = {name: t for name, t in source.tensors.items() if name in live or not _is_same(t, base.get(name))}
    if {name: t.shape for name, t in stored.items()} != {name: t.shape for name, t in live.items()}:
        raise AdapterError(
            f"{source.directory}: the adapter to start from has other tensors than this run's: {len(stored)} and "
            f"{len(live)}, only there {sorted(set(stored) - set(live))[:2]}, only here "
            f"{sorted(set(live) - set(stored))[:2]}; set lora.targets, lora.modules_to_save and lora.trainable_tokens "
            "to what it adapts"
        )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(stored[name])  # the state's tensors share memory with the parameters


def _is_same(stored: torch.Tensor, own: torch.Tensor | None) -> bool:
    """Whether a tensor is one of the base's, carried along as PEFT's save_embedding_layers does."""
    if own is None or own.shape != stored.shape:
        return False
    return own.is_meta or torch.equal(stored.to(own), own)


def _scale(config: LoraConfig) -> dict[str, object]:
    """What, besides its tensors, decides on what an adapter adds to its base."""
    items = cast(dict[str, object], config.to_dict()).items()
    values = {OUR_NAMES.get(name, name): value or None for name, value in items if not FREE.fullmatch(name)}
    if not str(config.init_lora_weights).startswith(CHANGES_BASE):
        del values["init_lora_weights"]
    return values


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
    added = {place for place, _, _ in addition_state(model)}
    for name, parameter in model.named_parameters():
        row = totals.setdefault(family.component(name), [0, 0])
        row[0] += 0 if "lora_" in name or name in added else parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    ordered = sorted(totals.items(), key=lambda item: -item[1][0])
    return [ComponentCount(component, total, trained) for component, (total, trained) in ordered]


def adapter_state(
    model: PeftModel,
    state: Mapping[str, torch.Tensor] | None = None,
    *,
    embeddings: bool = False,
    name: str = ADAPTER,
) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names they have on disk; `state` are the model's at another moment.

    `embeddings` adds those of the base's embeddings that PEFT's save_embedding_layers puts beside them.
    """
    return get_peft_model_state_dict(model, state_dict=state, adapter_name=name, save_embedding_layers=embeddings)


def lora_b(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every lora_B of the adapter that is trained; empty for a full model."""
    state = adapter_state(model) if isinstance(model, PeftModel) else {}
    return {name: tensor for name, tensor in state.items() if "lora_B" in name}


def fit_issues(model: PeftModel, tensors: Mapping[str, torch.Tensor], name: str = ADAPTER) -> list[str]:
    """How the tensors of a saved adapter differ from those that a model, with its configuration applied, has for it."""
    wanted, known = adapter_state(model, name=name), adapter_state(model, embeddings=True, name=name)
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(known))
    issues = [f"{len(missing)} tensors missing (first {missing[0]})"] if missing else []
    issues += [f"{len(extra)} left over (first {extra[0]})"] if extra else []
    for key in sorted(known.keys() & tensors.keys()):
        has, wants = tuple(tensors[key].shape), tuple(known[key].shape)
        if has == wants:
            continue
        issues.append(f"{key}: shape {has}, the base wants {wants}")
        if EMBEDDING.search(key) and max(has) != max(wants):
            return [
                f"the adapter was trained with a vocabulary of {max(has)} tokens, the base has {max(wants)} ({key}): "
                "give the base as many with transformers' resize_token_embeddings, save it, and name that folder"
            ]
    return issues


def load_adapter(model: nn.Module, stored: StoredAdapter, name: str = ADAPTER) -> PeftModel:
    """Put a saved adapter onto its base for inference at its strength, and refuse what PEFT only warns about.

    Under another name than our own it is loaded, but not switched on.

    Raises AdapterError: missing or extra keys, other shapes, another layout (the message names the command to convert);
    a strength other than 1 of an adapter that came with another base, or with modules trained beside it.
    """
    if stored.strength != 1 and str(stored.config.init_lora_weights).startswith(CHANGES_BASE):
        raise AdapterError(
            f"{stored.directory}: no strength but 1: {stored.config.init_lora_weights} changed the base's weights when "
            "the training began, so less of the adapter is not nearer to the base"
        )
    if stored.strength != 1 and (beside := addition_files(stored.directory)):
        raise AdapterError(
            f"{stored.directory}: no strength but 1: less of the adapter with all of {beside[0].name}, which was "
            "trained with it, is not nearer to the base"
        )
    config = copy.deepcopy(stored.config)
    config.inference_mode = True
    try:
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            loaded = model
        else:
            loaded = PeftModel(cast(PreTrainedModel, model), config, name)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        reason = stored.layout_hint or f"the adapter does not load: {error}; {OTHER_TARGETS}"
        raise AdapterError(f"{stored.directory}: {reason}") from None
    if issues := fit_issues(loaded, stored.tensors, name):
        loaded.delete_adapter(name)
        reason = stored.layout_hint or f"the adapter does not belong to this base: {'; '.join(issues[:3])}"
        raise AdapterError(f"{stored.directory}: {reason}")
    set_peft_model_state_dict(loaded, dict(stored.tensors), name)
    set_strength(loaded, name, stored.strength)
    if name == ADAPTER:
        activate(loaded)
    return loaded.eval()


def model_tensors(model: nn.Module, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The tensors a save of this model must hold, under their names on disk: the adapter's, or all of a full model.

    `state` holds the model's tensors at another moment, by its own names; None takes those it has now.
    """
    if isinstance(model, PeftModel):
        return adapter_state(model, state) | addition_tensors(model, state)
    tensors = saved_once(model, model.state_dict() if state is None else state)
    # transformers renames what a newer class has moved, so that files keep the names that older releases know.
    return revert_weight_conversion(model, tensors) if isinstance(model, PreTrainedModel) else tensors


def saved_once(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A full model's state without the names of tied parameters under which transformers does not save them."""
    ties = cast(Mapping[str, str], getattr(model, "all_tied_weights_keys", {}))
    tied = {name for name, kept in ties.items() if model.get_parameter(name) is model.get_parameter(kept)}
    return {name: tensor for name, tensor in state.items() if name not in tied}

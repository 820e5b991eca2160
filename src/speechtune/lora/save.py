"""Save the LoRA adapter of any training script: unwrapped, checked, written, read back, compared."""

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import distributed, nn

from speechtune.errors import AdapterError, CheckpointError, SpeechtuneError
from speechtune.lora.additions import addition_tensors, save_additions
from speechtune.lora.base_identity import RECIPE_NAME
from speechtune.lora.files import BIN_NAME, CARD_NAME, CONFIG_NAME, FOLDER_NAME, WEIGHTS_NAME
from speechtune.lora.prompts import PROMPTS_NAME
from speechtune.storage.verified_folder import MANIFEST_NAME, check_place, log_saved, write_verified

log = logging.getLogger("speechtune.saving")

ADAPTER_FILES = frozenset({WEIGHTS_NAME, BIN_NAME, CONFIG_NAME, CARD_NAME, RECIPE_NAME, PROMPTS_NAME, MANIFEST_NAME})
COMPILED_PART = "_orig_mod."  # torch.compile puts it into the names of what it wraps: no plain base has them
SHARDED_TYPES = ("DTensor", "FlatParameter")  # of parameters
NO_SHARDS = "FSDP and DeepSpeed ZeRO-3 are not supported here; train the adapter with DDP, or save the full state dict"
STARTS_AT_ZERO = ("lora_B", "lora_embedding_A")  # so that a fresh adapter of PEFT changes nothing


def save_lora_adapters(
    model: nn.Module,
    output_dir: Path | str,
    *,
    replace: bool = True,
    model_card: str | None = None,
    notes: Mapping[str, str] | None = None,
    allow_untrained: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    state_dict: Mapping[str, torch.Tensor] | None = None,
    is_main_process: bool | None = None,
) -> Path:
    """Save the LoRA adapter inside `model` as a folder that plain PEFT loads, and prove it by reading it back.

    Args:
        model: a PeftModel, or any module that holds one: DDP, torch.compile, accelerate's or one's own wrapper.
        output_dir: the adapter's own folder; it appears only when complete.
        replace: put it in the place of an older adapter; a folder holding anything else is never replaced.
        model_card: text of README.md (default: PEFT's card).
        notes: further texts beside the weights, by file name.
        allow_untrained: accept an adapter whose every lora_B is still zero.
        save_embedding_layers: as PEFT's option; "auto" adds the embeddings of a resized vocabulary.
        state_dict: the model's gathered tensors under its own names, where the model has only shards of them (FSDP2).
        is_main_process: whether this process writes (default: torch.distributed's rank 0); the others return at once.

    Raises AdapterError: no PeftModel or several, sharded, never trained, or NaN; CheckpointError: the place cannot be
    written, or the files read back different; an older folder is untouched.
    """
    directory = Path(output_dir)
    is_first = not distributed.is_initialized() or distributed.get_rank() == 0
    if not (is_first if is_main_process is None else is_main_process):
        return directory
    log.info("LoRA flag is set, attempting to save LoRA adapters...")
    try:
        peft_model = find_peft_model(model)
        inside = f", found inside {type(model).__name__}" if peft_model is not model else ""
        log.info("Model to save type: %s%s", type(peft_model).__name__, inside)
        name = trained_adapter(peft_model)
        state = named_state(peft_model, name, save_embedding_layers, state_dict)
        embeddings = len(state) > len(named_state(peft_model, name, False, state_dict))
        _check_state(state, allow_untrained)
        beside = addition_tensors(peft_model, state_dict)
        _prepare_place(directory, state, replace, {name.partition(".")[0] for name in beside})
        texts = {**(notes or {}), **({} if model_card is None else {CARD_NAME: model_card})}
        tensors = {key.replace(COMPILED_PART, ""): tensor for key, tensor in state.items()} | beside

        def write(aside: Path) -> None:
            _write(peft_model, name, aside, embeddings, state_dict)
            save_additions(peft_model, aside, state_dict)
            for file_name, text in texts.items():
                (aside / file_name).write_text(text, encoding="utf-8")

        write_verified(directory, write, tensors, replace=replace)
    except SpeechtuneError as error:
        log.error("Saving LoRA adapters to %s failed: %s: %s", directory, type(error).__name__, error)
        log.debug("where it failed:", exc_info=True)
        raise
    log_saved(directory, tensors)
    log.info("LoRA adapters saved and verified in %s", directory)
    return directory


def find_peft_model(model: nn.Module) -> PeftModel:
    """The one PeftModel that `model` is or holds, registered as a submodule or kept as a plain attribute.

    Raises AdapterError: none, more than one, or one sharded by FSDP.
    """
    modules = list(_reachable(model))
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in modules):
        raise AdapterError(f"{type(model).__name__} is sharded: {NO_SHARDS}")
    peft_models = [module for module in modules if isinstance(module, PeftModel)]
    if len(peft_models) == 1:
        return peft_models[0]
    if peft_models:
        kinds = ", ".join(type(module).__name__ for module in peft_models)
        raise AdapterError(
            f"{type(model).__name__} holds {len(peft_models)} PeftModels ({kinds}): pass the one to save; if one lies "
            "in the other, get_peft_model was applied twice"
        )
    if any("lora_" in name for module in modules for name, _ in module.named_parameters()):
        raise AdapterError(
            f"{type(model).__name__} has LoRA layers but is no PeftModel (model.add_adapter or inject_adapter_in_model "
            "made them): build it with peft.get_peft_model(model, LoraConfig(...))"
        )
    raise AdapterError(
        f"there is no LoRA adapter to save: got {type(model).__name__}, which neither is nor holds a PeftModel; "
        "get_peft_model was never applied to it, or its result was not the model handed to the trainer"
    )


def trained_adapter(model: PeftModel) -> str:
    """Name of the adapter being trained, or of the active one where nothing is trainable any more.

    Raises AdapterError: several, or none.
    """
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    names = [name for name in model.peft_config if any(f".{name}." in f"{one}." for one in trainable)]
    names = names or list(model.active_adapters)
    if len(names) != 1:
        raise AdapterError(
            f"the model has the adapters {sorted(model.peft_config)}, and {names or 'none'} of them to save: make the "
            "wanted one the only active one with model.set_adapter(name)"
        )
    return names[0]


def named_state(
    model: PeftModel,
    name: str,
    save_embedding_layers: bool | Literal["auto"] = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """One adapter's tensors under the names they have on disk; they share memory with the model, or with `state_dict`.

    Raises AdapterError: the tensors are sharded over processes, or PEFT cannot collect them.
    """
    sharded = [
        key
        for key, p in model.named_parameters()
        if type(p).__name__ in SHARDED_TYPES or hasattr(p, "ds_id") or (p.is_meta and f".{name}." in key)
    ]
    if sharded and state_dict is None:
        raise AdapterError(f"{len(sharded)} parameters are sharded or not in memory ({sharded[0]}): {NO_SHARDS}")
    try:
        return get_peft_model_state_dict(
            model, state_dict=state_dict, adapter_name=name, save_embedding_layers=save_embedding_layers
        )
    except (KeyError, ValueError, RuntimeError) as error:
        raise AdapterError(f"PEFT cannot collect the tensors of adapter {name!r}: {error}") from error


def _reachable(model: nn.Module) -> Iterator[nn.Module]:
    """Every module under `model` once, also those held as plain attributes, which `modules()` does not see."""
    seen: set[int] = set()
    waiting: list[Any] = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, nn.Module) and id(module) not in seen:
            seen.add(id(module))
            yield module
            waiting += [*module.children(), *vars(module).values()]


def _check_state(state: Mapping[str, torch.Tensor], allow_untrained: bool) -> None:
    b_parts = {key: tensor for key, tensor in state.items() if any(mark in key for mark in STARTS_AT_ZERO)}
    if not b_parts:
        raise AdapterError(f"the adapter has no lora_B among its {len(state)} tensors: it is no LoRA adapter")
    broken = [key for key, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise AdapterError(
            f"{len(broken)} of {len(state)} adapter tensors hold NaN or infinity (first {broken[0]}): the training "
            "broke down before this save; keep the adapter's weights in float32 and go back to an earlier checkpoint"
        )
    if not log_adapter(state) and not allow_untrained:
        raise AdapterError(
            f"all {len(b_parts)} lora_B are exactly zero: this adapter was never trained. Was another object trained "
            "than the one saved? Pass allow_untrained=True to save it anyway"
        )


def log_adapter(state: Mapping[str, torch.Tensor]) -> int:
    """Say what an adapter to be saved holds; the number of its lora_B that are no longer zero."""
    b_parts = [tensor for key, tensor in state.items() if any(mark in key for mark in STARTS_AT_ZERO)]
    moved, count = sum(bool(tensor.any()) for tensor in b_parts), sum(tensor.numel() for tensor in state.values())
    log.info("Adapter: %d tensors, %d parameters, %d of %d lora_B trained", len(state), count, moved, len(b_parts))
    return moved


def _prepare_place(
    directory: Path, state: Mapping[str, torch.Tensor], replace: bool, additions: Collection[str]
) -> None:
    """Prove that the folder can be written and replaces nothing but an older adapter, with `additions` or without."""
    if directory.exists():
        if not directory.is_dir():
            raise CheckpointError(f"{directory}: a file stands where a folder should be: remove it or save elsewhere")
        own = ADAPTER_FILES | {f"{name}.safetensors" for name in additions}
        others = sorted(path.name for path in directory.iterdir() if path.name not in own)
        if others:
            raise CheckpointError(
                f"{directory}: holds more than an adapter ({', '.join(others[:5])}) and will not be replaced; name "
                f"a folder of its own, such as {directory / FOLDER_NAME}"
            )
        if not replace:
            raise CheckpointError(f"{directory}: exists already; remove it, choose another, or pass replace=True")
    check_place(directory.parent, sum(tensor.nbytes for tensor in state.values()))


def _write(
    peft_model: PeftModel,
    name: str,
    aside: Path,
    embeddings: bool,
    state_dict: Mapping[str, torch.Tensor] | None,
) -> None:
    try:
        peft_model.save_pretrained(
            str(aside), selected_adapters=[name], save_embedding_layers=embeddings, state_dict=state_dict
        )
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"PEFT could not write adapter {name!r}: {type(error).__name__}: {error}") from error
    named = aside / name  # PEFT gives every adapter but "default" a folder of its own
    if named.is_dir():
        for path in list(named.iterdir()):
            path.rename(aside / path.name)
        named.rmdir()
    if any(COMPILED_PART in key for key, _ in peft_model.named_parameters()):
        stored = load_file(aside / WEIGHTS_NAME)
        plain = {key.replace(COMPILED_PART, ""): tensor for key, tensor in stored.items()}
        save_file(plain, aside / WEIGHTS_NAME, metadata={"format": "pt"})

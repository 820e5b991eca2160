"""Checkpoints: what is trained, the optimizer and the random states, saved and put back to the bit."""

import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, cast

import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from speechtune.errors import CheckpointError
from speechtune.lora.additions import addition_state, save_additions
from speechtune.lora.apply import ADAPTER, model_tensors, saved_once, trainable
from speechtune.lora.files import WEIGHTS_NAME, in_checkpoint
from speechtune.lora.save import log_adapter
from speechtune.storage.verified_folder import (
    MANIFEST_NAME,
    STATE_NAME,
    check_place,
    find_checkpoints,
    log_saved,
    newest_valid,
    read_state,
    saves,
    share_files,
    verify_folder,
    write_verified,
)
from speechtune.tensors import gather, is_sharded, set_rng_state, shard_like

log = logging.getLogger("speechtune")

OPTIMIZER_NAME = "optimizer.pt"
RNG_NAME = "rng_state.pt"
NOT_OF_THE_MODEL = {OPTIMIZER_NAME, RNG_NAME, "config.yaml", STATE_NAME, MANIFEST_NAME}
ADAM_MOMENTS = 2


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands; `identity` is what must be the same for a resume to mean anything, `initial` as in `Job`."""

    step: int
    total_steps: int
    epoch: float
    identity: Mapping[str, Any]
    losses: Mapping[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best_value: float | None = None
    rounds_without_better: int = 0
    initial: Mapping[str, str] | None = None


@dataclass(frozen=True)
class RunParts:
    """What the checkpoints of a run hold besides its state: what is trained, and the files that go with it.

    Attributes:
        config_yaml: the recipe, as text.
        notes: texts by file name that lie beside the weights.
        write_assets: writes what the folder of a full model needs besides weights and config.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    config_yaml: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    write_assets: Callable[[Path], None] = lambda directory: None


def checkpoint_writer(
    directory: Path,
    parts: RunParts,
    state: RunState,
    rng_states: list[dict[str, torch.Tensor]],
    *,
    copy: bool,
    keep: bool = True,
) -> Callable[[], Path]:
    """Return the function that writes one checkpoint, with the random states of every rank, and verifies it.

    Shards are gathered here, so every rank must call this; `keep` says whether this one will call the function.
    With `copy`, what is trained is copied now, so that training may go on while the function runs.
    """
    model, optimizer = parts.model, parts.optimizer
    copy = copy or is_sharded(model)
    weights = weights_of(model) if copy or isinstance(model, PeftModel) else None
    if copy:
        weights = cpu_copy(weights, keep=keep)
    optimizer_state = cpu_copy(optimizer.state_dict(), keep=keep) if copy else optimizer.state_dict()
    scaler_state = parts.scaler.state_dict()
    tensors = model_tensors(model, weights)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    bytes_needed = sum(t.nbytes for t in tensors.values()) + ADAM_MOMENTS * sum(p.nbytes for p in trained)

    def write(aside: Path) -> None:
        save_weights(model, aside, parts.notes, weights)
        torch.save({"optimizer": optimizer_state, "scaler": scaler_state}, aside / OPTIMIZER_NAME)
        torch.save(rng_states, aside / RNG_NAME)
        write_state(aside / STATE_NAME, state)
        (aside / "config.yaml").write_text(parts.config_yaml, encoding="utf-8")
        if not isinstance(model, PeftModel):
            parts.write_assets(aside)

    def publish() -> Path:
        saves.info("Model to save type: %s", type(model).__name__)
        if isinstance(model, PeftModel):
            log_adapter(tensors)
        check_place(directory.parent, bytes_needed)
        # Only a folder that did not verify can stand at a step that is reached again: it gives way.
        write_verified(directory, write, tensors, replace=True)
        log_saved(directory, tensors)
        return directory

    return publish


def save_weights(
    model: nn.Module, directory: Path, notes: Mapping[str, str], state: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write a model's adapter, or the full model, with its notes into a folder; `state` as for `model_tensors`."""
    if isinstance(model, PeftModel):
        model.save_pretrained(
            str(directory), save_embedding_layers=False, state_dict=state, selected_adapters=[ADAPTER]
        )
    else:
        beside = {place for place, _, _ in addition_state(model)}
        if beside and state is None:
            state = weights_of(model)
        base = None if state is None else {name: tensor for name, tensor in state.items() if name not in beside}
        cast(PreTrainedModel, model).save_pretrained(directory, state_dict=base)
    save_additions(model, directory, state)
    for name, text in notes.items():
        (directory / name).write_text(text, encoding="utf-8")


def publish_model(checkpoint: Path, output_dir: Path) -> None:
    """Lay the full model of a checkpoint into the run's own folder, where `from_pretrained` finds it."""
    names = [path.name for path in checkpoint.iterdir() if path.is_file() and path.name not in NOT_OF_THE_MODEL]
    # config.json comes last: without it no half of a model is loaded.
    share_files(checkpoint, output_dir, sorted(names, key=lambda name: (name == "config.json", name)))
    log.info("the model of %s lies in %s", checkpoint.name, output_dir)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """What is trained, under the model's own names; of a full model everything it saves."""
    if not isinstance(model, PeftModel):
        return saved_once(model, model.state_dict())
    # PEFT stores the buffers of modules_to_save with them
    buffers = {name: buffer for name, buffer in model.named_buffers() if "modules_to_save" in name}
    beside = {place: tensor for place, _, tensor in addition_state(model)}
    return {name: parameter.detach() for name, parameter in trainable(model).items()} | buffers | beside


def cpu_copy(value: Any, *, keep: bool = True) -> Any:
    """Copy of nested mappings, lists and tensors to the CPU; sharded tensors are gathered, so every rank must call it.

    Without `keep` this rank takes part in the gathering and keeps its tensors as they are.
    """
    if isinstance(value, torch.Tensor):
        gathered = gather(value.detach())
        return gathered.to("cpu", copy=True) if keep else value
    if isinstance(value, Mapping):
        return {key: cpu_copy(item, keep=keep) for key, item in value.items()}
    return [cpu_copy(item, keep=keep) for item in value] if isinstance(value, list) else value


class Saver:
    """Runs saves one after another in a thread; with `background` training goes on meanwhile. An error ends the run."""

    def __init__(self, background: bool) -> None:
        self._background, self._pool = background, ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def submit(self, save: Callable[[], None]) -> None:
        """Start a save after the one before it; raises that one's error."""
        self.wait()
        self._pending = self._pool.submit(save)
        if not self._background:
            self.wait()

    def poll(self) -> None:
        """Raise the error of a save that has ended."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way; raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def write_state(path: Path, state: RunState) -> None:
    """Write where a run stands, as JSON."""
    path.write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")


def choose_checkpoint(output_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint a run goes on from, or None for a fresh start; says which were passed over and why."""
    if resume is None:
        return None
    if resume == "auto":
        chosen, passed_over = newest_valid(output_dir)
        for path, issue in passed_over:
            log.warning("resume passes over %s: %s", path, issue)
        if chosen is None:
            log.warning("checkpoint.resume=auto: nothing to resume in %s: the run begins at step 0", output_dir)
        else:
            log.info("resuming from %s", chosen)
        return chosen
    chosen = in_checkpoint(Path(resume))
    if issues := verify_folder(chosen):
        raise CheckpointError(f"{resume}: cannot resume from it: " + "; ".join(map(str, issues)))
    step = read_state(chosen)["step"]
    later = [path.name for n, path in find_checkpoints(output_dir) if n > step and not verify_folder(path)]
    if later:  # they would be taken for this branch's own by the next resume=auto
        raise CheckpointError(
            f"{resume}: {output_dir} holds later checkpoints ({', '.join(later)}): resume from the newest with "
            "checkpoint.resume=auto, remove them, or name another output_dir"
        )
    return chosen


def restore(
    directory: Path, parts: RunParts, identity: Mapping[str, Any], rank: int, *, force: bool = False
) -> RunState:
    """Put a verified checkpoint into a freshly built run; `force` turns differences of identity into warnings."""
    state = RunState(**read_state(directory))
    differences = [
        f"{name}: checkpoint {state.identity.get(name)!r}, this run {value!r}"
        for name, value in identity.items()
        if state.identity.get(name) != value
    ]
    if differences:
        message = f"{directory}: it is not a checkpoint of this run: {'; '.join(differences)}"
        if not force:
            raise CheckpointError(f"{message}; checkpoint.force=true resumes all the same")
        log.warning("%s; resumed by force", message)
    if changes := changed_options(directory, parts.config_yaml):
        log.warning("%s: the run goes on with other options than before: %s", directory, ", ".join(changes))
    restore_weights(parts.model, directory)
    saved = torch.load(directory / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
    parts.optimizer.load_state_dict(cut_optimizer_state(saved["optimizer"], parts.optimizer))
    parts.scaler.load_state_dict(saved["scaler"])
    rng_states = torch.load(directory / RNG_NAME, map_location="cpu", weights_only=True)
    if rank < len(rng_states):
        set_rng_state(rng_states[rank])
    else:
        log.warning("%s holds random states of %d ranks: dropout differs from there on", directory, len(rng_states))
    return state


def changed_options(checkpoint: Path, config_yaml: str) -> list[str]:
    """Options in which a recipe differs from the one that a checkpoint was trained with, as `NAME: OLD -> NEW`."""
    file = checkpoint / "config.yaml"
    then, now = _options(file.read_text(encoding="utf-8") if file.is_file() else ""), _options(config_yaml)
    names = [name for name in now if name in then and not name.startswith(("checkpoint.", "tracking."))]
    return [f"{name}: {then[name]} -> {now[name]}" for name in names if then[name] != now[name]]


def _options(config_yaml: str) -> dict[str, object]:
    sections: dict[str, object] = yaml.safe_load(config_yaml) or {}
    nested = {section: values for section, values in sections.items() if isinstance(values, dict)}
    return {f"{section}.{name}": value for section, values in nested.items() for name, value in values.items()}


def restore_weights(model: nn.Module, directory: Path) -> None:
    """Copy the weights of a checkpoint into a model of the same parts."""
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        stored.update(load_file(path))
    live = model_tensors(model)
    if {name: tensor.shape for name, tensor in stored.items()} != {name: t.shape for name, t in live.items()}:
        raise CheckpointError(f"{directory}/{WEIGHTS_NAME}: its tensors are not those of this run's model")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(shard_like(stored[name], tensor))  # the state's tensors share memory with the parameters


def cut_optimizer_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A saved optimizer state, its tensors cut as this rank's parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        number: {name: shard_like(value, parameters[number]) for name, value in moments.items()}
        for number, moments in state["state"].items()
    }
    return {**state, "state": cut}

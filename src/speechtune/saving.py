"""What the folders of a run hold, written through `checkpoint.write_verified` and read back on resume."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from speechtune.adapter import WEIGHTS_NAME, adapter_state
from speechtune.checkpoint import STATE_NAME, check_writable, newest_valid, read_state, verify_folder, write_verified
from speechtune.errors import CheckpointError

log = logging.getLogger("speechtune")

OPTIMIZER_NAME = "optimizer.pt"
RNG_NAME = "rng_state.pt"
ADAM_MOMENTS = 2
RETRY_SECONDS = 2


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands; `identity` holds what must be the same for a resume to mean anything."""

    step: int
    total_steps: int
    epoch: float
    identity: Mapping[str, Any]
    losses: Mapping[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best_eval_loss: float | None = None


def model_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors a save of this model must hold: the adapter's, or all of a model trained in full."""
    if isinstance(model, PeftModel):
        return adapter_state(model)
    return {name: tensor for name, tensor in model.state_dict().items()}


def save_weights(model: nn.Module, directory: Path, model_card: str) -> None:
    """Write a model's adapter, or the full model, into an existing folder."""
    if isinstance(model, PeftModel):
        model.save_pretrained(str(directory), save_embedding_layers=False)
        (directory / "README.md").write_text(model_card, encoding="utf-8")
    else:
        cast(PreTrainedModel, model).save_pretrained(directory)


def save_checkpoint(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    rng_states: list[dict[str, torch.Tensor]],
    state: RunState,
    config_yaml: str,
    write_extras: Callable[[Path], None],
    model_card: str,
) -> Path:
    """Publish one checkpoint: weights, optimizer, scaler, every rank's random state, run state and configuration."""

    def write(aside: Path) -> None:
        save_weights(model, aside, model_card)
        torch.save({"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}, aside / OPTIMIZER_NAME)
        torch.save(rng_states, aside / RNG_NAME)
        write_state(aside / STATE_NAME, state)
        (aside / "config.yaml").write_text(config_yaml, encoding="utf-8")
        if not isinstance(model, PeftModel):
            write_extras(aside)

    tensors = model_tensors(model)
    check_writable(directory.parent, bytes_of_save(tensors.values(), optimizer))
    # Only a folder that did not verify can stand at a step that is reached again: it gives way.
    return write_verified(directory, write, tensors, replace=True)


def bytes_of_save(tensors: Iterable[torch.Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Bytes that weights and optimizer states take on disk, once the optimizer has both moments."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    trained = sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
    return weights + ADAM_MOMENTS * trained


def twice(save: Callable[[], Path]) -> Path:
    """Call `save`, and once more if it fails: a full queue or a lagging network disk may pass.

    Raises:
        CheckpointError: the second attempt failed too.
    """
    try:
        return save()
    except CheckpointError as error:
        log.error("%s; trying once more in %d s", error, RETRY_SECONDS)
        time.sleep(RETRY_SECONDS)
        return save()


def write_state(path: Path, state: RunState) -> None:
    """Write the run state as JSON."""
    path.write_text(json.dumps(asdict(state), indent=1) + "\n", encoding="utf-8")


def choose_checkpoint(output_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint a run goes on from, or None for a fresh start; says which were passed over and why.

    Raises:
        CheckpointError: a named checkpoint does not verify.
    """
    if resume is None:
        return None
    if resume == "auto":
        chosen, passed_over = newest_valid(output_dir)
        for path, problem in passed_over:
            log.warning("resume passes over %s: %s", path, problem)
        log.info("resuming from %s", chosen) if chosen else log.info("nothing to resume in %s: a fresh run", output_dir)
        return chosen
    problems = verify_folder(Path(resume))
    if problems:
        raise CheckpointError(f"{resume}: cannot resume from it: " + "; ".join(map(str, problems)))
    return Path(resume)


def restore(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    identity: Mapping[str, Any],
    rank: int,
) -> RunState:
    """Put a verified checkpoint into a freshly built run.

    Raises:
        CheckpointError: it belongs to other data, another base or another adapter; each difference is named.
    """
    state = RunState(**read_state(directory))
    differences = [
        f"{name}: checkpoint {state.identity.get(name)!r}, this run {value!r}"
        for name, value in identity.items()
        if state.identity.get(name) != value
    ]
    if differences:
        raise CheckpointError(f"{directory}: it is not a checkpoint of this run: " + "; ".join(differences))
    _restore_weights(model, directory)
    saved = torch.load(directory / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    rng_states = torch.load(directory / RNG_NAME, map_location="cpu", weights_only=True)
    if rank < len(rng_states):
        set_rng_state(rng_states[rank])
    else:
        log.warning("%s holds random states of %d ranks: dropout differs from there on", directory, len(rng_states))
    return state


def _restore_weights(model: nn.Module, directory: Path) -> None:
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        stored.update(load_file(path))
    live = model_tensors(model)
    if {name: tensor.shape for name, tensor in stored.items()} != {name: t.shape for name, t in live.items()}:
        raise CheckpointError(f"{directory}/{WEIGHTS_NAME}: its tensors are not those of this run's model")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(stored[name])  # the state's tensors share memory with the parameters


def rng_state() -> dict[str, torch.Tensor]:
    """Random state of this process, as tensors (loadable without unpickling)."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(states: Mapping[str, torch.Tensor]) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

"""Microsoft's speech LoRA, without which Phi-4-multimodal cannot process audio: merged, continued, stacked or dropped.

`merge` adds it to the base's weights, and a new adapter learns on top; `continue` trains it further; `stack` keeps it
frozen and active beside the new adapter; `drop` leaves it out. Putting a new adapter on a base that carries it, as PEFT
and transformers do by default, would switch it off without a warning.
"""

import json
import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import nn

from speechtune.errors import AdapterError, ConfigError
from speechtune.families.phi4_multimodal.options import Phi4ModelConfig
from speechtune.lora.base_identity import RECIPE_NAME, check_weights
from speechtune.lora.files import lora_module, read_adapter, read_tensors, weights_file
from speechtune.storage.files import file_sha256

log = logging.getLogger("speechtune")

FOLDER = "speech-lora"
ADAPTER = "speech"
NEAR = 0.5
"""A LoRA trained further stays within this relative distance of its start; two drawn apart are more than 1 apart."""
MARKER = "speech_lora.json"
"""Lies in a model folder that speechtune has written: the speech LoRA is in its weights, or was left out."""


class SpeechLora:
    """The speech LoRA of a base, and its mode; nothing is read before it is needed."""

    def __init__(self, model: Phi4ModelConfig) -> None:
        self.model = model

    @cached_property
    def mode(self) -> str:
        """merge, continue, stack or drop as configured; "included" for a model folder that has it in its weights.

        Raises ConfigError: it is to be put into a model that has it.
        """
        wanted = self.model.speech_lora
        if read_marker(Path(self.model.path)):
            if wanted not in (None, "drop"):
                raise ConfigError(
                    f"model.speech_lora={wanted}: {self.model.path} is a model written by speechtune, and its {MARKER} "
                    "says which speech LoRA it has; leave model.speech_lora out"
                )
            return "included"
        return wanted or "merge"

    @cached_property
    def path(self) -> Path | None:
        """Its folder; None where none is needed.

        Raises ConfigError: there is none.
        """
        if self.mode in ("drop", "included"):
            return None
        given, model = self.model.speech_lora_path, Path(self.model.path)
        folder = Path(given) if given else model / FOLDER
        if not given and not model.is_dir():
            folder = self._download()
        if not folder.is_dir():
            raise ConfigError(
                f"model.speech_lora={self.mode}: no folder {folder}; the base cannot process audio without its speech "
                "LoRA: name it with model.speech_lora_path, or set model.speech_lora=drop for a base that needs none"
            )
        return folder

    def _download(self) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:  # the native weights stand at a revision of their own; the speech LoRA lies on the main branch
            root = snapshot_download(self.model.path, allow_patterns=[f"{FOLDER}/*"])
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise ConfigError(f"{self.model.path}/{FOLDER}: not to be had from the hub: {error}") from None
        return Path(root) / FOLDER

    def describe(self) -> dict[str, Any]:
        """Mode, and SHA-256 of the weights that were merged, stacked or continued."""
        try:
            sha256 = file_sha256(weights_file(self.path)) if self.path else None
        except ConfigError:
            if self.mode != "continue":
                raise
            sha256 = None  # an adapter that is the speech LoRA, trained further, can be used without the first one
        return {"mode": self.mode, "sha256": sha256}

    def unclear(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Ask for the mode where it was not named and an adapter of these tensors does not say it; else None."""
        if self.model.speech_lora is not None or self.mode == "included":
            return None
        return (
            f"it has no {RECIPE_NAME}, so nothing tells what became of the base's speech LoRA when it was trained, and "
            f"a wrong guess would show no error. {self._likeness(tensors)}. Say it with --speech-lora, in a recipe "
            "with model.speech_lora: continue if it is the speech LoRA itself, trained further; merge if trained "
            "on a base with the speech LoRA in its weights; stack if beside the speech LoRA; drop if without it"
        )

    def _likeness(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """Compare an adapter's tensors with those of the speech LoRA, in a clause."""
        try:
            released = read_tensors(weights_file(self.path)) if self.path else {}
        except (AdapterError, ConfigError) as error:
            return f"Its tensors cannot be compared with the speech LoRA's: {error}"
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in released.items()}:
            counts = f"Its {len(tensors)} tensors are not equal in names and shapes to the {len(released)} of the"
            return f"{counts} speech LoRA, so it is not that one, trained further"
        apart = [(tensors[name].float() - t.float()).norm() for name, t in released.items()]
        distance = float(torch.stack(apart).norm() / torch.stack([t.float().norm() for t in released.values()]).norm())
        place, like = ("near", "that one, trained further") if distance < NEAR else ("far from", "another one")
        return (
            f"Its tensors are equal in names and shapes to those of the speech LoRA, and {place} them (relative "
            f"distance {distance:.2g}): it looks like {like}"
        )

    def prepare(self, model: nn.Module) -> nn.Module:
        """Merge or stack the speech LoRA into `model`; with the other modes the base is returned as it is.

        Raises AdapterError: the folder is no sound LoRA of this model; ConfigError: NaN or infinity in the base.
        """
        if self.mode == "drop":
            log.warning("model.speech_lora=drop: Microsoft's base cannot process audio without its speech LoRA")
        if self.mode == "continue" or self.path is None:
            return model
        adapted = attach(model, self.path)
        if self.mode == "stack":
            return adapted
        try:
            return cast(Any, adapted).merge_and_unload(safe_merge=True)
        except ValueError as error:  # not finite; its own message blames the adapter
            check_weights(adapted, f"model.path={self.model.path}")
            raise AdapterError(f"{self.path}: cannot be merged into the base: {error}") from None


def attach(model: nn.Module, folder: Path) -> PeftModel:
    """Put a saved speech LoRA onto a native base as a frozen adapter, whatever its own target regex says.

    The released one names modules of the remote-code model; here the modules are those its tensors belong to.
    """
    adapter = read_adapter(folder)
    tensors, stored = dict(adapter.tensors), adapter.config
    wanted = sorted({module for name in tensors if (module := lora_module(name))})
    missing = sorted(set(wanted) - {name for name, _ in model.named_modules()})
    if missing:
        raise AdapterError(f"{folder}: the model has no {missing[0]} ({len(missing)} of {len(wanted)} modules missing)")
    config = LoraConfig(
        r=stored.r,
        lora_alpha=stored.lora_alpha,
        target_modules=wanted,
        use_rslora=stored.use_rslora,
        use_dora=stored.use_dora,
        inference_mode=True,
    )
    adapted = cast(PeftModel, get_peft_model(cast(Any, model), config, adapter_name=ADAPTER))
    try:
        result = set_peft_model_state_dict(adapted, tensors, adapter_name=ADAPTER)
    except RuntimeError as error:
        raise AdapterError(f"{folder}: its tensors do not fit the model: {error}") from None
    lost = [name for name in result.missing_keys if "lora_" in name] + list(result.unexpected_keys)
    if lost:
        raise AdapterError(f"{folder}: {len(lost)} tensors do not fit the model (first {lost[0]})")
    return cast(PeftModel, adapted.requires_grad_(False)).eval()


def read_marker(folder: Path) -> dict[str, Any]:
    """What a model folder says of its speech LoRA; empty where it says nothing."""
    file = folder / MARKER
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"mode": str(found["mode"]), "sha256": found["sha256"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not readable: {error}") from None


def write_marker(folder: Path, description: dict[str, Any]) -> None:
    """Say in a model folder what became of the speech LoRA."""
    (folder / MARKER).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")

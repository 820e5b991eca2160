"""Modules that a family adds to its base: trained in full beside the adapter, each saved in a file of its own.

PEFT's `modules_to_save` would put them into the adapter's file, and an adapter that names a module its base does not
have loads nowhere else.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


class Addition(nn.Module):
    """A module that is no part of the base as others know it; its file is named after it."""

    facts: Mapping[str, str] = {}
    """What must be known to use it again; kept in the header of its file."""


def additions(model: nn.Module) -> dict[str, Addition]:
    """The additions inside a model, however it is wrapped: place -> module."""
    return {place: module for place, module in model.named_modules() if isinstance(module, Addition)}


def addition_state(model: nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Of each tensor of the additions its name in the model, its name on disk, and itself."""
    for place, module in additions(model).items():
        for name, tensor in module.state_dict().items():
            yield f"{place}.{name}", f"{_file_stem(place)}.{name}", tensor


def addition_tensors(model: nn.Module, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of the additions under their names on disk; `state` are the model's at another moment."""
    return {name: tensor if state is None else state[place] for place, name, tensor in addition_state(model)}


def save_additions(model: nn.Module, directory: Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write every addition into a folder; `state` as for `addition_tensors`."""
    tensors = addition_tensors(model, state)
    for place, module in additions(model).items():
        stem = _file_stem(place)
        own = {name: tensor.contiguous() for name, tensor in tensors.items() if name.startswith(f"{stem}.")}
        save_file(own, directory / f"{stem}.safetensors", metadata={"format": "pt", **module.facts})


def _file_stem(place: str) -> str:
    return place.rpartition(".")[2]

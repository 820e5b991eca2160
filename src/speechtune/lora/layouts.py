"""Adapters whose tensors another package named: brought from one layout of names to another, values untouched."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from speechtune.family import NATIVE, AdapterLayout
from speechtune.lora.files import KEY_PREFIX, StoredAdapter, lora_module

Rename = Callable[[str], str]
T = TypeVar("T")


def in_layout(stored: StoredAdapter, to: str, layouts: Mapping[str, AdapterLayout]) -> StoredAdapter:
    """An adapter in another layout, NATIVE or one of `layouts`, its family's; it is native if its own is not there."""
    source = stored.layout if stored.layout and stored.layout in layouts else NATIVE
    if source == to:
        return stored

    def rename(name: str) -> str:
        native = name if source == NATIVE else layouts[source].to_native(name)
        return native if to == NATIVE else layouts[to].from_native(native)

    tensors = {KEY_PREFIX + rename(name.removeprefix(KEY_PREFIX)): tensor for name, tensor in stored.tensors.items()}
    return replace(stored, config=_renamed_config(stored, rename), tensors=tensors, layout=to)


def _renamed_config(stored: StoredAdapter, rename: Rename) -> LoraConfig:
    """The configuration for renamed tensors; targets that would no longer match become the list of the modules."""

    def module_name(name: str) -> str:
        return rename(f"{name}.").removesuffix(".")

    config = copy.copy(stored.config)
    config.auto_mapping = None  # names a class, which belongs to one layout only
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(names := getattr(config, key), list | set | tuple):
            setattr(config, key, [module_name(name) for name in sorted(names)])
    places = {module: module_name(module) for name in stored.tensors if (module := lora_module(name))}
    config.rank_pattern = _moved_pattern(config.rank_pattern or {}, places)
    config.alpha_pattern = _moved_pattern(config.alpha_pattern or {}, places)
    modules = sorted(places.values())
    fits = config.layers_to_transform is None and all(check_target_module_exists(config, name) for name in modules)
    if config.target_modules is not None and not fits:
        config.target_modules, config.layers_to_transform, config.layers_pattern = modules, None, None
    return config


def _moved_pattern(pattern: Mapping[str, T], places: Mapping[str, str]) -> dict[str, T]:
    """A rank or alpha pattern that gives each moved module what it gave it before: as it is, or module by module."""
    wanted = {new: pattern.get(get_pattern_key(list(pattern), old)) for old, new in places.items()}
    given = {new: pattern.get(get_pattern_key(list(pattern), new)) for new in places.values()}
    return dict(pattern) if wanted == given else {name: value for name, value in wanted.items() if value is not None}

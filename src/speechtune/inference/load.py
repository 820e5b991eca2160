"""Load a base model, with or without an adapter, for inference."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from speechtune.config import RunConfig
from speechtune.errors import ConfigError
from speechtune.families import adapter_layouts, build_config, create_family, family_of
from speechtune.family import Ability, Family
from speechtune.lora.apply import load_adapter, load_base
from speechtune.lora.files import StoredAdapter, adapter_folder, read_adapter
from speechtune.precision import PrecisionPlan, plan_precision

ELSEWHERE: dict[Ability, str] = {
    "speak": "ask it with `speechtune score`",
    "assess pronunciation": "name one of Phi-4-multimodal, or an adapter trained for it",
}
"""What to do instead with a model without an ability."""
NO_ADAPTER = "--strength says how much of an adapter counts: name one with --adapter"


def open_adapter(path: Path, strength: float = 1.0) -> StoredAdapter:
    """Read and check an adapter, whatever layout its names follow: its folder, or that of its run or checkpoint.

    `strength` says how much of it counts where it is loaded.

    Raises AdapterError: as `lora.files.read_adapter`.
    """
    return replace(read_adapter(adapter_folder(path), adapter_layouts()), strength=strength)


def model_config(
    model: str | None, options: Mapping[str, str] | None, adapter: StoredAdapter | None = None
) -> RunConfig:
    """A configuration for using a model; the base defaults to the one the adapter names.

    `options` are those of the recipe's `model:` that were given on the command line.

    Raises ConfigError: neither a model nor an adapter that names one, or an option that the family does not have.
    """
    recipe = adapter.identity if adapter else None
    path = model or (adapter.config.base_model_name_or_path if adapter else None)
    if path is None:
        raise ConfigError("name the base with --model; there is no adapter that could name it")
    values: dict[str, Any] = {"path": path, **(options or {})}
    lora, family = {}, family_of(path, recipe.family if recipe else None)
    if recipe:  # what the adapter was trained on, unless the caller says otherwise
        replaced = {"path", "revision"} if model and model != recipe.model["path"] else set()
        values = {name: value for name, value in recipe.model.items() if name not in replaced} | values
        lora = {"trainable_tokens": recipe.trainable_tokens}
    return build_config({"family": family, "model": values, "lora": lora}, f"model {path}")


def load_model(
    config: RunConfig, adapter: StoredAdapter | None, plan: PrecisionPlan | None = None, ability: Ability | None = None
) -> tuple[Family, nn.Module]:
    """Family and model in evaluation mode, the adapter on it where one is given.

    Args:
        config: names the base.
        adapter: None for the base alone.
        plan: precision; None decides by device.
        ability: what the model must be able to do, checked before its weights are read.

    Raises ConfigError: the base does not load, or its family is without the ability; AdapterError: the adapter does not
    fit it.
    """
    plan = plan or plan_precision()
    family = create_family(config)
    if ability is not None and ability not in family.abilities:
        raise ConfigError(f"{config.model.path}: a {family.name} model does not {ability}; {ELSEWHERE[ability]}")
    model = load_base(family, plan, adapter)
    if adapter is not None:
        model = load_adapter(model, adapter)
    family.add_to_base(model, adapter.directory if adapter else None)
    return family, model.eval()

"""Load a base model, with or without an adapter, for inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from speechtune.config import RunConfig
from speechtune.errors import ConfigError
from speechtune.families import build_config, create_family, family_of
from speechtune.family import Ability, Family
from speechtune.lora.apply import load_adapter
from speechtune.lora.base_identity import check_base, read_recipe
from speechtune.lora.files import adapter_folder, stored_base
from speechtune.precision import PrecisionPlan, plan_precision

ELSEWHERE: dict[Ability, str] = {
    "speak": "ask it with `speechtune score`",
    "assess pronunciation": "name one of Phi-4-multimodal, or an adapter trained for it",
}
"""What to do instead with a model that has not an ability."""


def model_config(model: str | None, codec: str | None, adapter: Path | None = None) -> RunConfig:
    """A configuration for using a model; the base defaults to the one the adapter names.

    Raises:
        ConfigError: neither a model nor an adapter that names one.
    """
    folder = adapter_folder(adapter) if adapter else None
    recipe = read_recipe(folder) if folder else None
    path = model or (stored_base(folder) if folder else None)
    if path is None:
        raise ConfigError("name the base with --model; there is no adapter that could name it")
    values: dict[str, Any] = {"path": path} | ({"codec_path": codec} if codec else {})
    lora = {}
    if recipe:  # what the adapter was trained on, unless the caller says otherwise
        replaced = {"path", "revision"} if model and model != recipe.model["path"] else set()
        values = {name: value for name, value in recipe.model.items() if name not in replaced} | values
        lora = {"trainable_tokens": recipe.trainable_tokens}
    return build_config({"family": family_of(path), "model": values, "lora": lora}, f"model {path}")


def load_model(
    config: RunConfig, adapter: Path | None, plan: PrecisionPlan | None = None, ability: Ability | None = None
) -> tuple[Family, nn.Module]:
    """Family and model in evaluation mode, the adapter on it where one is given.

    Args:
        config: names the base.
        adapter: adapter folder; None for the base alone.
        plan: precision; None decides by device.
        ability: what the model is wanted for, checked before its weights are read.

    Raises:
        ConfigError: the base does not load, or its family has not the ability.
        AdapterError: the adapter does not fit it.
    """
    plan = plan or plan_precision()
    family = create_family(config)
    if ability is not None and ability not in family.abilities:
        raise ConfigError(f"{config.model.path}: a {family.name} model does not {ability}; {ELSEWHERE[ability]}")
    model = family.load(plan)
    if adapter is not None:
        folder = adapter_folder(adapter)
        if recipe := read_recipe(folder):
            check_base(recipe, folder, family, model, plan)
        model = load_adapter(model, folder)
    return family, model.eval()

"""Model families; `create_family` is the only place that knows their names."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from speechtune.config import RunConfig
from speechtune.errors import ConfigError
from speechtune.family import Family

FAMILIES = {"higgs_audio_v2": "HiggsAudioV2Family", "phi4_multimodal": "Phi4MultimodalFamily"}
MODEL_TYPES = {
    "higgs_audio_v2": "higgs_audio_v2",
    "higgs_audio": "higgs_audio_v2",
    "phi4_multimodal": "phi4_multimodal",
    "phi4mm": "phi4_multimodal",  # refused there, with the way out
}


def create_family(config: RunConfig) -> Family:
    """Make the family a recipe names; nothing heavy is loaded yet.

    Raises:
        ConfigError: no such family.
    """
    try:
        class_name = FAMILIES[config.family]
    except KeyError:
        raise ConfigError(f"family: no family {config.family!r}; there are: {', '.join(FAMILIES)}") from None
    module = importlib.import_module(f"speechtune.families.{config.family}.family")
    return getattr(module, class_name)(config)


def family_of(model_path: str) -> str:
    """Name of the family a base model belongs to, from its config.json.

    Raises:
        ConfigError: no configuration there, or a model type of no family.
    """
    from transformers.utils.hub import cached_file

    try:
        file = cached_file(model_path, "config.json")
        model_type = json.loads(Path(str(file)).read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{model_path}: no model configuration there: {error}") from None
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{model_path}: model_type {model_type!r} belongs to no family; known: {', '.join(MODEL_TYPES)}"
        )
    return MODEL_TYPES[model_type]

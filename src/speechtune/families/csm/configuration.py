"""Configurations of CSM: those of folders and of the released model, and what they say."""

from pathlib import Path
from typing import Any, cast

from transformers import CsmConfig


def read_config(path: str | Path, revision: str | None = None) -> CsmConfig:
    """Configuration in a folder or under a hub id.

    Raises OSError, ValueError, TypeError: none there, or of another model.
    """
    # Not by AutoConfig: it asks at the terminal whether to run the folder's code, and a `y` would run it.
    values, _ = CsmConfig.get_config_dict(path, revision=revision)
    if (model_type := values.get("model_type")) != "csm":
        raise ValueError(f"model_type is {model_type!r}, not 'csm', the class of transformers")
    values.pop("tie_word_embeddings", None)  # transformers before 5.21 refuses what `tie` makes it write
    return tie(CsmConfig.from_dict(values))


def tie(config: CsmConfig) -> CsmConfig:
    """Let backbone and depth decoder share the audio embeddings where `tie_codebooks_embeddings` says so.

    transformers 5.0 to 5.20 looks at another entry, which it always made false: the backbone's table was random then.
    """
    config.tie_word_embeddings = bool(config.tie_codebooks_embeddings)
    return config


def released_config() -> CsmConfig:
    """Configuration of the released model: the class's own, but for the rotary embeddings, which are scaled."""
    scaled: dict[str, Any] = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0}
    backbone = {"low_freq_factor": 0.125, "high_freq_factor": 0.5, "original_max_position_embeddings": 1024}
    depth = {"low_freq_factor": 2**-9, "high_freq_factor": 2**-7, "original_max_position_embeddings": 16}
    return tie(CsmConfig(rope_parameters=scaled | backbone, depth_decoder_config={"rope_parameters": scaled | depth}))


def codes_of(config: CsmConfig) -> int:
    """Number of codes that the codec has; the model's vocabulary has a few more."""
    return cast(Any, config.codec_config).codebook_size

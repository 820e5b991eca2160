"""The options that a recipe of Phi-4-multimodal has besides those of every run."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from speechtune.config import DataConfig, ModelConfig, RunConfig


class Phi4ModelConfig(ModelConfig, frozen=True):
    """The base model and its speech LoRA."""

    speech_lora: Literal["merge", "continue", "stack", "drop"] | None = None
    """What becomes of the base's speech LoRA; None merges it, if it is not in the weights yet."""
    speech_lora_path: Path | None = None
    """Folder of that speech LoRA; None takes `speech-lora` in the model's folder or repository."""


class Phi4DataConfig(DataConfig, frozen=True):
    """Pronunciation data and the tasks made of it."""

    tasks: dict[str, Annotated[float, Field(ge=0.0, le=1.0)]] = Field(default={"APA": 1.0, "MDD": 1.0})
    """Per task the share of the labelled utterances that give a sample of it: scores (APA), words and phones (MDD)."""
    star_policy: Literal["base", "unk"] = "base"
    """A phone said with a heavy accent (`X*` in Speechocean762) is learnt as X, or as `<unk>`."""


class Config(RunConfig, frozen=True):
    """A run with Phi-4-multimodal."""

    model: Phi4ModelConfig
    data: Phi4DataConfig = Phi4DataConfig()

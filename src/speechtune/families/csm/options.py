"""The options that a recipe of CSM has besides those of every run."""

from typing import Self

from pydantic import Field, model_validator

from speechtune.config import DataConfig, ModelConfig, RunConfig
from speechtune.families.csm.adapters import is_audio_table


class CsmModelConfig(ModelConfig, frozen=True):
    """The base model and its codec."""

    codec_path: str | None = None
    """Hub id or local folder of Mimi, or of a CSM whose built-in Mimi is meant; None takes the base's own."""
    codec_revision: str | None = None
    """Commit or tag of the codec on the hub."""


class CsmDataConfig(DataConfig, frozen=True):
    """Speech, and how much of it the depth decoder is trained on."""

    depth_share: float = Field(default=1 / 16, gt=0.0, le=1.0)
    """Share of the target frames on which codebooks 1 and up are trained, drawn anew in every step; the end of speech
    always is. The loss is weighted, so that its mean over the draws is that of all frames; evaluation takes all."""


class Config(RunConfig, frozen=True):
    """A run with CSM."""

    model: CsmModelConfig
    data: CsmDataConfig = CsmDataConfig()

    @model_validator(mode="after")
    def _keeps_the_tables_tied(self) -> Self:
        tied = [name for name in self.lora.modules_to_save if is_audio_table(name)]
        if tied:
            raise ValueError(
                f"lora.modules_to_save names {tied[0]!r}: backbone and depth decoder share one table of audio "
                "embeddings, and copies of it would come apart; leave it out"
            )
        return self

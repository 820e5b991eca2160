"""The options that a recipe of Higgs Audio v2 has besides those of every run."""

from typing import Literal, Self

from pydantic import Field, model_validator

from speechtune.config import ModelConfig, RunConfig

CONDITIONING = ("whisper_path", "reference_positions", "freeze_reference_projector")


class HiggsModelConfig(ModelConfig, frozen=True):
    """The base model and its codec."""

    codec_path: str | None = None
    """Hub id or local folder of the audio codec; None takes the released one."""
    codec_revision: str | None = None
    """Commit or tag of the codec on the hub."""
    reference_conditioning: Literal["whisper"] | None = None
    """An addition to the base: what a frozen Whisper encoder hears in a reference is added to the reference's rows,
    through a projector that is trained and saved beside the adapter. None is the base as it was released."""
    whisper_path: str | None = None
    """Hub id or local folder of the Whisper, for `reference_conditioning`."""
    reference_positions: int | None = Field(default=None, ge=1)
    """To how many embeddings, spread evenly, a reference is pooled; None takes one a codec frame (25 a second)."""
    freeze_reference_projector: bool = False
    """Leave a projector that the base, or the adapter that is started from, has already as it is."""

    @model_validator(mode="after")
    def _conditioning_is_whole(self) -> Self:
        given = [name for name in CONDITIONING if getattr(self, name)]
        if self.reference_conditioning is None and given:
            raise ValueError(
                f"{given[0]} is for model.reference_conditioning=whisper, which is not set: set it, or remove this"
            )
        if self.reference_conditioning and not self.whisper_path:
            raise ValueError("reference_conditioning=whisper needs model.whisper_path: hub id or folder of a Whisper")
        return self


class Config(RunConfig, frozen=True):
    """A run with Higgs Audio v2."""

    model: HiggsModelConfig

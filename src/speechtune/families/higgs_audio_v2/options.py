"""The options that a recipe of Higgs Audio v2 has besides those of every run."""

from speechtune.config import ModelConfig, RunConfig


class HiggsModelConfig(ModelConfig, frozen=True):
    """The base model and its codec."""

    codec_path: str | None = None
    """Hub id or local folder of the audio codec; None takes the released one."""
    codec_revision: str | None = None
    """Commit or tag of the codec on the hub."""


class Config(RunConfig, frozen=True):
    """A run with Higgs Audio v2."""

    model: HiggsModelConfig

"""The options that a recipe of the toy family has besides those of every run."""

from __future__ import annotations

from speechtune.config import ModelConfig, RunConfig


class ToneModelConfig(ModelConfig, frozen=True):
    """The base model and the tone it speaks with."""

    tone_hz: float = 220.0
    """Pitch of the tone."""


class Config(RunConfig, frozen=True):
    """A run with the toy family."""

    model: ToneModelConfig

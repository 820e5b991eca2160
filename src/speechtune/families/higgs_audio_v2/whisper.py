"""What a frozen Whisper encoder hears in the references of a sample: the second kind of features of their clips.

Shapes: T encoder positions of a clip (50 a second), W Whisper's width.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, WhisperConfig, WhisperFeatureExtractor, WhisperModel

from speechtune.errors import ConfigError
from speechtune.family import ClipEncoder
from speechtune.precision import PrecisionPlan
from speechtune.storage.files import folder_fingerprint
from speechtune.storage.model_folder import hub_commit, require_sound
from speechtune.types import Audio, AudioRef, Sample

OPTION = "model.whisper_path"


def whisper_config(path: str) -> WhisperConfig:
    """Configuration of the Whisper under a hub id or in a folder.

    Raises ConfigError: there is none, or it is another model's.
    """
    require_sound(path, OPTION)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{OPTION}={path}: no model configuration there: {error}") from None
    if not isinstance(config, WhisperConfig):
        raise ConfigError(f"{OPTION}={path}: model_type is {config.model_type!r}, not whisper")
    return config


def whisper_fingerprint(path: str) -> str:
    """Identity of a Whisper: by content where it is local, else by commit."""
    require_sound(path, OPTION)
    return folder_fingerprint(Path(path)) if Path(path).is_dir() else f"{path}@{hub_commit(path, None)}"


class WhisperEncoder(ClipEncoder):
    """Encodes the references of a sample, each clip by itself; the weights are loaded for the first clip.

    They go with the object: whoever keeps only what it returned trains without them in memory.
    """

    name = "Whisper"

    def __init__(self, path: str, fingerprint: str, plan: PrecisionPlan) -> None:
        self._path, self._fingerprint, self._plan = path, fingerprint, plan

    @property
    def encode_key(self) -> str:
        """Identity of the features: weights, layer and precision."""
        return f"whisper encoder v1 {self._fingerprint} last layer {self._plan.base_dtype}"

    @cached_property
    def sampling_rate(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  # the extractor's
        """16 kHz, for every Whisper there is."""
        return self._extractor.sampling_rate

    def clips(self, sample: Sample) -> tuple[AudioRef, ...]:
        """The references alone: the target is what is to be spoken."""
        return tuple(reference.audio for reference in sample.references)

    def encode_audio(self, audios: Sequence[Audio]) -> list[np.ndarray]:
        """States of the encoder's last layer, float16 of shape (T, W) per clip."""
        return [np.concatenate([self._encode(window) for window in self._windows(audio)]) for audio in audios]

    def _windows(self, audio: Audio) -> list[np.ndarray]:
        """Pieces as long as Whisper hears at once (30 s), the last one shorter."""
        size = self._extractor.n_samples
        return [audio.samples[start : start + size] for start in range(0, len(audio.samples), size)]

    @torch.inference_mode()
    def _encode(self, window: np.ndarray) -> np.ndarray:
        # One by one: the last digits of a product depend on how many others are computed with it.
        mel = self._extractor(window, sampling_rate=self.sampling_rate, return_tensors="pt")["input_features"]
        states_1TW = self._model(mel.to(self._plan.device, self._plan.base_dtype)).last_hidden_state
        heard = -(-len(window) * states_1TW.shape[1] // self._extractor.n_samples)  # the rest is padding
        return states_1TW[0, :heard].to("cpu", torch.float16).numpy()

    @cached_property
    def _extractor(self) -> WhisperFeatureExtractor:
        try:
            return WhisperFeatureExtractor.from_pretrained(self._path)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{OPTION}={self._path}: no feature extractor there: {error}") from None

    @cached_property
    def _model(self) -> Any:
        whisper_config(self._path)
        try:
            native = cast(Any, WhisperModel)
            model, info = native.from_pretrained(self._path, dtype=self._plan.base_dtype, output_loading_info=True)
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(f"{OPTION}={self._path}: the model does not load: {error}") from None
        # transformers puts random weights there, and what those hear is noise
        if missing := sorted(key for key in info["missing_keys"] if key.startswith("encoder.")):
            raise ConfigError(f"{OPTION}={self._path}: weights of the encoder are missing: {missing[:5]}")
        return model.encoder.to(self._plan.device).eval().requires_grad_(False)

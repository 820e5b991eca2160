"""Mimi, CSM's codec: audio at 24 kHz to codes at 12.5 frames a second, and back; float32, each clip by itself.

Shapes: F frames, K codebooks.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from transformers import MimiConfig, MimiModel
from transformers.utils import logging as transformers_logging

from speechtune.families.layers.clips import map_clips
from speechtune.tensors import tensors_fingerprint
from speechtune.types import Audio

FRAME_SAMPLES = 1920
BUILT_IN = r"^codec_model\."
"""How a CSM folder names the codec's weights."""


def load_mimi(path: str, revision: str | None) -> MimiModel:
    """The codec of a folder or hub id: Mimi itself, or the one inside a CSM.

    Raises OSError, ValueError, SafetensorError: no codec there, or not all of one.
    """
    values, _ = MimiConfig.get_config_dict(path, revision=revision)
    inside = values.get("model_type") == "csm"
    own = values.get("codec_config") if inside else values
    if not isinstance(own, dict) or own.get("model_type") != "mimi":
        raise ValueError(f"model_type is {values.get('model_type')!r}, neither 'mimi' nor 'csm' with one inside")
    verbosity = transformers_logging.get_verbosity()
    if inside:  # of the weights that are no codec's transformers would list every name
        transformers_logging.set_verbosity_error()
    try:
        # float32, whatever the weights are kept in: in bfloat16 one code in twenty is another.
        model, info = cast(Any, MimiModel).from_pretrained(
            path,
            config=MimiConfig.from_dict(own),
            revision=revision,
            dtype=torch.float32,
            key_mapping={BUILT_IN: ""} if inside else None,
            output_loading_info=True,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := sorted(info["missing_keys"]):  # transformers puts random weights there
        raise ValueError(f"weights of the codec are missing: {missing[:5]}")
    return model.eval().requires_grad_(False)


class Codec:
    """Audio to codes and back, whatever else is encoded with a clip."""

    def __init__(self, model: MimiModel, device: torch.device | str = "cpu") -> None:
        self.model = model.to(cast(Any, device))
        self.sampling_rate: int = model.config.sampling_rate
        self.codebook_size: int = model.config.codebook_size
        self.num_codebooks: int = model.config.num_quantizers

    @cached_property
    def fingerprint(self) -> str:
        """Hash of its weights, alike wherever they are kept."""
        return tensors_fingerprint(sorted(self.model.state_dict().items()))

    def encode(self, audios: Sequence[Audio]) -> list[np.ndarray]:
        """Codes of each clip, int16 of shape (F, K), the last frame filled up.

        Padding clips to a common length would change the codes of their last frames.
        """
        return map_clips(self._encode, audios, self.model.device, lambda audio: len(audio.samples))

    def decode(self, codes: Sequence[np.ndarray]) -> list[Audio]:
        """Audio of each clip's codes (F, K)."""
        return map_clips(self._decode, codes, self.model.device)

    @torch.inference_mode()
    def _encode(self, audio: Audio) -> np.ndarray:
        wave_11T = torch.from_numpy(audio.samples).to(self.model.device)[None, None]
        codes_1KF = cast(torch.Tensor, self.model.encode(wave_11T).audio_codes)
        return codes_1KF[0].T.to("cpu", torch.int16).numpy()

    @torch.inference_mode()
    def _decode(self, codes_FK: np.ndarray) -> Audio:
        if len(codes_FK) == 0:  # Mimi fails on no frames
            return Audio(np.zeros(0, np.float32), self.sampling_rate)
        codes_1KF = torch.from_numpy(codes_FK.astype(np.int64).T)[None].to(self.model.device)
        wave = cast(torch.Tensor, self.model.decode(codes_1KF).audio_values)[0, 0]
        return Audio(wave.float().cpu().numpy(), self.sampling_rate)

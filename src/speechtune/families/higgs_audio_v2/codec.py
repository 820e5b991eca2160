"""The audio codecs of Higgs Audio v2: what each of them offers, and the native one, with or without torchaudio."""

import importlib.util
import math
import sys
import types
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
from transformers import AutoConfig  # before the stand-in below: transformers looks for torchaudio when imported
from transformers.configuration_utils import PretrainedConfig

from speechtune.families.higgs_audio_v2 import codec_world
from speechtune.families.higgs_audio_v2.codec_cpu import fold_weight_norms, is_available, use_clip_layers
from speechtune.families.layers.clips import map_clips
from speechtune.types import Audio

TRAINING_BUFFERS = (".inited", ".cluster_size", ".embed_avg")  # of the codebooks; encoding does not read them
RELEASED_RATE = 24_000
CODEC_MODULE = "transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer"


@cache
def _sinc_kernels(orig: int, new: int, filter_width: int = 6, rolloff: float = 0.99) -> tuple[torch.Tensor, int]:
    cutoff = min(orig, new) * rolloff
    half_width = math.ceil(filter_width * orig / cutoff)
    taps = torch.arange(-half_width, half_width + orig, dtype=torch.float64) / orig
    phases = torch.arange(0, -new, -1, dtype=torch.float64)[:, None] / new
    t = ((phases + taps) * cutoff).clamp(-filter_width, filter_width)
    window = torch.cos(t * math.pi / filter_width / 2) ** 2
    kernels = torch.sinc(t) * window * (cutoff / orig)
    return kernels[:, None].to(torch.float32), half_width


def sinc_resample(waveform: torch.Tensor, orig_freq: int, new_freq: int) -> torch.Tensor:
    """Resample by a Hann-windowed sinc; equals `torchaudio.functional.resample` with its defaults.

    The codec's semantic branch was trained behind that filter, so another resampler would change the codes.

    Args:
        waveform: float tensor of shape (..., num_samples).
        orig_freq: rate of `waveform` in Hz.
        new_freq: wanted rate in Hz.

    Returns:
        tensor of shape (..., ceil(num_samples * new_freq / orig_freq)).
    """
    if orig_freq == new_freq:
        return waveform
    divisor = math.gcd(int(orig_freq), int(new_freq))
    orig, new = int(orig_freq) // divisor, int(new_freq) // divisor
    kernels, half_width = _sinc_kernels(orig, new)
    shape = waveform.shape
    flat = torch.nn.functional.pad(waveform.reshape(-1, 1, shape[-1]), (half_width, half_width + orig))
    resampled = torch.nn.functional.conv1d(flat, kernels.to(waveform), stride=orig)
    resampled = resampled.transpose(1, 2).reshape(flat.shape[0], -1)
    return resampled[:, : math.ceil(new * shape[-1] / orig)].reshape(*shape[:-1], -1)


@cache
def codec_class() -> Any:
    """The native codec class.

    Its module imports torchaudio for one pure-Python function. torchaudio's wheels follow one exact torch build, so it
    is no dependency here: where it is absent a stand-in with that function serves while the module is imported.
    """
    absent = importlib.util.find_spec("torchaudio") is None
    if absent:
        sys.modules["torchaudio"] = stand_in = types.ModuleType("torchaudio")
        vars(stand_in)["functional"] = types.SimpleNamespace(resample=sinc_resample)
    try:
        return importlib.import_module(CODEC_MODULE).HiggsAudioV2TokenizerModel
    finally:
        if absent:
            del sys.modules["torchaudio"]


class Codec(Protocol):
    """Audio to codes (F, K) at 25 frames a second, and back; each clip by itself, whatever else is encoded with it."""

    sampling_rate: int
    codebook_size: int
    num_codebooks: int

    def encode(self, audios: Sequence[Audio]) -> list[np.ndarray]:
        """Codes of each clip, int16."""
        ...

    def decode(self, codes: Sequence[np.ndarray]) -> list[Audio]:
        """Audio of each clip's codes."""
        ...


def load_codec(path: str, revision: str | None, device: torch.device | str) -> Codec:
    """The codec in a folder or under a hub id, of the class that its configuration names.

    Raises:
        OSError, ValueError, SafetensorError: no codec there, or not all of one.
        ConfigError: a package that it needs is not installed.
    """
    if model_type_of(path, revision) == codec_world.MODEL_TYPE:
        return codec_world.WorldCodec(path, revision)
    return HiggsCodec(path, revision, device)


def model_type_of(path: str, revision: str | None) -> str | None:
    """What the configuration of a codec calls it."""
    config, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    return config.get("model_type")


def sampling_rate_of(path: str, revision: str | None) -> int:
    """What a codec's configuration says; a codec that is not there is taken for one like the released one."""
    try:
        config, _ = PretrainedConfig.get_config_dict(path, revision=revision)
    except (OSError, ValueError):
        return RELEASED_RATE
    return config.get("sampling_rate") or config.get("sample_rate") or RELEASED_RATE


def layers_of(path: str, revision: str | None, device: torch.device | str) -> str:
    """Whose code computes the codes: part of what they are known by. A codec that is not there has no type yet."""
    try:
        is_world = model_type_of(path, revision) == codec_world.MODEL_TYPE
    except (OSError, ValueError):
        is_world = False
    return "WORLD" if is_world else implementation_on(device)


def implementation_on(device: torch.device | str) -> Literal["native", "cpu"]:
    """Whose layers a codec on `device` has: transformers', or on a CPU with oneDNN those of `codec_cpu`.

    Where two entries of a codebook are equally near, the one may choose another code than the other.
    """
    return "cpu" if torch.device(device).type == "cpu" and is_available() else "native"


class HiggsCodec:
    """Audio to codes and back; float32, in evaluation mode.

    Raises:
        OSError, ValueError, SafetensorError: no codec there, or not all of one.
    """

    def __init__(self, path: str, revision: str | None = None, device: torch.device | str = "cpu") -> None:
        model_type = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False).model_type
        if model_type != "higgs_audio_v2_tokenizer":
            raise ValueError(f"model_type is {model_type!r}, not 'higgs_audio_v2_tokenizer'")
        model, info = codec_class().from_pretrained(
            path, revision=revision, dtype=torch.float32, output_loading_info=True
        )
        missing = sorted(key for key in info["missing_keys"] if not key.endswith(TRAINING_BUFFERS))
        if missing:  # transformers puts random weights there, and codes of random weights are noise
            raise ValueError(f"weights are missing: {missing[:5]}")
        self.model = model.eval().requires_grad_(False).to(device)
        if self.model.device.type == "cpu":
            self._prepare()
        self.sampling_rate: int = self.model.config.sample_rate
        self.codebook_size: int = self.model.config.codebook_size
        self.num_codebooks: int = self.model.config.num_quantizers

    def encode(self, audios: Sequence[Audio]) -> list[np.ndarray]:
        """Encode each clip by itself, as inference does: padding clips to a common length would change their codes.

        Returns:
            per clip an int16 array of shape (num_frames, num_codebooks), whatever the number of threads: the codes of
            the native class on the clip alone. On a CPU what is quantized differs from the native by rounding
            (`higgs_codec_cpu`), so of two entries of a codebook that are equally near the other one may be chosen.
        """
        return map_clips(self._encode, audios, self.model.device, lambda audio: len(audio.samples))

    def decode(self, codes: Sequence[np.ndarray]) -> list[Audio]:
        """Decode codes, each of shape (num_frames, num_codebooks), to audio at the codec's rate."""
        return map_clips(self._decode, codes, self.model.device)

    def _prepare(self) -> None:
        """Faster layers, but not for the semantic branch's decoder: neither encoding nor decoding calls it."""
        modules = [module for name, module in self.model.named_modules() if not name.startswith("decoder_semantic")]
        fold_weight_norms(modules)
        if implementation_on(self.model.device) == "cpu":
            map_clips(use_clip_layers, [modules], self.model.device)

    @torch.inference_mode()
    def _encode(self, audio: Audio) -> np.ndarray:
        wave_11T = torch.from_numpy(audio.samples).to(self.model.device)[None, None]
        codes_1KF = self.model.encode(wave_11T).audio_codes
        return codes_1KF[0].T.to("cpu", torch.int16).numpy()

    @torch.inference_mode()
    def _decode(self, codes_FK: np.ndarray) -> Audio:
        if len(codes_FK) == 0:
            return Audio(np.zeros(0, np.float32), self.sampling_rate)
        codes_1KF = torch.from_numpy(codes_FK.astype(np.int64).T)[None].to(self.model.device)
        wave = self.model.decode(codes_1KF).audio_values[0, 0]
        return Audio(wave.float().cpu().numpy(), self.sampling_rate)

"""Speaker encoders: Resemblyzer, with weights in its package, and WavLM with an x-vector head by path or hub id."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from speechtune.tasks.voice_cloning.support import (
    INT16_MAX,
    RATE,
    identity,
    load_pretrained,
    need,
    package_file,
    pcm16,
    waveform,
)
from speechtune.types import Audio

INSTALL = "pip install 'speechtune[speaker]' && pip install --no-deps Resemblyzer==0.1.4"
LEAST_SECONDS = 0.5
"""WavLM's convolutions and x-vector layers need this much; shorter clips are filled up with silence."""

# Resemblyzer's hyperparameters (resemblyzer/hparams.py)
MELS, HIDDEN, LAYERS = 40, 256, 3
FFT, HOP = 400, 160  # 25 ms, 10 ms
PARTIAL_FRAMES = 160
PARTIALS_PER_SECOND, LEAST_COVERAGE = 1.3, 0.75
TARGET_DBFS = -30
VAD_WINDOW, VAD_SMOOTHING, VAD_SILENCE = 480, 8, 6  # samples (30 ms); windows


class Resemblyzer:
    """Resemblyzer 0.1.4 (GE2E, Wan et al. 2018): its weights, and its steps without librosa, which brings numba.

    Pairs of one voice lie near 0.85, of two near 0.57: read it by comparison. Numbers agree with the package's own to
    1e-6 for audio within full scale; a test compares them where librosa is installed.
    """

    def __init__(self, spec: str, device: str) -> None:
        weights = package_file("resemblyzer", "pretrained.pt", spec, INSTALL)
        self._vad = need("webrtcvad", spec, INSTALL)
        self.name = identity("Resemblyzer", weights)
        self._lstm = nn.LSTM(MELS, HIDDEN, LAYERS, batch_first=True)
        self._linear = nn.Linear(HIDDEN, HIDDEN)
        state = torch.load(weights, map_location="cpu", weights_only=True)["model_state"]
        for name, module in (("lstm", self._lstm), ("linear", self._linear)):
            part = {key.partition(".")[2]: value for key, value in state.items() if key.startswith(f"{name}.")}
            module.load_state_dict(part)
            module.eval().to(device)
        self._device = device
        from transformers.audio_utils import mel_filter_bank, window_function

        self._mels = mel_filter_bank(FFT // 2 + 1, MELS, 0.0, RATE / 2, RATE, norm="slaney", mel_scale="slaney")
        self._window = window_function(FFT, "hann")

    def embed(self, audios: Sequence[Audio]) -> np.ndarray:
        """Embeddings of length 1, float32 of shape (clips, 256); one clip at a time, its pieces together."""
        rows = [self._embed(waveform(audio)) for audio in audios]
        return np.stack(rows) if rows else np.zeros((0, HIDDEN), np.float32)

    @torch.inference_mode()
    def _embed(self, samples: np.ndarray) -> np.ndarray:
        samples = _raise_volume(samples)
        voiced = self._trim(samples)
        samples = voiced if len(voiced) else samples  # where no window counts as voice, all of it is embedded
        starts = _partial_starts(len(samples))
        samples = np.pad(samples, (0, max(0, (starts[-1] + PARTIAL_FRAMES) * HOP - len(samples))))
        mel_TM = self._spectrogram(samples)
        partials = np.stack([mel_TM[start : start + PARTIAL_FRAMES] for start in starts])
        _, (hidden, _) = self._lstm(torch.from_numpy(partials).to(self._device))
        raw = torch.relu(self._linear(hidden[-1]))
        mean = (raw / raw.norm(dim=1, keepdim=True)).cpu().numpy().mean(axis=0)
        return (mean / np.linalg.norm(mean)).astype(np.float32)

    def _spectrogram(self, samples: np.ndarray) -> np.ndarray:
        """Mel power, float32 of shape (frames, 40): librosa's `melspectrogram`, with its zero padding."""
        from transformers.audio_utils import spectrogram

        mel = spectrogram(
            samples, self._window, FFT, HOP, power=2.0, mel_filters=self._mels, pad_mode="constant", mel_floor=0.0
        )
        return np.ascontiguousarray(mel.T, dtype=np.float32)

    def _trim(self, samples: np.ndarray) -> np.ndarray:
        """Silence longer than six windows of the voice detector cut out, as in the package's `trim_long_silences`."""
        samples = samples[: len(samples) // VAD_WINDOW * VAD_WINDOW]
        if not len(samples):
            return samples
        pcm = pcm16(samples)
        vad = self._vad.Vad(mode=3)
        starts = range(0, len(pcm), 2 * VAD_WINDOW)
        flags = np.array([vad.is_speech(pcm[i : i + 2 * VAD_WINDOW], sample_rate=RATE) for i in starts], dtype=float)
        padded = np.pad(flags, ((VAD_SMOOTHING - 1) // 2, VAD_SMOOTHING // 2))
        voiced = np.round(np.convolve(padded, np.ones(VAD_SMOOTHING), "valid") / VAD_SMOOTHING)
        # "valid" on padded flags: "same" would give the kernel's length where a clip has fewer windows than that.
        dilated = np.convolve(np.pad(voiced, VAD_SILENCE // 2), np.ones(VAD_SILENCE + 1), "valid") > 0
        return samples[np.repeat(dilated, VAD_WINDOW)]


def _raise_volume(samples: np.ndarray) -> np.ndarray:
    """Samples of at least -30 dBFS; louder ones stay."""
    level = np.sqrt(np.mean((samples * INT16_MAX) ** 2))  # in float32 as the package, so that the same bits come out
    change = TARGET_DBFS - 20 * np.log10(level / INT16_MAX) if level else 0
    return samples * 10 ** (change / 20) if change > 0 else samples


def _partial_starts(num_samples: int) -> list[int]:
    """First frames of the pieces of 1.6 s that are embedded: the package's `compute_partial_slices`."""
    frames = int(np.ceil((num_samples + 1) / HOP))
    step = int(np.round(RATE / PARTIALS_PER_SECOND / HOP))
    starts = list(range(0, max(1, frames - PARTIAL_FRAMES + step + 1), step))
    covered = (num_samples - starts[-1] * HOP) / (PARTIAL_FRAMES * HOP)
    return starts[:-1] if covered < LEAST_COVERAGE and len(starts) > 1 else starts


class WavLM:
    """WavLM with an x-vector head (Chen et al. 2022), such as microsoft/wavlm-base-plus-sv, through transformers.

    seed-tts-eval's SIM uses WavLM-large fine-tuned in UniSpeech's own format: the definition is the same, the numbers
    are not comparable with its tables.
    """

    def __init__(self, spec: str, device: str) -> None:
        from transformers import AutoFeatureExtractor, WavLMForXVector

        kind, label = "WavLM for speaker verification", "WavLM-SV {}"
        loaded = load_pretrained(AutoFeatureExtractor, WavLMForXVector, spec, device, kind=kind, label=label)
        self._extract, self._model, self.name = loaded
        self._device = device

    @torch.inference_mode()
    def embed(self, audios: Sequence[Audio]) -> np.ndarray:
        """Embeddings of length 1, float32 of shape (clips, dimensions); one at a time, for padding would leak in."""
        rows = []
        for samples in map(waveform, audios):
            samples = np.pad(samples, (0, max(0, int(LEAST_SECONDS * RATE) - len(samples))))
            inputs = self._extract(samples, sampling_rate=RATE, return_tensors="pt")
            embedding = self._model(inputs["input_values"].to(self._device)).embeddings[0].float()
            rows.append(nn.functional.normalize(embedding, dim=0).cpu().numpy())
        return np.stack(rows) if rows else np.zeros((0, self._model.config.xvector_output_dim), np.float32)

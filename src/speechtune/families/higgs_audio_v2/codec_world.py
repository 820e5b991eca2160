"""A codec without a neural net: WORLD's analysis, vector-quantised. It runs on any CPU, and its tables take megabytes.

Every frame of 40 ms is four of WORLD's 10 ms: spectral envelopes, pitch with voicing, and aperiodicity, each four side
by side. Pitch and aperiodicity have a codebook each; the envelopes' principal components have residual codebooks.

Shapes: F frames, K codebooks, V entries of a codebook, D numbers of an entry.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers.utils.hub import cached_file

from speechtune.families.higgs_audio_v2.world_synthesis import render
from speechtune.families.layers.clips import map_clips
from speechtune.tasks.voice_cloning.support import need
from speechtune.types import Audio

MODEL_TYPE = "world_rvq"
INSTALL = "pip install 'speechtune[demo]'"
SAMPLING_RATE, FRAME_SAMPLES, PARTS = 16_000, 640, 4  # the band that all recordings have: telephones, old corpora
PERIOD_MS = 10.0
ENVELOPE_SIZE, APERIODICITY_SIZE = 40, 1  # numbers per part
LOUDNESS = 0.08  # root mean square of what is not silence
ENVELOPE_FLOOR = 1e-7  # power, about 65 dB below speech: differences in silence are not worth an entry
PITCH_SCALE = 6.0  # of log pitch against voicing, in the distance between entries
MOST_PITCH_HZ, LEAST_PITCH_HZ, UNVOICED_PITCH_HZ = 500.0, 60.0, 120.0


@dataclass(frozen=True)
class Features:
    """What is quantised, float64.

    Attributes:
        envelope: (F, 160), cepstra of the spectral envelope.
        pitch: (F, 8), the logarithm of four pitches in Hz, interpolated where there is none, and four flags of voicing.
        aperiodicity: (F, 4).
    """

    envelope: np.ndarray
    pitch: np.ndarray
    aperiodicity: np.ndarray


def _world() -> Any:
    """The vocoder's package, needed by this codec alone."""
    return need("pyworld", f"the codec of type {MODEL_TYPE}", INSTALL)


def analyse(samples: np.ndarray) -> Features:
    """Features of a clip at 16 kHz, of a standard loudness; what is left behind the last whole frame is padded."""
    world = _world()
    num_frames = -(-len(samples) // FRAME_SAMPLES)
    wave = np.zeros(num_frames * FRAME_SAMPLES)
    wave[: len(samples)] = samples
    if not num_frames:
        return Features(*(np.zeros((0, PARTS * size)) for size in (ENVELOPE_SIZE, 2, APERIODICITY_SIZE)))
    levels = np.sqrt(np.square(wave.reshape(-1, FRAME_SAMPLES // PARTS)).mean(axis=1))
    active = levels[levels > 0.05 * levels.max()]
    if len(active):
        wave *= LOUDNESS / np.sqrt(np.square(active).mean())
    # Frames as close as the pitch tracker was made for: at 10 ms it loses a third of the voiced ones.
    close = {"frame_period": PERIOD_MS / 2, "allowed_range": 0.2, "channels_in_octave": 4.0}
    tracked = world.dio(wave, SAMPLING_RATE, LEAST_PITCH_HZ, MOST_PITCH_HZ, **close)
    coarse, times = (np.ascontiguousarray(values[::2]) for values in tracked)
    pitch = world.stonemask(wave, coarse, times, SAMPLING_RATE)
    envelope = world.cheaptrick(wave, pitch, times, SAMPLING_RATE) + ENVELOPE_FLOOR
    coded = world.code_spectral_envelope(envelope, SAMPLING_RATE, ENVELOPE_SIZE)
    aperiodicity = world.code_aperiodicity(world.d4c(wave, pitch, times, SAMPLING_RATE), SAMPLING_RATE)
    voiced = pitch > 0
    log_pitch = np.full(len(pitch), np.log(UNVOICED_PITCH_HZ))
    if voiced.any():
        places = np.arange(len(pitch))
        log_pitch = np.interp(places, places[voiced], np.log(pitch[voiced]))
    kept = num_frames * PARTS

    def side_by_side(values: np.ndarray) -> np.ndarray:
        return values[:kept].reshape(num_frames, -1)

    pitch_F8 = np.concatenate([side_by_side(log_pitch), side_by_side(voiced.astype(np.float64))], axis=1)
    return Features(side_by_side(coded), pitch_F8, side_by_side(aperiodicity))


def synthesise(features: Features) -> np.ndarray:
    """Samples (float32, 16 kHz) of features."""

    def in_a_row(values: np.ndarray, size: int) -> np.ndarray:
        return np.ascontiguousarray(values.reshape(-1, size), np.float64)

    if not len(features.envelope):
        return np.zeros(0, np.float32)
    world = _world()
    fft_size = world.get_cheaptrick_fft_size(SAMPLING_RATE)
    envelope = world.decode_spectral_envelope(in_a_row(features.envelope, ENVELOPE_SIZE), SAMPLING_RATE, fft_size)
    coded = in_a_row(np.minimum(features.aperiodicity, 0), APERIODICITY_SIZE)
    aperiodicity = world.decode_aperiodicity(coded, SAMPLING_RATE, fft_size)
    log_pitch, voicing = features.pitch[:, :PARTS].ravel(), features.pitch[:, PARTS:].ravel()
    pitch = np.where(voicing > 0.5, np.exp(log_pitch), 0.0)
    noise = np.random.default_rng(0).standard_normal(len(features.envelope) * FRAME_SAMPLES)
    return render(pitch, envelope, aperiodicity, noise, SAMPLING_RATE)


def nearest(values_FD: np.ndarray, entries_VD: np.ndarray) -> np.ndarray:
    """Index (F,) of the nearest entry.

    The products are summed without BLAS, whose order of sums depends on the number of rows and threads: a frame's code
    must depend on the frame alone.
    """
    products_FV = np.einsum("fd,vd->fv", values_FD, entries_VD)
    return (0.5 * np.square(entries_VD).sum(axis=1) - products_FV).argmin(axis=1)


class WorldCodec:
    """Audio to codes and back.

    Codebooks in order: envelope 0, pitch, envelope 1 to the last, aperiodicity.

    Raises:
        OSError, ValueError, SafetensorError: no codec there, or not all of one.
        ConfigError: pyworld is not installed; names the line that installs it.
    """

    sampling_rate = SAMPLING_RATE

    def __init__(self, path: str, revision: str | None = None) -> None:
        _world()
        names = ("config.json", "model.safetensors")
        config_file, tables_file = (str(cached_file(path, name, revision=revision)) for name in names)
        config = json.loads(Path(config_file).read_text(encoding="utf-8"))
        if config.get("model_type") != MODEL_TYPE:
            raise ValueError(f"model_type is {config.get('model_type')!r}, not {MODEL_TYPE!r}")
        if config.get("sampling_rate") != SAMPLING_RATE:
            raise ValueError(f"sampling_rate is {config.get('sampling_rate')}; this codec works at {SAMPLING_RATE} Hz")
        tables = {name: table.astype(np.float64) for name, table in load_file(tables_file).items()}
        self.num_codebooks: int = config["num_codebooks"]
        stages = [f"envelope.{stage}" for stage in range(self.num_codebooks - 2)]
        missing = {"mean", "components", "pitch", "aperiodicity", *stages} - set(tables)
        if missing:
            raise ValueError(f"tables are missing: {sorted(missing)}")
        widths = {"mean": PARTS * ENVELOPE_SIZE, "pitch": 2 * PARTS, "aperiodicity": PARTS * APERIODICITY_SIZE}
        wrong = {name: tables[name].shape[-1] for name, width in widths.items() if tables[name].shape[-1] != width}
        if wrong:
            raise ValueError(
                f"tables of other widths than {widths}: {wrong}; were they fitted at another sampling rate?"
            )
        self.mean, self.components = tables["mean"], tables["components"]
        self.stages = [tables[stage] for stage in stages]
        self.pitch, self.aperiodicity = tables["pitch"], tables["aperiodicity"]
        self.codebook_size: int = max(map(len, self.codebooks))

    @property
    def codebooks(self) -> list[np.ndarray]:
        """The codebooks in their order."""
        return [self.stages[0], self.pitch, *self.stages[1:], self.aperiodicity]

    def encode(self, audios: Sequence[Audio]) -> list[np.ndarray]:
        """Codes of each clip, int16 of shape (F, K); they depend on nothing but the clip."""
        return [self.quantise(analyse(audio.samples)) for audio in audios]

    def decode(self, codes: Sequence[np.ndarray]) -> list[Audio]:
        """Audio of codes, each of shape (F, K)."""
        waves = map_clips(lambda codes_FK: synthesise(self.features(codes_FK)), codes, torch.device("cpu"))
        return [Audio(wave, SAMPLING_RATE) for wave in waves]

    def quantise(self, features: Features) -> np.ndarray:
        """Codes (F, K) of features."""
        residual_FD = np.einsum("fd,cd->fc", features.envelope - self.mean, self.components)
        envelope = []
        for entries_VD in self.stages:
            envelope.append(nearest(residual_FD, entries_VD))
            residual_FD = residual_FD - entries_VD[envelope[-1]]
        pitch = nearest(scale_pitch(features.pitch), self.pitch)
        aperiodicity = nearest(features.aperiodicity, self.aperiodicity)
        return np.stack([envelope[0], pitch, *envelope[1:], aperiodicity], axis=1).astype(np.int16)

    def features(self, codes_FK: np.ndarray) -> Features:
        """Features that codes stand for; a code beyond the end of its codebook is taken for its last."""
        first, pitch, *others, aperiodicity = (
            entries_VD[np.minimum(codes_F, len(entries_VD) - 1)]
            for entries_VD, codes_F in zip(self.codebooks, codes_FK.T.astype(np.int64), strict=True)
        )
        envelope = sum(others, first) @ self.components + self.mean
        return Features(envelope, pitch / scale_pitch(np.ones(2 * PARTS)), aperiodicity)


def scale_pitch(pitch_F8: np.ndarray) -> np.ndarray:
    """Log pitch weighted against voicing, as the codebook holds them."""
    return pitch_F8 * np.repeat([PITCH_SCALE, 1.0], PARTS)

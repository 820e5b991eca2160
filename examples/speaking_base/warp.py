"""Other voices and other rooms of the same clip, on WORLD's features.

Voices have vocal tracts longer or shorter, another colour, and pitch that is lower or higher and moves more or less.
Rooms have noise.
"""

import random
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np
import pyworld

from speechtune.families.higgs_audio_v2.codec_world import ENVELOPE_SIZE, PARTS, SAMPLING_RATE, Features

STEPS = 100  # stretches are whole hundredths
CURVE_POINTS, CURVE_DECIBELS = 7, 4.0


@dataclass(frozen=True)
class Warp:
    """What makes another voice.

    Attributes:
        stretch: of the frequency axis, in hundredths.
        semitones: added to the pitch.
        intonation: by which the pitch's movement around its mean is multiplied.
        curve: gain in decibels at frequencies that the ear takes for evenly spaced.
    """

    stretch: int
    semitones: float
    intonation: float
    curve: tuple[float, ...]


@dataclass(frozen=True)
class Room:
    """Noise.

    Attributes:
        decibels: of its power, against the mean power of a clip.
        curve: its gain in decibels, as a warp's.
    """

    decibels: float
    curve: tuple[float, ...]


def random_curve(draw: random.Random) -> tuple[float, ...]:
    """A gain by frequency."""
    return tuple(draw.gauss(0.0, CURVE_DECIBELS) for _ in range(CURVE_POINTS))


def random_warp(draw: random.Random) -> Warp:
    """A vocal tract up to 15 % other, and a pitch that goes with it more or less."""
    stretch = draw.choice((draw.randint(86, 96), draw.randint(104, 116)))
    semitones = draw.uniform(-3.0, 3.0) + 14.4 * float(np.log2(stretch / STEPS))
    return Warp(stretch, semitones, draw.uniform(0.6, 1.4), random_curve(draw))


def random_room(draw: random.Random, quietest: float, loudest: float) -> Room:
    """Noise of a power between these, in decibels, and of any colour."""
    return Room(draw.uniform(quietest, loudest), random_curve(draw))


def _fft_bins() -> int:
    return pyworld.get_cheaptrick_fft_size(SAMPLING_RATE) // 2


def _coded(power: np.ndarray) -> np.ndarray:
    return pyworld.code_spectral_envelope(np.ascontiguousarray(power), SAMPLING_RATE, ENVELOPE_SIZE)


def _decoded(coded: np.ndarray) -> np.ndarray:
    return pyworld.decode_spectral_envelope(np.ascontiguousarray(coded), SAMPLING_RATE, 2 * _fft_bins())


@cache
def stretching(stretch: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (40, 40) and offset (40,) that stretch a coded envelope: coding is linear in the logarithm."""
    bins = _fft_bins()
    logs = np.log(_decoded(np.concatenate([np.zeros((1, ENVELOPE_SIZE)), np.eye(ENVELOPE_SIZE)])))
    sources = np.minimum(np.arange(bins + 1) * STEPS / stretch, bins)
    left = sources.astype(int)
    share = sources - left
    moved = logs[:, left] * (1 - share) + logs[:, np.minimum(left + 1, bins)] * share
    back = _coded(np.exp(moved))
    return back[1:] - back[0], back[0]


@lru_cache(64)
def colouring(curve: tuple[float, ...]) -> np.ndarray:
    """What a gain by frequency adds to a coded envelope, (40,)."""
    power = np.stack([np.ones(_fft_bins() + 1), _gains(curve)])
    flat, coloured = _coded(power)
    return coloured - flat


def _gains(curve: tuple[float, ...]) -> np.ndarray:
    """Gain of power of each bin."""
    mel = np.log1p(np.arange(_fft_bins() + 1) * SAMPLING_RATE / (2 * _fft_bins()) / 700)
    return 10 ** (np.interp(mel, np.linspace(0, mel[-1], len(curve)), curve) / 10)


def warped(features: Features, warp: Warp) -> Features:
    """The features of another voice."""
    matrix, offset = stretching(warp.stretch)
    envelope = features.envelope.reshape(-1, ENVELOPE_SIZE) @ matrix + offset + colouring(warp.curve)
    pitch, mean = features.pitch.copy(), features.pitch[:, :PARTS].mean()
    pitch[:, :PARTS] = mean + (pitch[:, :PARTS] - mean) * warp.intonation + warp.semitones * np.log(2) / 12
    return replace(features, envelope=envelope.reshape(len(features.envelope), -1), pitch=pitch)


def in_room(features: Features, room: Room) -> Features:
    """The same clip with noise."""
    power = _decoded(features.envelope.reshape(-1, ENVELOPE_SIZE))
    noise = power.mean() * 10 ** (room.decibels / 10) * _gains(room.curve)
    return replace(features, envelope=_coded(power + noise).reshape(len(features.envelope), -1))

"""Other voices of the same clip: vocal tracts longer or shorter, pitch lower or higher, on WORLD's features."""

import random
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pyworld

from speechtune.families.higgs_audio_v2.codec_world import ENVELOPE_SIZE, PARTS, SAMPLING_RATE, Features

STEPS = 100  # stretches are whole hundredths


@dataclass(frozen=True)
class Warp:
    """`stretch` of the frequency axis, in hundredths; `semitones` of pitch."""

    stretch: int
    semitones: float


def random_warp(draw: random.Random) -> Warp:
    """A vocal tract up to 15 % other, and a pitch that goes with it more or less."""
    stretch = draw.choice((draw.randint(87, 95), draw.randint(105, 115)))
    return Warp(stretch, draw.uniform(-2.5, 2.5) + 14.4 * float(np.log2(stretch / STEPS)))


@cache
def stretching(stretch: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (40, 40) and offset (40,) that stretch a coded envelope: coding is linear in the logarithm."""
    bins = pyworld.get_cheaptrick_fft_size(SAMPLING_RATE) // 2
    coded = np.concatenate([np.zeros((1, ENVELOPE_SIZE)), np.eye(ENVELOPE_SIZE)])
    logs = np.log(pyworld.decode_spectral_envelope(coded, SAMPLING_RATE, 2 * bins))
    sources = np.minimum(np.arange(bins + 1) * STEPS / stretch, bins)
    left = sources.astype(int)
    share = sources - left
    moved = logs[:, left] * (1 - share) + logs[:, np.minimum(left + 1, bins)] * share
    back = pyworld.code_spectral_envelope(np.ascontiguousarray(np.exp(moved)), SAMPLING_RATE, ENVELOPE_SIZE)
    return back[1:] - back[0], back[0]


def warped(features: Features, warp: Warp) -> Features:
    """The features of another voice."""
    matrix, offset = stretching(warp.stretch)
    envelope = features.envelope.reshape(-1, ENVELOPE_SIZE) @ matrix + offset
    pitch = features.pitch.copy()
    pitch[:, :PARTS] += warp.semitones * np.log(2) / 12
    return replace(features, envelope=envelope.reshape(len(features.envelope), -1), pitch=pitch)

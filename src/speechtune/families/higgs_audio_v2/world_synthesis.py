"""WORLD's synthesis for many pulses at a time; WORLD itself transforms them one by one, which takes twice as long.

Masanori Morise, Fumiya Yokomori, Kenji Ozawa: WORLD: a vocoder-based high-quality speech synthesis system for
real-time applications, IEICE Transactions 2016.

Shapes: T frames of 10 ms, N samples, P pulses, L samples of the longest one, W transform size, S = W / 2 + 1.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

UNVOICED_HZ = 500.0  # pulses of what has no pitch
FRAME_SECONDS = 0.01
POWER = (1e-30, 1e30)  # beyond it single precision cannot count
AT_ONCE = 256  # pulses: what fits into a core's cache


class Pulses(NamedTuple):
    """Where a voice is excited; all (P,).

    Attributes:
        starts: the last sample before each.
        delays: by what share of a sample it comes later.
        lengths: samples to the next.
        voiced: True where it is periodic.
    """

    starts: np.ndarray
    delays: np.ndarray
    lengths: np.ndarray
    voiced: np.ndarray


def place_pulses(pitch_T: np.ndarray, num_samples: int, sampling_rate: int) -> Pulses:
    """Pulses of a pitch in Hz, 0 where there is none; the operations are WORLD's, for one moved changes all noise."""
    times_N, times_T = np.arange(num_samples) / sampling_rate, np.arange(len(pitch_T) + 1) * FRAME_SECONDS
    frame_N = np.searchsorted(times_T, times_N, side="right") - 1
    share_N = (times_N - times_T[frame_N]) / np.diff(times_T)[frame_N]

    def at_samples(values_T: np.ndarray) -> np.ndarray:
        values_T = np.append(values_T, 2 * values_T[-1] - values_T[-2])
        return values_T[frame_N] + share_N * np.diff(values_T)[frame_N]

    voiced_N = at_samples((pitch_T > 0).astype(np.float64)) > 0.5
    turn, pitch_N = 2 * np.pi, np.where(voiced_N, at_samples(pitch_T), UNVOICED_HZ)
    phase_N = np.fmod(np.cumsum(turn * pitch_N / sampling_rate), turn)
    places = np.flatnonzero(np.abs(np.diff(phase_N)) > np.pi)
    before, after = turn - phase_N[places], phase_N[places + 1]
    starts = places[:-1]  # the last pulse has no end, and no sound
    return Pulses(starts, (before / (before + after))[:-1], np.diff(places), voiced_N[starts])


def pulse_noise(pulses: Pulses, noise_N: np.ndarray) -> np.ndarray:
    """Noise (P, L) from each pulse to the next, its mean taken off; zeros behind."""
    steps_L = np.arange(pulses.lengths.max(initial=0))
    inside_PL = steps_L < pulses.lengths[:, None]
    noise_PL = noise_N[np.minimum(pulses.starts[:, None] + steps_L, len(noise_N) - 1)] * inside_PL
    return noise_PL - inside_PL * (noise_PL.sum(axis=1) / pulses.lengths)[:, None]


def minimum_phase(power_PS: torch.Tensor, delays_P: torch.Tensor | None = None) -> torch.Tensor:
    """Spectra of minimum phase with this power, delayed by shares of a sample."""
    half = power_PS.shape[1] - 1
    cepstra_PW = torch.fft.irfft(power_PS.log() / 2)
    cepstra_PW[:, 1:half] *= 2
    cepstra_PW[:, half + 1 :] = 0
    logarithms_PS = torch.fft.rfft(cepstra_PW)
    sizes_PS, angles_PS = logarithms_PS.real.exp(), logarithms_PS.imag
    if delays_P is not None:
        angles_PS = angles_PS - delays_P[:, None] * torch.linspace(0, math.pi, half + 1)
    return torch.complex(sizes_PS * angles_PS.cos(), sizes_PS * angles_PS.sin())  # ten times as fast as exp


def render(
    pitch_T: np.ndarray, power_TS: np.ndarray, aperiodicity_TS: np.ndarray, noise_N: np.ndarray, sampling_rate: int
) -> np.ndarray:
    """Samples (N,), float32, of a pitch in Hz (0 where there is none), power spectra, and the noise's share of them.

    `noise_N` are draws of a standard normal distribution.
    """
    num_samples, half = len(noise_N), power_TS.shape[1] - 1
    pulses = place_pulses(pitch_T, num_samples, sampling_rate)
    frames = pulses.starts * (len(pitch_T) / num_samples)
    low = frames.astype(np.int64)
    starts, low_P, high_P = map(torch.from_numpy, (pulses.starts, low, np.minimum(low + 1, len(pitch_T) - 1)))
    shares, delays, noise_PL, roots, power, shares_of_noise = (
        torch.from_numpy(values.astype(np.float32))
        for values in (
            (frames - low)[:, None], pulses.delays, pulse_noise(pulses, noise_N), np.sqrt(pulses.lengths)[:, None],
            power_TS.clip(*POWER), aperiodicity_TS.clip(0.001, 1),
        )
    )  # fmt: skip
    voiced = torch.from_numpy(pulses.voiced)
    window_W = torch.hann_window(2 * half + 2, periodic=False)[1:-1].roll(half)
    window_W /= window_W.sum()
    places_W = torch.arange(2 * half).roll(half) + half + 1
    sum_N = torch.zeros(num_samples + 4 * half)
    for first in range(0, len(starts), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        power_PS, noisy_PS = (
            torch.lerp(values[low_P[part]], values[high_P[part]], shares[part]) for values in (power, shares_of_noise)
        )
        noisy_PS = noisy_PS.square_()
        filters_PS = minimum_phase(torch.where(voiced[part, None], power_PS * noisy_PS, power_PS))
        waves_PW = torch.fft.irfft(filters_PS * torch.fft.rfft(noise_PL[part], 2 * half))
        tonal = (voiced[part] & (noisy_PS[:, 0] <= 0.999)).nonzero()[:, 0]
        if len(tonal):
            power_PS = power_PS[tonal] * (1 - noisy_PS[tonal]) + 1e-12
            tones_PW = torch.fft.irfft(minimum_phase(power_PS, delays[part][tonal]))
            tones_PW[:, half:] = 0
            tones_PW -= tones_PW.sum(1, keepdim=True) * window_W
            waves_PW.index_add_(0, tonal, tones_PW * roots[part][tonal])
        sum_N.index_add_(0, (starts[part, None] + places_W).flatten(), waves_PW.flatten())
    return sum_N[2 * half : 2 * half + num_samples].numpy()

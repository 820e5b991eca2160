"""Loudness of clips after EBU R 128, with peaks that never clip; and whether they were clipped before."""

import numpy as np

from speechtune.audio import resample
from speechtune.preparation.results import Result
from speechtune.preparation.settings import INSTALL, LoudnessSettings
from speechtune.tasks.voice_cloning.support import need
from speechtune.types import Audio

AT_PEAK, STILL = 0.98, 1e-3  # of the highest value
OVERSAMPLED = 4  # as ITU-R BS.1770-4, annex 2, measures true peaks


class Loudness(Result, frozen=True):
    """Of a clip as it was recorded: integrated loudness, true peak, and the share of samples that stand still at the
    peak; and by how much it was raised."""

    lufs: float
    peak_dbfs: float
    clipping: float
    gain_db: float


def normalise(audio: Audio, sampling_rate: int, settings: LoudnessSettings) -> tuple[Audio, Loudness]:
    """A clip resampled, with one gain for all of it: to the loudness asked for, or as near as its peak allows."""
    clipping = _clipping(audio.samples)  # resampled, what was flat ripples
    audio = resample(audio, sampling_rate)
    meter = need("pyloudnorm", "loudness", INSTALL).Meter(audio.sampling_rate)
    least = int(meter.block_size * audio.sampling_rate) + 1
    lufs = float(meter.integrated_loudness(np.pad(audio.samples, (0, max(0, least - len(audio.samples))))))
    peak = 20 * np.log10(np.abs(resample(audio, OVERSAMPLED * audio.sampling_rate).samples).max() + 1e-12)
    gain = 0.0
    if settings.target_lufs is not None and np.isfinite(lufs):
        gain = settings.target_lufs - lufs
    gain = min(gain, settings.peak_dbfs - peak)
    louder = Audio((audio.samples * 10 ** (gain / 20)).astype(np.float32), audio.sampling_rate)
    found = Loudness(
        lufs=round(max(lufs, -99.0), 2),
        peak_dbfs=round(float(peak), 2),
        clipping=round(clipping, 5),
        gain_db=round(float(gain), 2),
    )
    return louder, found


def _clipping(samples: np.ndarray) -> float:
    """Share of the samples equal to the one before at the highest value, also where that was lowered afterwards."""
    peak = np.abs(samples).max(initial=0.0)
    return float(np.mean((np.abs(samples[1:]) >= AT_PEAK * peak) & (np.abs(np.diff(samples)) <= STILL * peak)))

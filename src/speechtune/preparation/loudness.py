"""Loudness of clips after EBU R 128, with peaks that never clip."""

import numpy as np

from speechtune.audio import resample
from speechtune.preparation.results import Result
from speechtune.preparation.settings import LoudnessSettings
from speechtune.tasks.voice_cloning.support import need
from speechtune.types import Audio

INSTALL = "pip install 'speechtune[prepare]'"
OVERSAMPLED = 4  # as ITU-R BS.1770-4, annex 2, measures true peaks


class Loudness(Result, frozen=True):
    """Of a clip as it was recorded: integrated loudness and true peak; and by how much it was raised."""

    lufs: float
    peak_dbfs: float
    gain_db: float


def normalise(audio: Audio, settings: LoudnessSettings) -> tuple[Audio, Loudness]:
    """A clip at the loudness the settings ask for, or as near to it as its peak allows: one gain for all of it."""
    meter = need("pyloudnorm", "loudness", INSTALL).Meter(audio.sampling_rate)
    least = int(meter.block_size * audio.sampling_rate) + 1
    lufs = float(meter.integrated_loudness(np.pad(audio.samples, (0, max(0, least - len(audio.samples))))))
    peak = 20 * np.log10(np.abs(resample(audio, OVERSAMPLED * audio.sampling_rate).samples).max() + 1e-12)
    gain = 0.0
    if settings.target_lufs is not None and np.isfinite(lufs):
        gain = settings.target_lufs - lufs
    gain = min(gain, settings.peak_dbfs - peak)
    louder = Audio((audio.samples * 10 ** (gain / 20)).astype(np.float32), audio.sampling_rate)
    found = Loudness(lufs=round(max(lufs, -99.0), 2), peak_dbfs=round(float(peak), 2), gain_db=round(float(gain), 2))
    return louder, found

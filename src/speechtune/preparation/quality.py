"""How a clip sounds: noise, and a predicted mean opinion score."""

import numpy as np

from speechtune.family import MosPredictor
from speechtune.preparation.activity import FRAME, sound_kind, spectral_flatness
from speechtune.preparation.results import Result
from speechtune.tasks.voice_cloning.support import waveform
from speechtune.types import Audio

FRAME_SECONDS = 0.02
QUIET_FRAMES = 5  # the quietest tenth of a second, in the margins or between words, holds noise alone


class Quality(Result, frozen=True):
    """Measures of a clip; `sound` is what it is instead of speech, `snr_db` speech over the noise of its pauses."""

    snr_db: float
    noise_dbfs: float
    sound: str | None
    mos: float | None


def measure(audio: Audio, gain_db: float, predictor: MosPredictor | None) -> Quality:
    """Measure a clip that was raised by `gain_db`; its noise floor is that of the recording."""
    samples = audio.samples.astype(np.float64)
    size = int(FRAME_SECONDS * audio.sampling_rate)
    power = (samples[: len(samples) // size * size].reshape(-1, size) ** 2).mean(axis=1) + 1e-12
    noise = float(np.sort(power)[:QUIET_FRAMES].mean())
    speech = max(float(power.mean()) - noise, 1e-12)
    frames = waveform(audio)
    frames = frames[: len(frames) // FRAME * FRAME].reshape(-1, FRAME)
    return Quality(
        snr_db=round(10 * float(np.log10(speech / noise)), 1),
        noise_dbfs=round(10 * float(np.log10(noise)) - gain_db, 1),
        sound=sound_kind(spectral_flatness(frames)),
        mos=None if predictor is None else round(float(predictor.predict([audio])[0]), 3),
    )

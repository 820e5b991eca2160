"""Voice activity: where a recording holds speech, where noise or a tone, by Silero VAD or by level alone."""

from collections.abc import Iterator
from typing import Literal, Protocol

import numpy as np

from speechtune.audio import stream_audio
from speechtune.preparation.recordings import Recording
from speechtune.preparation.results import Progress, Result
from speechtune.preparation.settings import INSTALL, ActivitySettings
from speechtune.tasks.voice_cloning.support import RATE, identity, need, package_file
from speechtune.types import AudioRef

FRAME, CONTEXT = 512, 64
"""Samples of a frame, 32 ms, and of the one before it that Silero's network sees too (silero_vad/sequence_vad.py)."""
SILERO_MODEL = "data/silero_vad_16k_sequence.onnx"
LOUD_DB, FAINT_DB, SILENT_DBFS, DIGITAL_DBFS = 15.0, 10.0, -60.0, -96.0
"""A frame without speech is a noise when it exceeds the room's quietest tenth by 15 dB, and this level; at the ends of
speech it belongs to it from 10 dB on."""
WIDENED, NARROWED = 5, 3  # frames by which level may move an end of speech that the detector set
SHORTEST_SPEECH, ALONE = 8, 16  # frames: shorter speech than 0.25 s, half a second away from any other, is none
SHORTEST_STRETCH = 16  # frames, half a second: of noise or a tone
TONE_FLATNESS, NOISE_FLATNESS = 3e-3, 0.35
"""Spectral flatness below which even the noisiest tenth of a tone's frames stays, and above which half of a noise's
frames lie; of speech the former is 0.02 to 0.2, the latter below 0.01."""


class Stretch(Result, frozen=True):
    """A part of a recording without speech, in seconds."""

    start: float
    end: float
    kind: Literal["noise", "tone"]


class Activity(Result, frozen=True):
    """What a recording holds: `speech` as (start, end) in seconds, and stretches of `noise` and tones between it."""

    speech: tuple[tuple[float, float], ...]
    stretches: tuple[Stretch, ...]


class Detector(Protocol):
    """Voice activity from blocks of audio at 16 kHz."""

    name: str

    def probabilities(self, frames: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """Of each frame of shape (frames, 512), given the last samples before them; blocks come in order."""
        ...

    def reset(self) -> None:
        """Begin a new recording."""
        ...


class Silero:
    """Silero VAD 6 (MIT) in its sequence form: the same numbers as frame by frame, a block in one call."""

    def __init__(self) -> None:
        weights = package_file("silero_vad", SILERO_MODEL, "voice activity", INSTALL)
        runtime = need("onnxruntime", "voice activity", INSTALL)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = 1  # the network is too small for more
        self._session = runtime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])
        self.name = identity("silero-vad", weights)
        self.reset()

    def reset(self) -> None:
        """Forget the recording before."""
        self._hidden = self._cell = np.zeros((1, 1, 128), np.float32)

    def probabilities(self, frames: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """Of each frame, float32 of shape (frames,)."""
        before = np.concatenate([previous[None, -CONTEXT:], frames[:-1, -CONTEXT:]])
        inputs = {"input": np.concatenate([before, frames], axis=1), "h": self._hidden, "c": self._cell}
        found, self._hidden, self._cell = self._session.run(["speech_probs", "hn", "cn"], inputs)
        return found.reshape(-1)


class Energy:
    """The fallback without a network: a frame well above the quietest tenth of its 30 s is taken for speech."""

    name = "energy above the room's noise"

    def reset(self) -> None:
        """Nothing is kept between blocks."""

    def probabilities(self, frames: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """1 or 0 of each frame."""
        levels = _levels(frames)
        return (levels > max(np.quantile(levels, 0.1) + LOUD_DB, SILENT_DBFS)).astype(np.float32)


def load_detector(settings: ActivitySettings) -> Detector:
    """The detector that the settings name; ConfigError where its package is missing."""
    return Silero() if settings.detector == "silero" else Energy()


def find_speech(
    recording: Recording, detector: Detector, settings: ActivitySettings, progress: Progress, done: float, total: float
) -> Activity:
    """Speech and other sounds of a recording, which is read as a stream; `done` and `total` are seconds."""
    detector.reset()
    found, levels, flatness = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    previous = np.zeros(FRAME, np.float32)
    count = 0
    for frames in _frames(recording.ref):
        found.append(detector.probabilities(frames, previous))
        levels.append(_levels(frames))
        flatness.append(spectral_flatness(frames))
        previous = frames[-1]
        count += len(frames)
        progress("activity", done + count * FRAME / RATE, total)
    seconds = recording.info.duration_seconds
    level = np.concatenate(levels)
    room = level[level > DIGITAL_DBFS]  # a gate or an editor leaves digital silence, which says nothing of the room
    floor = float(np.quantile(room, 0.1)) if len(room) else DIGITAL_DBFS
    speech = _regions(np.concatenate(found), level > max(floor + FAINT_DB, SILENT_DBFS), seconds, settings)
    loud = level > max(floor + LOUD_DB, SILENT_DBFS)
    stretches = _stretches(loud, np.concatenate(flatness), speech)
    return Activity(speech=speech, stretches=stretches)


def _frames(ref: AudioRef) -> Iterator[np.ndarray]:
    """Whole frames at 16 kHz block by block; the last one is filled up with silence."""
    rest = np.zeros(0, np.float32)
    for block in stream_audio(ref, RATE):
        rest = np.concatenate([rest, block])
        count = len(rest) // FRAME
        if count:
            yield rest[: count * FRAME].reshape(-1, FRAME)
        rest = rest[count * FRAME :]
    if len(rest):
        yield np.pad(rest, (0, FRAME - len(rest)))[None]


def _levels(frames: np.ndarray) -> np.ndarray:
    """Level of each frame in dBFS."""
    return 10 * np.log10((frames.astype(np.float64) ** 2).mean(axis=1) + 1e-12)


def spectral_flatness(frames: np.ndarray) -> np.ndarray:
    """Geometric over arithmetic mean of each frame's power spectrum: 0 for a tone, 0.56 for white noise."""
    power = np.abs(np.fft.rfft(frames * np.hanning(frames.shape[1]).astype(np.float32)))[:, 1:] ** 2 + 1e-10
    return np.exp(np.log(power).mean(axis=1)) / power.mean(axis=1)


def sound_kind(flatness: np.ndarray) -> Literal["noise", "tone"] | None:
    """What frames of this flatness are for certain; None may be speech."""
    if np.quantile(flatness, 0.9) < TONE_FLATNESS:
        return "tone"
    return "noise" if np.median(flatness) > NOISE_FLATNESS else None


def _regions(
    probabilities: np.ndarray, heard: np.ndarray, seconds: float, settings: ActivitySettings
) -> tuple[tuple[float, float], ...]:
    """Stretches of speech, by Silero's own rules: hysteresis of 0.15, pauses from a least length on.

    The network sees a soft beginning up to 0.1 s late, and holds on 0.1 s after an end: what is `heard` corrects both.
    """
    speech = _hysteresis(probabilities, settings.threshold, max(settings.threshold - 0.15, 0.01))
    regions: list[list[float]] = []
    runs = _runs(speech)
    ends = [-ALONE, *(last for _, last in runs)]
    begins = [*(first for first, _ in runs), len(speech) + ALONE]
    for number, (first, last) in enumerate(runs):
        alone = first - ends[number] >= ALONE and begins[number + 1] - last >= ALONE
        if alone and last - first < SHORTEST_SPEECH:  # a click, or the beginning of a tone
            continue
        before, after = heard[max(0, first - WIDENED) : first][::-1], heard[last : last + WIDENED]
        first -= _count(before)
        if grown := _count(after):
            last += grown
        else:
            last -= _count(~heard[max(first + 1, last - NARROWED) : last][::-1])
        start, end = first * FRAME / RATE, min(last * FRAME / RATE, seconds)
        if regions and start - regions[-1][1] < settings.min_silence_seconds:
            regions[-1][1] = end
        else:
            regions.append([start, end])
    return tuple((round(start, 3), round(end, 3)) for start, end in regions)


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """First and last (exclusive) place of each run of True."""
    edges = np.flatnonzero(np.diff(np.pad(flags.astype(np.int8), 1)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _count(flags: np.ndarray) -> int:
    """How many True values stand first."""
    return int(np.logical_and.accumulate(flags).sum())


def _hysteresis(values: np.ndarray, on: float, off: float) -> np.ndarray:
    """Whether each value lies in a run that began at `on` and has not fallen below `off` since."""
    decided = np.where(values >= on, 1, np.where(values < off, 0, -1))
    decided[0] = max(decided[0], 0)
    last = np.maximum.accumulate(np.where(decided >= 0, np.arange(len(decided)), 0))
    return decided[last] == 1


def _stretches(loud: np.ndarray, flatness: np.ndarray, speech: tuple[tuple[float, float], ...]) -> tuple[Stretch, ...]:
    """Loud sounds of half a second and more outside speech."""
    loud = loud.copy()
    for start, end in speech:
        loud[int(start * RATE / FRAME) : int(np.ceil(end * RATE / FRAME))] = False
    joined: list[tuple[int, int]] = []
    for first, last in _runs(loud):
        if joined and first - joined[-1][1] < SHORTEST_STRETCH:
            joined[-1] = joined[-1][0], last
        else:
            joined.append((first, last))
    step = FRAME / RATE
    return tuple(
        Stretch(start=round(a * step, 3), end=round(b * step, 3), kind=sound_kind(flatness[a:b]) or "noise")
        for a, b in joined
        if b - a >= SHORTEST_STRETCH
    )

"""The first step: which recordings there are, and pieces of them."""

import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechtune.audio import AudioInfo, InvalidAudioError, audio_info, content_hash, file_name, stream_audio
from speechtune.data.folders import walk
from speechtune.data.plain_rows import is_clip
from speechtune.errors import AudioError, ConfigError
from speechtune.preparation.results import Progress
from speechtune.types import Audio, AudioRef

HASH_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Recording:
    """One file: `name` is its path below the folder given, `stem` begins the ids of its clips, `digest` hashes it."""

    name: str
    stem: str
    ref: AudioRef
    info: AudioInfo
    digest: str


def find_recordings(place: Path, progress: Progress) -> list[Recording]:
    """A file, or all audio files of a folder in the order of their names.

    Raises ConfigError: there is none; AudioError: some cannot be read, all of them are named.
    """
    if not place.exists():
        raise ConfigError(f"{place}: no such file or folder")
    names = [place.name]
    folder = place.parent
    if place.is_dir():
        folder = place
        names = [os.path.join(inside, name) for inside, files in walk(place) for name in files if is_clip(name)]
    if not names:
        raise ConfigError(f"{place}: holds no audio files")
    stems = Counter(os.path.splitext(name)[0] for name in names)
    recordings, unreadable = list[Recording](), list[str]()
    for number, name in enumerate(names):
        progress("recordings", number, len(names))
        ref, stem = AudioRef(str(folder / name)), os.path.splitext(name)[0]
        stem = file_name(stem if stems[stem] == 1 else name)
        try:
            recordings.append(Recording(name, stem, ref, audio_info(ref), content_hash(ref)[:HASH_DIGITS]))
        except InvalidAudioError as error:
            unreadable.append(str(error))
    progress("recordings", len(names), len(names))
    if unreadable:
        lines = "\n  ".join(unreadable)
        raise AudioError(
            f"{len(unreadable)} of {len(names)} recording(s) cannot be read; repair or remove them:\n  {lines}"
        )
    return recordings


def cut_out(recording: Recording, spans: Sequence[tuple[float, float]]) -> Iterator[Audio]:
    """The audio of spans (start, end in seconds), in order and not overlapping, at the file's rate, in one pass."""
    rate = recording.info.sampling_rate
    pending = deque((round(start * rate), round(end * rate)) for start, end in spans)
    parts, position = list[np.ndarray](), 0
    for block in stream_audio(recording.ref):
        while pending and pending[0][0] < position + len(block):
            first, last = pending[0]
            parts.append(block[max(0, first - position) : last - position])
            if last > position + len(block):
                break
            pending.popleft()
            yield Audio(np.concatenate(parts), rate)
            parts = []
        position += len(block)
    if parts:  # a last span may end a frame behind the file, by rounding
        yield Audio(np.concatenate(parts), rate)

"""Players of a report page: clips as MP3 and mel pictures as PNG, both inside the page as data URIs."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
from PIL import Image

from speechtune.audio import audio_info, read_audio, resample
from speechtune.errors import AudioError
from speechtune.report.facts import figure
from speechtune.report.read_run import Clip, Prompt, RunReport, number
from speechtune.training.tracking import mel_picture
from speechtune.types import Audio, AudioRef

MAX_PAGE_AUDIO_BYTES = 12 * 2**20
"""Most bytes of data URIs on a page, 12 MiB; the clips that come after are named and left in their folder."""
MAX_CLIP_SECONDS = 30.0
"""Longest part of a clip that is put on a page."""
MAX_SAMPLING_RATE = 24_000
"""Sampling rate in Hz above which clips are resampled for a page."""
MAX_PROMPTS = 60
"""Prompts on a page; the first ones."""

MEL_MAX_COLUMNS = 300
# Ten colours of matplotlib's viridis, whose order survives colour blindness and printing in grey.
VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"


class Picture(NamedTuple):
    """A clip for the page: data URIs of its sound and mel picture, how much of it is there, and its full duration."""

    sound: str
    mel: str
    shown_seconds: float
    duration_seconds: float


@dataclass
class AudioBudget:
    """Encodes clips until the page is full; `left_out` and `broken` list those that are not on it."""

    limit: int = MAX_PAGE_AUDIO_BYTES
    used: int = 0
    longest_seconds: float = 0.0
    left_out: list[Path] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def picture(self, path: Path) -> Picture | None:
        """The clip as data URIs, or None if it is broken or does not fit any more."""
        if self.used < self.limit:
            try:
                picture = make_picture(path)
            except AudioError as error:
                self.broken.append(str(error))
                return None
            size = len(picture.sound) + len(picture.mel)
            if self.used + size <= self.limit:
                self.used += size
                self.longest_seconds = max(self.longest_seconds, picture.shown_seconds)
                return picture
        self.left_out.append(path)
        return None


def make_picture(path: Path) -> Picture:
    """Encode one clip; `AudioError` if it cannot be read, or holds nothing."""
    full = audio_info(AudioRef(str(path))).duration_seconds
    audio = read_audio(AudioRef(str(path), duration_seconds=MAX_CLIP_SECONDS if full > MAX_CLIP_SECONDS else None))
    if not len(audio.samples):
        raise AudioError(f"{path}: holds no samples")
    levels = mel_picture(audio)
    num_columns = math.ceil(levels.shape[1] / math.ceil(levels.shape[1] / MEL_MAX_COLUMNS))
    levels = np.stack([part.max(1) for part in np.array_split(levels, num_columns, 1)], 1)
    sound = encode_sound(resample(audio, min(audio.sampling_rate, MAX_SAMPLING_RATE)))
    mel = data_uri("image/png", png(levels & 0xFC))  # 64 levels: smaller, and look the same
    return Picture(sound, mel, min(full, MAX_CLIP_SECONDS), full)


def encode_sound(audio: Audio) -> str:
    """MP3, which every browser plays; 16-bit WAV where libsndfile cannot write it, or not at this sampling rate."""
    buffer = io.BytesIO()
    samples = np.clip(audio.samples, -1.0, 1.0)
    try:
        soundfile.write(buffer, samples, audio.sampling_rate, format="MP3", subtype="MPEG_LAYER_III")
        return data_uri("audio/mpeg", buffer.getvalue())
    except (soundfile.SoundFileError, ValueError):  # ValueError: a libsndfile older than 1.1 knows no MP3
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, audio.sampling_rate, format="WAV", subtype="PCM_16")
        return data_uri("audio/wav", buffer.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    """Bytes as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def png(levels: np.ndarray) -> bytes:
    """A PNG of a uint8 picture (rows, columns) in the colours of `VIRIDIS`."""
    anchors = np.array([list(bytes.fromhex(colour)) for colour in VIRIDIS.split()], float)
    places = np.linspace(0, len(anchors) - 1, 256)
    palette = np.stack([np.interp(places, range(len(anchors)), channel) for channel in anchors.T], 1).round()
    picture, buffer = Image.fromarray(levels), io.BytesIO()
    picture.putpalette(palette.astype(np.uint8).tobytes())
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def spread(steps: Sequence[int], best: int | None) -> list[int]:
    """Steps by importance: the base, the last, the best, then the middle of each gap."""
    order = [step for step in (0, *steps[-1:], best) if step is not None and step in steps]
    queue = [[step for step in steps if step not in order]]
    for part in queue:  # grows meanwhile
        if part:
            middle = len(part) // 2
            order.append(part[middle])
            queue += [part[:middle], part[middle + 1 :]]
    return list(dict.fromkeys(order))


CLIP_SCORES = {"wer": "WER", "per": "PER", "sim": "similarity", "mos": "MOS", "duration_ratio": "duration ×"}


@dataclass
class Cell:
    """One clip of one run on the page; cells of lower `rank` get their sound first."""

    label: str
    clip: Clip
    rank: int
    lines: list[str]
    picture: Picture | None = None


def samples(reports: Sequence[RunReport], budget: AudioBudget) -> list[tuple[Prompt, list[Cell]]]:
    """Prompts over all runs with their clips; the first `MAX_PROMPTS` get players and mel pictures."""
    prompts: dict[tuple[str, str], tuple[Prompt, list[Cell]]] = {}
    for report in reports:
        for prompt in report.prompts:
            _, cells = prompts.setdefault((prompt.id, prompt.text), (prompt, []))
            cells += _cells(report, prompt, len(reports) > 1, bool(cells))
    shown = [cell for _, cells in list(prompts.values())[:MAX_PROMPTS] for cell in cells]
    for cell in sorted(shown, key=lambda cell: cell.rank):
        cell.picture = budget.picture(cell.clip.path) if cell.clip.path is not None else None
    return list(prompts.values())


def _cells(report: RunReport, prompt: Prompt, several: bool, has_reference: bool) -> list[Cell]:
    order = spread([clip.step for clip in prompt.clips if clip.step is not None], report.best_step)
    cells = []
    for clip in prompt.clips:
        if clip.step is None:
            cells += [] if has_reference else [Cell("reference", clip, 0, _lines(clip.scores))]
            continue
        label = "base, zero-shot" if clip.step == 0 else f"step {clip.step:,}"
        label = (f"{report.name}: " if several else "") + label + (" (best)" if clip.step == report.best_step else "")
        cells.append(Cell(label, clip, 1 + order.index(clip.step), _lines(clip.scores)))
    return cells


def _lines(scores: Mapping[str, Any]) -> list[str]:
    """Scores and transcript of a clip, in words."""
    known = [name for name in CLIP_SCORES if scores.get(name) is not None]
    shown = [f"{CLIP_SCORES[name]} {figure(scores[name], 3)}" for name in known]
    if number(scores.get("seconds")) is not None:
        shown.append(f"{figure(scores['seconds'], 3)} s")
    if scores.get("stopped") is False:
        shown.append("did not stop by itself")
    transcript = [f"transcript: {scores['transcript']}"] if scores.get("transcript") is not None else []
    return [", ".join(shown), *transcript] if shown else transcript

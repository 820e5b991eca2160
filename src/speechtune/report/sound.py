"""Recordings for a page that carries all with it: clips as MP3, mel pictures as PNG, both as data URIs."""

from __future__ import annotations

import base64
import io
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from speechtune.audio import audio_info, read_audio
from speechtune.errors import AudioError
from speechtune.report.facts import figure
from speechtune.report.read_run import Clip, Prompt, RunReport, number
from speechtune.types import Audio, AudioRef

MAX_PAGE_AUDIO_BYTES = 12 * 2**20
"""Most bytes of data URIs on a page, 12 MiB; the clips that come after are named and left in their folder."""
MAX_CLIP_SECONDS = 30.0
"""Longest part of a clip that is put on a page."""
MAX_SAMPLING_RATE = 24_000
"""Sampling rate in Hz above which clips are resampled for a page."""

MEL_SAMPLING_RATE, MEL_BANDS, MEL_HOP, MEL_WINDOW = 16_000, 64, 160, 512
MEL_MAX_COLUMNS = 300
MEL_RANGE_DB = 70.0
# Ten colours of matplotlib's viridis, which the colour-blind and greyscale printers keep in order.
VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"


@dataclass(frozen=True, slots=True)
class Picture:
    """A clip ready for the page: data URIs of sound and mel picture, its full length, and whether it was cut."""

    sound: str
    mel: str
    duration_seconds: float
    cut: bool


@dataclass
class AudioBudget:
    """Hands out pictures of clips until the page is full; `left_out` and `broken` say what is not on it."""

    limit: int = MAX_PAGE_AUDIO_BYTES
    used: int = 0
    left_out: list[Path] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def picture(self, path: Path) -> Picture | None:
        """The clip as data URIs, or None if it is broken or does not fit any more."""
        if self.used >= self.limit:
            self.left_out.append(path)
            return None
        try:
            found = make_picture(path)
        except AudioError as error:
            self.broken.append(str(error))
            return None
        size = len(found.sound) + len(found.mel)
        if self.used + size > self.limit:
            self.left_out.append(path)
            return None
        self.used += size
        return found


def make_picture(path: Path) -> Picture:
    """Encode one clip.

    Raises:
        AudioError: it cannot be read, or holds nothing.
    """
    full = audio_info(AudioRef(path)).duration_seconds
    cut = full > MAX_CLIP_SECONDS
    audio = read_audio(AudioRef(path, duration_seconds=MAX_CLIP_SECONDS if cut else None))
    if not len(audio.samples):
        raise AudioError(f"{path}: holds no samples")
    if audio.sampling_rate > MAX_SAMPLING_RATE:
        audio = Audio(_resample(audio, MAX_SAMPLING_RATE), MAX_SAMPLING_RATE)
    return Picture(encode_sound(audio), data_uri("image/png", png(log_mel(audio))), full, cut)


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


def log_mel(audio: Audio) -> np.ndarray:
    """Log-mel picture, uint8 of shape (bands from high to low, columns), 0 at `MEL_RANGE_DB` under the loudest."""
    samples = audio.samples if audio.sampling_rate == MEL_SAMPLING_RATE else _resample(audio, MEL_SAMPLING_RATE)
    samples = np.pad(samples, (MEL_WINDOW // 2, MEL_WINDOW // 2 + MEL_HOP))
    frames = np.lib.stride_tricks.sliding_window_view(samples, MEL_WINDOW)[::MEL_HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(MEL_WINDOW).astype(np.float32))) ** 2
    mel = power @ _filters().T
    step = math.ceil(len(mel) / MEL_MAX_COLUMNS)
    if step > 1:
        mel = np.stack([part.max(0) for part in np.array_split(mel, math.ceil(len(mel) / step))])
    decibels = 10 * np.log10(np.maximum(mel, 1e-10))
    level = np.clip((decibels - decibels.max()) / MEL_RANGE_DB + 1, 0, 1)
    return np.round(level.T[::-1] * 255).astype(np.uint8) & 0xFC  # 64 levels look the same and compress better


def _resample(audio: Audio, sampling_rate: int) -> np.ndarray:
    return soxr.resample(audio.samples, audio.sampling_rate, sampling_rate)


@cache
def _filters() -> np.ndarray:
    """Triangles on the HTK mel scale, mel(f) = 2595 log10(1 + f / 700), shape (bands, bins)."""
    top = 2595 * math.log10(1 + MEL_SAMPLING_RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, MEL_BANDS + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(MEL_WINDOW, 1 / MEL_SAMPLING_RATE)
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rise, fall))
    narrow = filters.sum(1) == 0  # a low band may lie between two bins
    filters[narrow, np.abs(bins - edges[1:-1][narrow, None]).argmin(1)] = 1.0
    return filters.astype(np.float32)


def png(levels: np.ndarray) -> bytes:
    """A PNG of a uint8 picture (rows, columns) in the colours of `VIRIDIS`.

    PNG specification, 3rd edition: colour type 3 (palette), 8 bits, filter 0 on every row.
    """
    rows, columns = levels.shape
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), levels], 1).tobytes()
    chunks = [(b"IHDR", header), (b"PLTE", _palette()), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


@cache
def _palette() -> bytes:
    anchors = np.array([list(bytes.fromhex(colour)) for colour in VIRIDIS.split()], float)
    places = np.linspace(0, len(anchors) - 1, 256)
    channels = [np.interp(places, range(len(anchors)), anchors[:, c]) for c in range(3)]
    return np.round(np.stack(channels, 1)).astype(np.uint8).tobytes()


def spread(steps: Sequence[int], best: int | None) -> list[int]:
    """Steps in the order in which they earn a place: the base, the last, the best, then the middle of each gap."""
    order = [step for step in (0, *steps[-1:], best) if step is not None and step in steps]
    rest = [step for step in steps if step not in order]
    queue = [rest]
    while queue:
        part = queue.pop(0)
        if part:
            middle = len(part) // 2
            order.append(part[middle])
            queue += [part[:middle], part[middle + 1 :]]
    return list(dict.fromkeys(order))


MAX_PROMPTS = 60
"""Prompts on a page; the first ones are shown."""
ALWAYS_SHOWN = 4  # reference, base, best, last; what is between is folded

CLIP_SCORES = {"wer": "WER", "per": "PER", "sim": "similarity", "mos": "MOS", "duration_ratio": "duration ×"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One clip of one run on the page; the smaller `rank`, the earlier it gets a place."""

    label: str
    clip: Clip
    rank: int


def listening(reports: Sequence[RunReport], budget: AudioBudget) -> str:
    """Players and mel pictures; prompts that runs share stand together."""
    prompts: dict[tuple[str, str], tuple[Prompt, list[Cell]]] = {}
    for report in reports:
        for prompt in report.prompts:
            _, cells = prompts.setdefault((prompt.id, prompt.text), (prompt, []))
            cells += _cells(report, prompt, len(reports) > 1, bool(cells))
    shown = list(prompts.values())[:MAX_PROMPTS]
    if not shown:
        return "<p>No samples were kept: <code>samples/prompts.jsonl</code> is not there or empty.</p>"
    wanted = sorted(((cell.rank, n, cell) for n, (_, cells) in enumerate(shown) for cell in cells), key=lambda w: w[:2])
    pictures = {cell.clip.path: budget.picture(cell.clip.path) for _, _, cell in wanted if cell.clip.path is not None}
    longest = max((p.duration_seconds for p in pictures.values() if p), default=1.0)
    cards = [_card(prompt, cells, pictures, min(longest, MAX_CLIP_SECONDS)) for prompt, cells in shown]
    return _notes(budget, len(prompts), any(pictures.values())) + "".join(cards)


def _cells(report: RunReport, prompt: Prompt, several: bool, has_reference: bool) -> list[Cell]:
    steps = [clip.step for clip in prompt.clips if clip.step is not None]
    order = spread(steps, report.best_step)
    cells = []
    for clip in prompt.clips:
        if clip.step is None:
            if not has_reference:
                cells.append(Cell("reference", clip, 0))
            continue
        label = "base, zero-shot" if clip.step == 0 else f"step {clip.step:,}"
        if clip.step == report.best_step:
            label += " (best)"
        cells.append(Cell(f"{report.name}: {label}" if several else label, clip, 1 + order.index(clip.step)))
    return cells


def _notes(budget: AudioBudget, num_prompts: int, any_sound: bool) -> str:
    lines = []
    if any_sound:
        lines.append(
            f"The clips are re-encoded to fit this page: mono, MP3, at most {MAX_CLIP_SECONDS:.0f} s each and "
            f"{budget.limit / 2**20:.0f} MiB together (here {budget.used / 2**20:.1f} MiB). Judge fine differences by "
            "the files in samples/. Mel pictures of a page share one time scale."
        )
    if num_prompts > MAX_PROMPTS:
        lines.append(f"Only the first {MAX_PROMPTS} of {num_prompts} prompts are shown.")
    if budget.left_out:
        lines.append(f"{len(budget.left_out)} clip(s) did not fit any more; their cells name the files.")
    lines += budget.broken[:5]
    if len(budget.broken) > 5:
        lines.append(f"{len(budget.broken) - 5} more clips cannot be read.")
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)


def _card(prompt: Prompt, cells: Sequence[Cell], pictures: Mapping[Path, Picture | None], seconds: float) -> str:
    about = ", ".join(part for part in (prompt.speaker, prompt.language) if part)
    first = [cell for cell in cells if cell.rank < ALWAYS_SHOWN]
    rest = [cell for cell in cells if cell.rank >= ALWAYS_SHOWN]
    more = ""
    if rest:
        more = (
            f"<details><summary>{len(rest)} further evaluation(s)</summary>{_grid(rest, pictures, seconds)}</details>"
        )
    content = _grid(first, pictures, seconds) if cells else "<p>Nothing was recorded or generated for it.</p>"
    return (
        f'<article class="prompt"><h3 dir="auto">{escape(prompt.text or prompt.id)}</h3>'
        f'<p class="note">{escape(prompt.id)}{escape(" · " + about if about else "")}</p>{content}{more}</article>'
    )


def _grid(cells: Sequence[Cell], pictures: Mapping[Path, Picture | None], seconds: float) -> str:
    return f'<div class="clips">{"".join(_clip(cell, pictures, seconds) for cell in cells)}</div>'


def _clip(cell: Cell, pictures: Mapping[Path, Picture | None], seconds: float) -> str:
    parts = [f"<h4>{escape(cell.label)}</h4>"]
    path = cell.clip.path
    picture = pictures.get(path) if path is not None else None
    label = escape(cell.label, quote=True)
    if picture is not None:
        width = min(100.0, 100 * min(picture.duration_seconds, MAX_CLIP_SECONDS) / seconds)
        parts.append(
            f'<div class="mel"><img src="{picture.mel}" alt="mel picture, {label}" style="width:{width:.1f}%">'
        )
        parts.append(f'</div><audio controls preload="metadata" src="{picture.sound}" title="{label}"></audio>')
        if picture.cut:
            parts.append(f"<p>first {MAX_CLIP_SECONDS:.0f} s of {picture.duration_seconds:.0f} s</p>")
    elif path is not None:
        parts.append(f"<p>not on this page: <code>{escape(str(path))}</code></p>")
    elif cell.clip.scores.get("heard") is None:  # an answer in text needs no player
        parts.append("<p>no audio kept</p>")
    return f'<div class="clip">{"".join(parts)}{_scores(cell.clip.scores)}</div>'


def _scores(scores: Mapping[str, Any]) -> str:
    shown = [
        f"{label} {figure(scores[name], 3)}" for name, label in CLIP_SCORES.items() if scores.get(name) is not None
    ]
    if number(scores.get("seconds")) is not None:
        shown.append(f"{figure(scores['seconds'], 3)} s")
    if scores.get("stopped") is False:
        shown.append("did not stop by itself")
    lines = [", ".join(shown)] if shown else []
    if scores.get("heard") is not None:
        lines.append(f"heard: {scores['heard']}")
    return "".join(f'<p dir="auto">{escape(line)}</p>' for line in lines)

"""Players of a report page: clips as MP3 and mel pictures as PNG, both inside the page as data URIs."""

import base64
import io
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

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

MEL_MAX_COLUMNS = 300
# Ten colours of matplotlib's viridis, whose order survives colour blindness and printing in grey.
VIRIDIS = "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725"


class Picture(NamedTuple):
    """A clip for the page: data URIs of its sound and mel picture, its full duration, and whether it was cut."""

    sound: str
    mel: str
    duration_seconds: float
    cut: bool


@dataclass
class AudioBudget:
    """Encodes clips until the page is full; `left_out` and `broken` list those that are not on it."""

    limit: int = MAX_PAGE_AUDIO_BYTES
    used: int = 0
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
                return picture
        self.left_out.append(path)
        return None


def make_picture(path: Path) -> Picture:
    """Encode one clip; `AudioError` if it cannot be read, or holds nothing."""
    full = audio_info(AudioRef(str(path))).duration_seconds
    cut = full > MAX_CLIP_SECONDS
    audio = read_audio(AudioRef(str(path), duration_seconds=MAX_CLIP_SECONDS if cut else None))
    if not len(audio.samples):
        raise AudioError(f"{path}: holds no samples")
    levels = mel_picture(audio)
    num_columns = math.ceil(levels.shape[1] / math.ceil(levels.shape[1] / MEL_MAX_COLUMNS))
    levels = np.stack([part.max(1) for part in np.array_split(levels, num_columns, 1)], 1)
    sound = encode_sound(resample(audio, min(audio.sampling_rate, MAX_SAMPLING_RATE)))
    return Picture(sound, data_uri("image/png", png(levels & 0xFC)), full, cut)  # 64 levels: smaller, and look the same


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
    rows, columns = levels.shape
    # PNG specification, 3rd edition: 8 bits, colour type 3 (palette); each row begins with its filter, 0 for none.
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), levels], 1).tobytes()
    anchors = np.array([list(bytes.fromhex(colour)) for colour in VIRIDIS.split()], float)
    places = np.linspace(0, len(anchors) - 1, 256)
    palette = np.stack([np.interp(places, range(len(anchors)), channel) for channel in anchors.T], 1).round()
    content = b"\x89PNG\r\n\x1a\n"
    colours, data = palette.astype(np.uint8).tobytes(), zlib.compress(lines, 9)
    for chunk in (b"IHDR" + header, b"PLTE" + colours, b"IDAT" + data, b"IEND"):
        content += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return content


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


MAX_PROMPTS = 60  # on a page; the first ones
ALWAYS_SHOWN = 4  # reference, base, best, last; what is between is folded

CLIP_SCORES = {"wer": "WER", "per": "PER", "sim": "similarity", "mos": "MOS", "duration_ratio": "duration ×"}


class Cell(NamedTuple):
    """One clip of one run on the page; cells of lower `rank` get their sound first."""

    label: str
    clip: Clip
    rank: int


def samples(reports: Sequence[RunReport], budget: AudioBudget) -> str:
    """Players and mel pictures by prompt, over all runs."""
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
    cells = [Cell("reference", clip, 0) for clip in prompt.clips if clip.step is None and not has_reference]
    for clip in prompt.clips:
        if clip.step is None:
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
    clips = [(cell.rank < ALWAYS_SHOWN, _clip(cell, pictures, seconds)) for cell in cells]
    first, rest = ([clip for shown, clip in clips if shown == wanted] for wanted in (True, False))
    more = f"<summary>{len(rest)} further evaluation(s)</summary>{_grid(rest)}"
    more = f"<details>{more}</details>" if rest else ""
    content = _grid(first) if cells else "<p>Nothing was recorded or generated for it.</p>"
    return (
        f'<article class="prompt"><h3 dir="auto">{escape(prompt.text or prompt.id)}</h3>'
        f'<p class="note">{escape(prompt.id)}{escape(" · " + about if about else "")}</p>{content}{more}</article>'
    )


def _grid(clips: Sequence[str]) -> str:
    return f'<div class="clips">{"".join(clips)}</div>'


def _clip(cell: Cell, pictures: Mapping[Path, Picture | None], seconds: float) -> str:
    parts = [f"<h4>{escape(cell.label)}</h4>"]
    path = cell.clip.path
    picture = pictures.get(path) if path is not None else None
    label = escape(cell.label, quote=True)
    if picture is not None:
        width = min(100.0, 100 * min(picture.duration_seconds, MAX_CLIP_SECONDS) / seconds)
        image = f'<img src="{picture.mel}" alt="mel picture, {label}" style="width:{width:.1f}%">'
        player = f'<audio controls preload="metadata" src="{picture.sound}" title="{label}"></audio>'
        parts.append(f'<div class="mel">{image}</div>{player}')
        if picture.cut:
            parts.append(f"<p>first {MAX_CLIP_SECONDS:.0f} s of {picture.duration_seconds:.0f} s</p>")
    elif path is not None:
        parts.append(f"<p>not on this page: <code>{escape(str(path))}</code></p>")
    elif cell.clip.scores.get("transcript") is None:  # an answer in text needs no player
        parts.append("<p>no audio kept</p>")
    return f'<div class="clip">{"".join(parts)}{_scores(cell.clip.scores)}</div>'


def _scores(scores: Mapping[str, Any]) -> str:
    known = [name for name in CLIP_SCORES if scores.get(name) is not None]
    shown = [f"{CLIP_SCORES[name]} {figure(scores[name], 3)}" for name in known]
    if number(scores.get("seconds")) is not None:
        shown.append(f"{figure(scores['seconds'], 3)} s")
    if scores.get("stopped") is False:
        shown.append("did not stop by itself")
    transcript = [f"transcript: {scores['transcript']}"] if scores.get("transcript") is not None else []
    return "".join(f'<p dir="auto">{escape(line)}</p>' for line in (", ".join(shown), *transcript) if line)

"""A long recording with everything known about it: sentences of one speaker joined with pauses, noise and more.

Between the sentences lie stretches of noise, a music-like tone, a passage of a second speaker, and sentences said
twice. The tests make one of two minutes, `bench/prepare.py` one of forty.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile

from speechtune.audio import read_audio
from speechtune.tasks.voice_cloning.word_errors import word_errors
from speechtune.types import AudioRef

RATE = 16_000
FLOOR_DBFS = -65.0  # of the room, everywhere
STRETCH_DBFS = -28.0  # of noise and tone, as loud as speech
STRETCH_SECONDS = 7.0
LEAST_PAUSE_SECONDS, MOST_PAUSE_SECONDS = 1.0, 2.0
TOLERANCE_SECONDS = 0.15
TRIM_SECONDS, TRIM_DB = 0.01, -40.0  # frames of a clip's ends this far below its loudest are no speech
NOTES_HZ = (220.0, 277.2, 329.6, 440.0)


@dataclass(frozen=True)
class Part:
    """What lies where, in seconds; `text` of sentences alone."""

    kind: Literal["sentence", "repeated", "other", "noise", "tone"]
    start: float
    end: float
    text: str = ""


def trimmed(path: Path) -> np.ndarray:
    """A clip from the first to the last frame of speech."""
    samples = read_audio(AudioRef(str(path)), RATE).samples
    size = int(TRIM_SECONDS * RATE)
    frames = samples[: len(samples) // size * size].reshape(-1, size)
    levels = 10 * np.log10((frames**2).mean(axis=1) + 1e-12)
    loud = np.flatnonzero(levels > levels.max() + TRIM_DB)
    return samples[loud[0] * size : (loud[-1] + 1) * size]


def noise(random: np.random.Generator) -> np.ndarray:
    """White noise."""
    return 10 ** (STRETCH_DBFS / 20) * random.standard_normal(int(STRETCH_SECONDS * RATE))


def tone() -> np.ndarray:
    """Notes of an organ one after the other, half a second each, with the first harmonics."""
    times = np.arange(int(STRETCH_SECONDS * RATE)) / RATE
    pitch = np.array(NOTES_HZ)[(times / 0.5).astype(int) % len(NOTES_HZ)]
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    waves = sum(np.sin(k * phase) / k for k in (1, 2, 3, 4))
    return 10 ** (STRETCH_DBFS / 20) * waves / np.sqrt(np.mean(waves**2))


def make_recording(
    out: Path,
    sentences: Sequence[tuple[Path, str]],
    others: Sequence[Path],
    repeated: int = 2,
    minutes: float = 0.0,
    seed: int = 0,
) -> list[Part]:
    """Write the recording as FLAC or WAV at 16 kHz, block by block, and return its parts in order.

    Each sentence is said once, and then again in other orders until `minutes` are reached; the first `repeated` ones
    are said once more. A third of the way come noise and tone, two thirds of the way the second speaker.
    """
    random = np.random.default_rng(seed)
    speech = [trimmed(path) for path, _ in sentences]
    order = list(range(len(sentences)))
    length = sum(map(len, speech)) / RATE + len(speech) * (LEAST_PAUSE_SECONDS + MOST_PAUSE_SECONDS) / 2
    order = [int(i) for _ in range(max(1, round(minutes * 60 / length))) for i in random.permutation(order)]
    queue: list[tuple[Literal["sentence", "repeated", "other", "noise", "tone"], np.ndarray, str]] = [
        ("sentence", speech[i], sentences[i][1]) for i in order
    ]
    third = len(queue) // 3
    queue[2 * third : 2 * third] = [("other", trimmed(path), "") for path in others]
    queue[third:third] = [("noise", noise(random), ""), ("tone", tone(), "")]
    queue += [("repeated", speech[i], sentences[i][1]) for i in order[:repeated]]
    parts: list[Part] = []
    place = 0
    with soundfile.SoundFile(out, "w", RATE, 1, "PCM_16") as file:

        def write(samples: np.ndarray) -> None:
            nonlocal place
            floor = 10 ** (FLOOR_DBFS / 20) * random.standard_normal(len(samples))
            file.write((samples + floor).astype(np.float32))
            place += len(samples)

        for kind, samples, text in queue:
            write(np.zeros(int(random.uniform(LEAST_PAUSE_SECONDS, MOST_PAUSE_SECONDS) * RATE)))
            parts.append(Part(kind, place / RATE, (place + len(samples)) / RATE, text))
            write(samples)
        write(np.zeros(RATE))
    return parts


@dataclass(frozen=True)
class Judged:
    """What a preparation made of a recording.

    Attributes:
        whole: share of the sentences that a piece holds whole, both ends within `TOLERANCE_SECONDS` of the truth.
        torn: sentences of which some piece holds a part.
        reasons: share of the seconds of noise, tone and second speaker that are rejected for that very reason.
        wer: word errors of the whole sentences' transcripts; NaN where there are none.
        worst_seconds: largest distance of an end from the truth, of whole sentences.
    """

    whole: float
    torn: list[str]
    reasons: dict[str, float]
    wer: float
    worst_seconds: float


RIGHT_REASONS = {"noise": "noise", "tone": "tone", "other": "other_voice"}


def judge(parts: Sequence[Part], data: Path) -> Judged:
    """Compare the manifest and the rejected pieces in a folder with the truth."""
    names = ("manifest.jsonl", "rejected.jsonl")
    rows = [json.loads(line) for name in names for line in (data / name).read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "start" in row]
    torn, ends = list[str](), list[float]()
    errors = words = 0
    sentences = [part for part in parts if part.kind in ("sentence", "repeated")]
    for part in sentences:
        for row in rows:
            inside = min(row["end"], part.end) - max(row["start"], part.start)
            if inside <= 0:
                continue
            distance = max(abs(row["start"] - part.start), abs(row["end"] - part.end))
            if distance <= TOLERANCE_SECONDS:
                ends.append(distance)
                wrong, count = word_errors(part.text, row.get("transcript", ""), "en")
                errors, words = errors + wrong, words + count
            elif inside < part.end - part.start - TOLERANCE_SECONDS:
                torn.append(part.text)
    shares = {}
    for kind, reason in RIGHT_REASONS.items():
        places = [part for part in parts if part.kind == kind]
        covered = sum(
            max(0.0, min(row["end"], part.end) - max(row["start"], part.start))
            for part in places
            for row in rows
            if row.get("reason") == reason
        )
        shares[kind] = covered / max(sum(part.end - part.start for part in places), 1e-9)
    wer = errors / words if words else float("nan")
    return Judged(len(ends) / len(sentences), torn, shares, wer, max(ends, default=float("nan")))

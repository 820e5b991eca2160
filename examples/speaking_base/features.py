"""WORLD's features of the speech, trimmed, with the phoneme that each frame belongs to.

Takes every shard of speech that has no features yet; run it again when there is more speech:

    python examples/speaking_base/features.py --speech speech --output features
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soxr

from speechtune.families.higgs_audio_v2.codec_world import FRAME_SAMPLES, SAMPLING_RATE, Features, analyse

SPEECH_RATE = 24_000  # of the shards
SILENCE = 0.02  # of the peak
MARGIN_SAMPLES = 720
NAMES = ("envelope", "pitch", "aperiodicity")


@dataclass(frozen=True)
class Clip:
    """A clip of speech.

    Attributes:
        row: name, split, voice, text and phonemes.
        samples: float32 at the codec's rate.
        ends: the sample at which each phoneme ends.
    """

    row: dict[str, Any]
    samples: np.ndarray
    ends: np.ndarray


def read_speech(path: Path) -> Iterator[Clip]:
    """The clips of a shard, trimmed."""
    with np.load(path, allow_pickle=False) as shard:
        rows, samples, ends = json.loads(shard["rows"].tobytes()), shard["samples"], shard["ends"]
    sample = end = 0
    for row in rows:
        wave = samples[sample : sample + row["samples"]].astype(np.float32) / 32768
        loud = np.flatnonzero(np.abs(wave) > SILENCE * np.abs(wave).max())
        first, last = max(0, int(loud[0]) - MARGIN_SAMPLES), int(loud[-1]) + MARGIN_SAMPLES
        own_ends = (ends[end : end + row["num_ends"]] - first) * SAMPLING_RATE // SPEECH_RATE
        yield Clip(row, soxr.resample(wave[first:last], SPEECH_RATE, SAMPLING_RATE), own_ends)
        sample, end = sample + row["samples"], end + row["num_ends"]


def spoken_phonemes(ends: np.ndarray, num_frames: int) -> np.ndarray:
    """Index of the phoneme spoken in the middle of each frame."""
    middles = (np.arange(num_frames) + 0.5) * FRAME_SAMPLES
    return np.minimum(np.searchsorted(ends, middles, side="right"), len(ends) - 1).astype(np.int16)


def write_features(path: Path, clips: list[Clip]) -> float:
    """Analyse clips and write a shard; returns the seconds of speech."""
    made = [analyse(clip.samples) for clip in clips]
    rows = [
        {key: clip.row[key] for key in ("name", "split", "voice", "text", "phonemes")} | {"frames": len(f.pitch)}
        for clip, f in zip(clips, made, strict=True)
    ]
    arrays = {name: np.concatenate([getattr(f, name) for f in made]).astype(np.float16) for name in NAMES}
    spoken = [spoken_phonemes(clip.ends, row["frames"]) for clip, row in zip(clips, rows, strict=True)]
    arrays |= {"spoken": np.concatenate(spoken), "rows": np.frombuffer(json.dumps(rows).encode(), np.uint8)}
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    temporary.replace(path)
    return sum(row["frames"] for row in rows) * FRAME_SAMPLES / SAMPLING_RATE


def read_features(path: Path) -> Iterator[tuple[dict[str, Any], Features, np.ndarray]]:
    """Row, features (float64) and spoken phonemes of each clip of a shard."""
    with np.load(path, allow_pickle=False) as shard:
        rows, spoken = json.loads(shard["rows"].tobytes()), shard["spoken"]
        arrays = [shard[name].astype(np.float64) for name in NAMES]
    start = 0
    for row in rows:
        part = slice(start, start + row["frames"])
        yield row, Features(*(array[part] for array in arrays)), spoken[part]
        start += row["frames"]


def main() -> None:
    """Analyse what is new."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    started, seconds = time.monotonic(), 0.0
    for source in sorted(arguments.speech.glob("*.npz"))[arguments.part :: arguments.parts]:
        path = arguments.output / source.name
        if path.exists():
            continue
        seconds += write_features(path, list(read_speech(source)))
        print(f"{path.name}: {seconds:.0f} s of speech in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()

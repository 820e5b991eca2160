"""Cost of large manifests: seconds and peak memory of validate, and of the way to a first batch, each size afresh.

Every row has a target of its own and the target of another row as its reference, as in voice-cloning data; the audio
files are hard links to a few tiny ones, so that a million of them need no space. Each clip begins a microsecond later
than the one before it, so that the cache holds every one of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import soundfile

SIZES = (1_000, 10_000, 100_000, 1_000_000)
CLIPS_PER_FOLDER = 1_000
LINKS_PER_FILE = 50_000  # ext4 allows 65,000
REPEATS = 5
LARGE_ROWS = 100_000  # from here on one run is minutes


def make_corpus(folder: Path, num_rows: int) -> Path:
    """Write a ChatML JSONL manifest of `num_rows` rows and their clips (0.2 s at 8 kHz) into an empty folder."""
    random = np.random.default_rng(0)
    for number in range(-(-num_rows // LINKS_PER_FILE)):
        soundfile.write(folder / f"source-{number}.wav", random.normal(0, 0.1, 1600), 8000)
    manifest = folder / "train.jsonl"
    with manifest.open("w", encoding="utf-8") as file:
        for start in range(0, num_rows, CLIPS_PER_FOLDER):
            count = min(CLIPS_PER_FOLDER, num_rows - start)
            place = folder / f"speaker-{start // CLIPS_PER_FOLDER:04d}"
            place.mkdir()
            for index in range(start, start + count):
                clip(folder, index).hardlink_to(folder / f"source-{index // LINKS_PER_FILE}.wav")
                other = start + (index - start + 1) % count
                file.write(json.dumps(chatml(folder, index, other)) + "\n")
    return manifest


def clip(folder: Path, index: int) -> Path:
    """Path of the clip of one row."""
    return folder / f"speaker-{index // CLIPS_PER_FOLDER:04d}" / f"utterance-{index:07d}.wav"


def chatml(folder: Path, target: int, reference: int) -> dict[str, Any]:
    """One row of the original pipeline's layout."""

    def audio(index: int) -> dict[str, Any]:
        place = str(clip(folder, index).relative_to(folder))
        return {"type": "audio", "audio_url": place, "offset": index % LINKS_PER_FILE / 1e6, "duration": 0.14}

    def said(index: int) -> str:
        return f"Number {index}."  # what 0.14 s have room for

    asked = f"Please generate speech for given text in reference audio's voice: {said(target)}"
    user = [{"type": "text", "text": said(reference)}, audio(reference), {"type": "text", "text": asked}]
    messages = [
        {"role": "system", "content": "Generate speech in the provided voice."},
        {"role": "user", "content": user},
        {"role": "assistant", "content": [{"type": "text", "text": said(target)}, audio(target)]},
    ]
    speaker = f"speaker-{target // CLIPS_PER_FOLDER:04d}"
    return {"id": f"utterance-{target:07d}", "messages": messages, "speaker": speaker, "misc": {"language": "en"}}


def run_validate(manifest: Path) -> None:
    """What `speechtune validate --metadata-only` does."""
    from speechtune.commands.validate import validate
    from speechtune.config import DataConfig

    report = validate(manifest, DataConfig())
    assert not report.issues, report.issues[:3]


def run_first_batch(manifest: Path) -> None:
    """Load the samples, find their clips in a cache that has them all, plan the run, and collate its first batch."""
    from speechtune.cache.encode import encode_samples
    from speechtune.config import DataConfig
    from speechtune.data.sources import load_samples
    from speechtune.family import Family
    from speechtune.training.batching import BatchPlan

    samples = load_samples(manifest, DataConfig())
    encoded = encode_samples(cast(Family, FrameCounter()), samples, manifest.parent / "cache", quiet=True)
    plan = BatchPlan(encoded.lengths, batch_size=8)
    batch = [encoded[index] for index in plan.micro_batches(0, 0)[0]]
    assert len(batch) == 8 and all(item.num_tokens > 0 for item in batch)


class FrameCounter:
    """The part of a family that turns clips into features; no model, so that only the toolkit is measured."""

    name, encode_key, sampling_rate, reference_encoder = "frame counter", "bench of scale", 8000, None

    def clips(self, sample: Any) -> tuple[Any, ...]:
        """References first."""
        return (*(reference.audio for reference in sample.references), sample.audio)

    def encode_audio(self, audios: Sequence[Any]) -> list[np.ndarray]:
        """As many codes as the codec would give."""
        return [np.ones((len(audio.samples) // 320, 8), np.int16) for audio in audios]

    def encode(self, sample: Any, features: Sequence[np.ndarray]) -> Any:
        """Positions as in a prompt of Higgs Audio v2."""
        from speechtune.types import Encoded

        rows = sum(len(codes) + 9 for codes in features)
        return Encoded(sample.id, {"codes": features[-1]}, rows + len(sample.text) // 4, 0.2)


WORK = {"validate": run_validate, "first batch": run_first_batch}


def afresh(work: str, manifest: Path) -> tuple[float, float]:
    """Seconds and peak MiB of one piece of work in a process of its own, what it imports included."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, "--work", work, str(manifest)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return time.perf_counter() - started, float(done.stdout)


def peak_mebibytes() -> float:
    """Largest resident memory of this process; `ru_maxrss` would count its parent's before the start."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(sizes: Sequence[int] = SIZES) -> dict[str, list[float]]:
    """Seconds and MiB per size: five runs up to 10,000 rows, one beyond.

    The first batch is measured over a cache that holds every clip, and over one without a clip before it. The memory of
    a further row shows whether the cost is linear.
    """
    result: dict[str, list[float]] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            manifest = make_corpus(Path(folder).resolve(), size)
            for unit, value in zip(("seconds", "MiB"), afresh("first batch", manifest), strict=True):
                result[f"{size} rows: encode everything, {unit}"] = [value]
            for _ in range(REPEATS if size < LARGE_ROWS else 1):
                for work in WORK:
                    seconds, mebibytes = afresh(work, manifest)
                    result.setdefault(f"{size} rows: {work}, seconds", []).append(seconds)
                    result.setdefault(f"{size} rows: {work}, MiB", []).append(mebibytes)
    for work in WORK:
        slopes = [
            (median(result[f"{more} rows: {work}, MiB"]) - median(result[f"{less} rows: {work}, MiB"])) / (more - less)
            for less, more in pairwise(sizes)
        ]
        for (less, more), slope in zip(pairwise(sizes), slopes, strict=True):
            result[f"{less} to {more} rows: {work}, bytes a further row"] = [slope * 2**20]
        if len(slopes) > 1:
            result[f"{work}, bytes a further row: last / before"] = [slopes[-1] / slopes[-2]]
    return result


def main() -> None:
    """Print the cost curve, or do one piece of work and print its peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="up to 100,000 rows")
    parser.add_argument("--rows", type=int, nargs="+", help="these sizes only")
    parser.add_argument("--work", choices=WORK)
    parser.add_argument("manifest", type=Path, nargs="?")
    options = parser.parse_args()
    if options.work:
        WORK[options.work](options.manifest)
        print(peak_mebibytes())
        return
    for what, values in measure(options.rows or (SIZES[:-1] if options.quick else SIZES)).items():
        print(f"{what:48} {' '.join(f'{value:.1f}' for value in values)}", flush=True)


if __name__ == "__main__":
    main()

"""Accuracy, speed and memory of `speechtune prepare` on long recordings whose contents are known.

    python bench/prepare.py known DEMO_VOICES --asr faster-whisper:FOLDER   40 minutes: what is found, and how fast
    python bench/prepare.py long DEMO_VOICES                               4 hours, without a recogniser: memory
    python bench/prepare.py peer DEMO_VOICES --asr faster-whisper:FOLDER    steps beside the same libraries used plainly

Times are those of this process on the CPU, for the machine may do other work too; real-time factors are audio per
time. OMP_NUM_THREADS says how many threads torch and CTranslate2 take.
"""

import argparse
import json
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from recording import RATE, judge, make_recording

from speechtune.audio import read_audio, resample
from speechtune.family import Scorers
from speechtune.preparation.activity import load_detector
from speechtune.preparation.prepare import prepare
from speechtune.preparation.prepared import Request
from speechtune.preparation.settings import DuplicateSettings, PrepareConfig
from speechtune.tasks.voice_cloning.scorers import load_scorers
from speechtune.types import Audio, AudioRef

SPEAKER, OTHER = "allison", "june"
LEAST_SECONDS = 1.9  # shorter sentences are too short for a clip by themselves


class Silent:
    """A recogniser that hears nothing, to measure what comes before one."""

    name, languages = "none", frozenset({"en"})

    def transcribe(self, audios: Sequence[Audio], languages: Sequence[str | None]) -> list[str]:
        """No words."""
        return [""] * len(audios)


class Clock:
    """Time on the CPU by step: that between two calls of `progress` belongs to the step of the latter."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._last = time.process_time()

    def __call__(self, step: str, done: float, total: float) -> None:
        """Note that a step has come so far."""
        now = time.process_time()
        self.seconds[step] += now - self._last
        self._last = now


def clips_of(demo_voices: Path, speaker: str) -> list[tuple[Path, str]]:
    """Clips of a speaker, and what is said in them."""
    rows = map(json.loads, (demo_voices / "clips.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        (demo_voices / row["audio"], row["text"])
        for row in rows
        if row["speaker"] == speaker and row["duration_seconds"] > LEAST_SECONDS
    ]


def run(recording: Path, out: Path, scorers: Scorers) -> tuple[Clock, float]:
    """Prepare a recording; times of its steps, and its length in seconds. No sentence is a duplicate."""
    config = PrepareConfig(duplicates=DuplicateSettings(keep="all"))
    asr = scorers.asr or Silent()
    clock = Clock()
    request = Request(recording, out, config, asr, load_detector(config.activity), scorers.speaker, scorers.mos)
    (found,) = prepare(request, clock).recordings
    return clock, found.info.duration_seconds


def known(demo_voices: Path, folder: Path, minutes: float, asr: str) -> None:
    """A recording whose sentences are known."""
    recording, out = folder / "known.flac", folder / "data"
    others = [path for path, _ in clips_of(demo_voices, OTHER)[:6]]
    parts = make_recording(recording, clips_of(demo_voices, SPEAKER), others, minutes=minutes)
    config = PrepareConfig()
    clock, seconds = run(recording, out, load_scorers(asr, config.speakers.encoder, config.quality.mos))
    found = judge(parts, out)
    number = sum(part.kind in ("sentence", "repeated") for part in parts)
    print(f"{seconds / 60:.1f} minutes, {number} sentences: whole {found.whole:.1%}, torn {len(found.torn)}")
    print(f"worst distance of an end {found.worst_seconds:.3f} s; WER {found.wer:.2%}; rejected for the right reason:")
    print(", ".join(f"{kind} {share:.1%}" for kind, share in found.reasons.items()))
    reasons: defaultdict[str, int] = defaultdict(int)
    for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines():
        reasons[json.loads(line)["reason"]] += 1
    print(f"rejected: {dict(reasons)}")
    show(clock, seconds)


def show(clock: Clock, seconds: float) -> None:
    """Print real-time factors and memory."""
    for step, spent in clock.seconds.items():
        print(f"{step:12} {spent:8.1f} s on the CPU, {seconds / max(spent, 1e-9):8.0f} x real time")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


def peer(demo_voices: Path, folder: Path, asr: str) -> None:
    """Steps beside the plain use of the same libraries on the same sound, one clip after the other."""
    import pyloudnorm
    import torch
    from faster_whisper import WhisperModel
    from silero_vad import get_speech_timestamps, load_silero_vad

    recording, out, config = folder / "peer.flac", folder / "data", PrepareConfig()
    make_recording(recording, clips_of(demo_voices, SPEAKER), [], minutes=1.5)
    clock, seconds = run(recording, out, load_scorers(asr, config.speakers.encoder, config.quality.mos))
    samples = read_audio(AudioRef(str(recording)), RATE).samples
    pieces = [read_audio(AudioRef(str(path))) for path in sorted(out.glob(".steps/pieces-*/*.flac"))]
    detector, whisper = load_silero_vad(onnx=True), WhisperModel(asr.partition(":")[2], compute_type="float32")
    from distillmos import ConvTransformerSQAModel  # imports torchaudio, which the scorers have shown to be needless

    predictor = ConvTransformerSQAModel().eval()
    at_16k = [resample(piece, RATE).samples for piece in pieces]

    def transcribe(clip: np.ndarray) -> None:
        list(whisper.transcribe(clip, beam_size=1, temperature=0.0, language="en", word_timestamps=True)[0])

    def loudness(piece: Audio) -> None:
        level = pyloudnorm.Meter(piece.sampling_rate).integrated_loudness(piece.samples)
        pyloudnorm.normalize.loudness(piece.samples, level, -23.0)

    plain: dict[str, Callable[[], object]] = {
        "activity": lambda: get_speech_timestamps(torch.from_numpy(samples), detector),
        "loudness": lambda: [loudness(piece) for piece in pieces],
        "quality": lambda: [predictor(torch.from_numpy(clip)[None]) for clip in at_16k],
        "transcripts": lambda: [transcribe(clip) for clip in at_16k],
    }
    for step, work in plain.items():
        start = time.process_time()
        with torch.inference_mode():
            work()
        spent = time.process_time() - start
        ours, theirs = seconds / clock.seconds[step], seconds / spent
        print(f"{step:12} {ours:6.0f} x real time, the libraries alone {theirs:6.0f} x")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("known", "long", "peer"))
    parser.add_argument("demo_voices", type=Path)
    parser.add_argument("--minutes", type=float, help="(default: 40; long: 240)")
    parser.add_argument("--asr")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prepare-bench-") as name:
        folder = Path(name)
        if given.what == "known":
            known(given.demo_voices, folder, given.minutes or 40.0, given.asr)
        elif given.what == "peer":
            peer(given.demo_voices, folder, given.asr)
        else:
            others = [path for path, _ in clips_of(given.demo_voices, OTHER)]
            clips = clips_of(given.demo_voices, SPEAKER)
            make_recording(folder / "long.flac", clips, others, minutes=given.minutes or 240.0)
            show(*run(folder / "long.flac", folder / "data", Scorers()))


if __name__ == "__main__":
    main()

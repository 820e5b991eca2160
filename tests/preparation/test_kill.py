"""kill -9 at random moments: nothing finished is computed again, and the folder is that of a straight run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from recording import make_recording

from helpers import read_demo_clips

pytest.importorskip("silero_vad")
pytestmark = pytest.mark.slow

NUM_KILLS = 10
STEPS = ("activity", "loudness", "quality", "speakers", "transcripts")

# Run by the child. The scorers answer from the samples themselves, and note what they were asked.
CHILD = """
import hashlib, os, sys, time
from pathlib import Path
import numpy as np
from speechtune.preparation import prepare as steps
from speechtune.preparation.activity import Silero, find_speech
from speechtune.preparation.prepared import Request
from speechtune.preparation.settings import PrepareConfig

recordings, out, log = map(Path, sys.argv[1:])
descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

def note(job, audio, answer):
    name = hashlib.sha256(audio.samples.tobytes()).hexdigest()[:12]
    time.sleep(0.03)
    os.write(descriptor, f"{job} {name}\\n".encode())
    os.fsync(descriptor)
    return answer(int(name, 16))

class Asr:
    name, languages = "asr", frozenset({"en"})
    def transcribe(self, audios, languages):
        return [note("asr", a, lambda n: " ".join(f"word{n // k % 97}" for k in range(1, 8))) for a in audios]

class Encoder:
    name = "speaker"
    def embed(self, audios):
        return np.stack([note("speaker", a, lambda n: np.eye(1, 8, dtype=np.float32)[0]) for a in audios])

class Mos:
    name = "mos"
    def predict(self, audios):
        return np.array([note("mos", a, lambda n: 4 + n % 100 / 100) for a in audios])

class Detector(Silero):
    def reset(self):
        os.write(descriptor, b"activity begun\\n")
        super().reset()

os.write(descriptor, b"start\\n")
request = Request(recordings, out, PrepareConfig(), Asr(), Detector(), Encoder(), Mos())
steps.prepare(request, lambda *values: None)
"""


def start(recordings: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(recordings), str(out), str(log)], env=environment)


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def finished(out: Path, step: str) -> int:
    """Whole lines of results, read without the package's own code."""
    return sum(len(path.read_bytes().split(b"\n")) - 2 for path in out.glob(f".steps/{step}-*.jsonl"))


def contents(out: Path) -> dict[str, bytes]:
    names = ("manifest.jsonl", "train.jsonl", "test.jsonl", "rejected.jsonl", "prepare.yaml", "clips/*.flac")
    return {str(path.relative_to(out)): path.read_bytes() for name in names for path in sorted(out.glob(name))}


def test_a_killed_preparation_goes_on_where_it_was(tmp_path: Path) -> None:
    clips = read_demo_clips()
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    for number in range(4):
        own = [(clip.path, clip.text) for clip in clips if clip.speaker == "allison"][3 * number :][:3]
        make_recording(recordings / f"{number}.flac", own, [], repeated=0, seed=number)
    straight, killed, log = tmp_path / "straight", tmp_path / "killed", tmp_path / "calls.log"
    assert start(recordings, straight, tmp_path / "straight.log").wait(120) == 0
    asked = [line for line in lines(tmp_path / "straight.log") if line != "start"]
    assert json.loads((straight / "train.jsonl").read_text().splitlines()[0])["messages"]

    chance = random.Random(0)
    moments: list[int] = []
    for _ in range(NUM_KILLS):
        wanted = len(lines(log)) + chance.randint(1, 12)
        child = start(recordings, killed, log)
        while len(lines(log)) < wanted and child.poll() is None:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.wait()
        moments.append(sum(finished(killed, step) for step in STEPS))
    assert len(set(moments)) >= 5, f"the kills did not fall into the work: {moments}"
    assert start(recordings, killed, log).wait(120) == 0

    assert contents(killed) == contents(straight)
    calls = Counter(line for line in lines(log) if line not in ("start", "activity begun"))
    assert set(calls) == {line for line in asked if line != "activity begun"}
    repeated = sum(count - 1 for count in calls.values())
    assert repeated <= NUM_KILLS, f"{repeated} calls more than those in work at a kill: finished work was done again"
    done = {step: finished(killed, step) for step in STEPS}
    assert done == {step: finished(straight, step) for step in STEPS}, "no result is written twice"

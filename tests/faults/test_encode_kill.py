"""kill -9 while encoding: no finished clip is lost, none is encoded twice, and the result is that of a straight run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile

from speechtune.audio import content_hash
from speechtune.cache.store import FeatureStore
from speechtune.types import AudioRef

NUM_CLIPS = 300
SAMPLING_RATE = 16_000
NUM_KILLS = 12

# Run by the child. Clip i is constant i/1000, so the family can tell which clip it was given.
CHILD = """
import os, sys, time
from pathlib import Path
import numpy as np
from speechtune.cache.encode import encode_samples
from speechtune.types import AudioRef, Encoded, Sample

clips, root, log = map(Path, sys.argv[1:])
descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

class SlowFamily:
    name, sampling_rate, encode_key, reference_encoder = "slow", 16_000, "slow-1", None
    def clips(self, sample):
        return (sample.audio,)
    def encode_audio(self, audios):
        numbers = [round(float(audio.samples[0]) * 1000) for audio in audios]
        os.write(descriptor, "".join(f"{number}\\n" for number in numbers).encode())
        os.fsync(descriptor)
        time.sleep(0.004 * len(audios))
        return [np.arange(50 + number, dtype=np.int32) * number for number in numbers]
    def encode(self, sample, features):
        return Encoded(sample.id, {"codes": features[0]}, len(features[0]), 0.0)

paths = sorted(clips.glob("*.wav"))
samples = [Sample(path.stem, path.stem, AudioRef(str(path))) for path in paths]
encode_samples(SlowFamily(), samples, root, group_size=3, quiet=True)
"""


def start(clips: Path, root: Path, log: Path) -> subprocess.Popen[bytes]:
    source = Path(__file__).parents[2] / "src"
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", CHILD, str(clips), str(root), str(log)], env=environment)


def encoded_numbers(log: Path) -> list[int]:
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def finished_keys(root: Path) -> set[str]:
    """Keys in complete index lines, read without the store's own code."""
    keys: set[str] = set()
    for index in root.glob("*/part-*.jsonl"):
        whole = index.read_bytes().rpartition(b"\n")[0]
        keys |= {json.loads(line)["key"] for line in whole.splitlines()}
    return keys


def test_killed_encoding_resumes_without_loss_or_repetition(tmp_path: Path) -> None:
    clips, root, log = tmp_path / "clips", tmp_path / "cache", tmp_path / "calls.log"
    clips.mkdir()
    numbers: dict[str, int] = {}
    for number in range(1, NUM_CLIPS + 1):
        path = clips / f"{number:03d}.wav"
        samples = np.full(40 + number, number / 1000, np.float32)
        soundfile.write(path, samples, SAMPLING_RATE, subtype="FLOAT")
        os.utime(path, (1e9, 1e9))  # old enough for its hash to be remembered
        numbers[content_hash(AudioRef(path=str(path)))] = number

    chance = random.Random(0)
    snapshots: list[tuple[int, set[str]]] = []  # calls made and clips finished when each child died
    for kill in range(NUM_KILLS):
        before = len(encoded_numbers(log))
        child = start(clips, root, log)
        deadline = time.monotonic() + 60
        if kill % 4:  # else it may die at start-up, too
            while len(encoded_numbers(log)) == before and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.15))
        child.send_signal(signal.SIGKILL)
        child.wait()
        snapshots.append((len(encoded_numbers(log)), finished_keys(root)))
        if len(snapshots[-1][1]) == NUM_CLIPS:
            break
    assert start(clips, root, log).wait(120) == 0

    calls = encoded_numbers(log)
    amounts = {len(finished) for _, finished in snapshots}
    assert len(amounts - {0, NUM_CLIPS}) >= 3, "the kills did not fall into the encoding; slow the family down"
    for position, finished in snapshots:
        repeated = {numbers[key] for key in finished} & set(calls[position:])
        assert not repeated, f"encoded again after they were finished: {sorted(repeated)}"
    assert set(calls) == set(numbers.values())

    with FeatureStore(root, "slow-1") as store:
        assert len(store) == NUM_CLIPS and store.verify() == []
        for key, number in numbers.items():
            assert np.array_equal(store.get(key), np.arange(50 + number, dtype=np.int32) * number)
    assert [path.name for path in store.folder.glob("*.bin")] == ["part-0000.bin"], "a dead writer's part is reused"

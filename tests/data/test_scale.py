"""What a row of a large manifest costs in memory: a million of them must fit beside the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

SIZES = (2_000, 14_000)
BYTES_PER_ROW = 1_150
"""980 were measured, 2,370 before paths became texts and equal values were kept once."""

PEAK = """
import sys
from pathlib import Path
from speechtune.config import DataConfig
from speechtune.commands.validate import validate
report = validate(Path(sys.argv[1]), DataConfig())
assert not report.issues, report.issues[:3]
assert report.statistics["num_samples"] == int(sys.argv[2])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def write_manifest(folder: Path, num_rows: int) -> Path:
    """ChatML rows with clips of their own, each also the reference of the row before it."""
    soundfile.write(folder / "source.wav", np.sin(np.arange(32_000)), 8000)

    def audio(index: int) -> dict[str, str]:
        return {"type": "audio", "audio_url": f"clips/utterance-{index:07d}.wav"}

    def said(index: int) -> dict[str, str]:
        return {"type": "text", "text": f"This is what is said in utterance number {index} of the corpus."}

    (folder / "clips").mkdir()
    manifest = folder / f"train-{num_rows}.jsonl"
    with manifest.open("w", encoding="utf-8") as file:
        for index in range(num_rows):
            (folder / audio(index)["audio_url"]).hardlink_to(folder / "source.wav")
            other = (index + 1) % num_rows
            messages = [
                {"role": "system", "content": "Generate speech in the provided voice."},
                {"role": "user", "content": [said(other), audio(other), said(index)]},
                {"role": "assistant", "content": [said(index), audio(index)]},
            ]
            file.write(json.dumps({"id": f"id-{index:07d}", "messages": messages, "speaker": "one"}) + "\n")
    return manifest


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_of_a_row(tmp_path: Path) -> None:
    """Guards against 2.9 kB a row: a Path and its parts in each clip, and equal texts kept more than once."""
    peaks = []
    for size in SIZES:
        (folder := tmp_path / str(size)).mkdir()
        command = [sys.executable, "-c", PEAK, str(write_manifest(folder, size)), str(size)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MALLOC_ARENA_MAX": "1"})
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout) * 1024)
    bytes_per_row = (peaks[1] - peaks[0]) / (SIZES[1] - SIZES[0])
    print(f"{bytes_per_row:.0f} bytes a row")
    assert bytes_per_row < BYTES_PER_ROW

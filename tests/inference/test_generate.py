"""`speechtune generate` writes what it says: one wav per id."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from speechtune.audio import read_audio
from speechtune.inference.generate import write_outputs
from speechtune.types import Audio, AudioRef, Output


def test_each_id_gets_a_wav_of_its_own(tmp_path: Path) -> None:
    """Guards against ids that sanitise alike: one wav was written over the other, and the list named it twice."""
    ids = ["Yes!", "Yes?", "s/1", "s 1"]
    levels = [0.1, 0.2, 0.3, 0.4]
    outputs = [
        Output(name, Audio(np.full(2400, level, np.float32), 24_000), None, True, 10)
        for name, level in zip(ids, levels, strict=True)
    ]
    rows = write_outputs(iter(outputs), tmp_path / "out")
    assert [row["id"] for row in rows] == ids and len(list((tmp_path / "out").glob("*.wav"))) == 4
    for row, level in zip(rows, levels, strict=True):
        assert abs(float(read_audio(AudioRef(str(row["audio"]))).samples.mean()) - level) < 1e-3

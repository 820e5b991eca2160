"""Peak resident memory of fresh processes, in MB: imports alone, and some training steps of ours and of the peer."""

from __future__ import annotations

import json
import tempfile
from dataclasses import astuple
from pathlib import Path

from child import run_child
from ours import prepare
from peers.higgs_trainer import Settings

SAMPLES, STEPS = 32, 3
PEERS = (Settings(1, 8), Settings(8, 1))
MB = 1e6


def measure(pairs: int = 5) -> dict[str, list[float]]:
    """Peak of each side; the samples of a step are the same, the peer cuts them into ones or takes them all at once."""
    result: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="speechtune-bench-") as name:
        prepare(Path(name), "mixed", SAMPLES)
        training = (name, "mixed", str(STEPS))
        sides = {"imports of `speechtune train`": ("imports",), "ours": ("ours", *training)}
        for settings in PEERS:
            sides[f"peer, {settings}"] = ("peer", json.dumps(astuple(settings)), *training)
        for _ in range(pairs):
            for what, arguments in sides.items():
                result.setdefault(f"{what}, MB", []).append(run_child(*arguments).peak_bytes / MB)
    return result

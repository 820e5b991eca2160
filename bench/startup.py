"""Start-up: CPU time of `speechtune --help`, and the time from a fresh process to the first optimizer step.

Ours is `speechtune train` on the demo's recipe and recordings, whose codes are cached, as a second run of a user is.
It also reads and checks the manifest, fingerprints the base and shows what is trainable. The peer's script trains a
base of the same size on as many samples whose codes lie ready. Nearly all of the time goes into imports on both sides.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import astuple
from pathlib import Path

from child import BENCH, run_child
from ours import prepare
from peers.higgs_trainer import Settings
from voices import Size

from speechtune.commands.demo_voice import CLIPS_PER_SPEAKER, SPEAKERS, demo_config, write_data

HELPS = 15
DEMO = Size(hidden_size=96, num_layers=2, codebook_size=258)
PEER = Settings(8, 1)


def help_seconds() -> float:
    """User and system time of a fresh `speechtune --help`."""
    command = [sys.executable, "-m", "speechtune", "--help"]
    environment = os.environ | {"PYTHONPATH": str(BENCH.parent / "src")}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def write_recipe(folder: Path) -> Path:
    """The demo's recipe without what comes after the first step: one step, nothing evaluated."""
    config = demo_config("higgs_audio_v2", write_data(folder), folder)
    train = config.train.model_copy(update={"max_steps": 1})
    evaluate = config.evaluate.model_copy(update={"prompts": 0, "asr": None, "speaker": None, "mos": None})
    recipe = folder / "recipe.yaml"
    recipe.write_text(config.model_copy(update={"train": train, "evaluate": evaluate}).to_yaml(), encoding="utf-8")
    return recipe


def measure(pairs: int = 5) -> dict[str, list[float]]:
    """CPU seconds of the help, and seconds to the first step of both sides."""
    result = {"speechtune --help, CPU seconds": [help_seconds() for _ in range(HELPS)]}
    with tempfile.TemporaryDirectory(prefix="speechtune-bench-") as name:
        folder = Path(name)
        recipe = write_recipe(folder)
        prepare(folder, "equal", len(SPEAKERS) * CLIPS_PER_SPEAKER, DEMO)

        def ours() -> float:
            shutil.rmtree(folder / "run", ignore_errors=True)
            return run_child("verb", "train", str(recipe)).seconds_to_first_step

        def peer() -> float:
            return run_child("peer", json.dumps(astuple(PEER)), name, "equal", "1").seconds_to_first_step

        ours()  # fills the cache
        found = []
        for pair in range(pairs):
            first = ours() if pair % 2 else peer()
            second = peer() if pair % 2 else ours()
            found.append((first, second) if pair % 2 else (second, first))
    result["seconds to the first optimizer step, ours"] = [mine for mine, _ in found]
    result["seconds to the first optimizer step, peer"] = [theirs for _, theirs in found]
    return result | {"seconds to the first step, ours / peer": [mine / theirs for mine, theirs in found]}

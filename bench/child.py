"""One side of a bench in a process of its own, for what cannot be measured apart within one: start-up and peak memory.

    python bench/child.py {ours,peer SETTINGS,import,verb ARGUMENTS...} FOLDER LENGTHS STEPS

Prints JSON: when the first optimizer step ended (by the system's monotonic clock), and the peak of resident memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from speechtune.commands.guarded import limit_kernel_caches

BENCH = Path(__file__).parent


@dataclass(frozen=True)
class Child:
    """What a child did; seconds are counted from before it was started."""

    seconds_to_first_step: float
    peak_bytes: int


def peak_bytes() -> int:
    """Greatest resident memory of this process; `ru_maxrss` would count the parent's, from before the fork."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def run_child(*arguments: str) -> Child:
    """Run this file in a fresh process and wait for it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCH.parent / "src"), str(BENCH)])}
    command = [sys.executable, str(Path(__file__)), *arguments]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, env=environment, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Child(found["first_step_at"] - started, found["peak_bytes"])


def verb(*arguments: str) -> list[float]:
    """Call the command line, and note when its optimizer steps."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from speechtune.cli import main

    steps: list[float] = []
    register_optimizer_step_post_hook(lambda *_: steps.append(time.monotonic()))
    if main(arguments):
        raise SystemExit(1)
    return steps


def ours(folder: str, lengths: str, steps: str) -> list[float]:
    """Train with the toolkit's loop; the ends of its steps."""
    from ours import train_ours

    place = Path(folder)
    runs = place / "ours-child"
    runs.mkdir(exist_ok=True)
    return [wall for wall, _, _ in train_ours(place / "base", place / lengths, runs, int(steps))[0].marks]


def peer(settings: str, folder: str, lengths: str, steps: str) -> list[float]:
    """Train with the peer; the ends of its steps."""
    from peers import higgs_trainer
    from torch.optim.optimizer import register_optimizer_step_post_hook

    marks: list[float] = []
    register_optimizer_step_post_hook(lambda *_: marks.append(time.monotonic()))
    place = Path(folder)
    model = higgs_trainer.load_model(str(place / "base" / "model"), 16, 32, 42)
    data = higgs_trainer.Voices(str(place / "base" / "model"), place / lengths, "Speak.")
    chosen = higgs_trainer.Settings(*json.loads(settings))
    higgs_trainer.make_trainer(model, data, chosen, int(steps), place / "peer-child").train()
    return marks


def imports() -> list[float]:
    """Import what training needs, and do nothing."""
    import speechtune.training.run  # noqa: F401

    return []


def main() -> None:
    """Do one side's work and say what it took."""
    limit_kernel_caches()
    side, *rest = sys.argv[1:]
    marks = {"ours": ours, "peer": peer, "imports": imports, "verb": verb}[side](*rest)
    print(json.dumps({"first_step_at": marks[0] if marks else 0.0, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main()

"""Training runs that something happens to at a chosen step: called by tests, and started as a script.

torchrun interrupted.py ranks jobs.json    runs of jobs.json one after another; only the last rank is disturbed
python interrupted.py cli recipe.yaml STEP    the command line, which waits in STEP until a file `go` is there
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState
from torch import nn

import speechtune.training.prepare
from speechtune.cli import main as command_line
from speechtune.commands.guarded import guarded
from speechtune.config import RunConfig
from speechtune.families import create_family, load_config
from speechtune.family import Family
from speechtune.training.run import Outcome, run_training
from speechtune.training.watchdog import LOST_SECONDS
from speechtune.types import Batch, Losses

WAIT_SECONDS = 60
SLEEP_SECONDS = 4.5


def hooked(config: RunConfig, step: int, action: Callable[[], None]) -> Family:
    """The recipe's family; it calls `action` in the first forward pass of step `step`, counted from this launch."""
    family = create_family(config)
    losses, passes_left = family.losses, [(step - 1) * config.train.accumulation]

    def with_action(model: nn.Module, batch: Batch) -> Losses:
        if model.training:
            if passes_left[0] == 0:
                action()
            passes_left[0] -= 1
        return losses(model, batch)

    family.losses = with_action  # type: ignore[method-assign]
    return family


def sigterm() -> None:
    signal.raise_signal(signal.SIGTERM)


def train(
    config: RunConfig,
    step: int | None = None,
    action: Callable[[], None] = sigterm,
    lost_seconds: float = LOST_SECONDS,
) -> Outcome:
    """`run_training`, with something happening in step `step`; may be called again and again in one process."""
    try:
        family = None if step is None else hooked(config, step, action)
        return run_training(config, family, lost_seconds=lost_seconds)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def sigkill() -> None:
    signal.raise_signal(signal.SIGKILL)


def hang() -> None:
    time.sleep(10 * WAIT_SECONDS)


def sleep() -> None:
    time.sleep(SLEEP_SECONDS)


ACTIONS = {"sigterm": sigterm, "sigkill": sigkill, "hang": hang, "sleep": sleep}


def touch_and_act(reached: Path, action: Callable[[], None]) -> None:
    reached.touch()
    action()


def run_ranks(jobs: Path) -> None:
    """Run the jobs; for each the ranks meet at a port of its own, torchrun's store being used up after one.

    A row names a recipe, `port` (None for torchrun's own store), the step at which something happens, and what;
    `lost_seconds` in place of the watchdog's own.
    """
    last_rank = os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1)
    for job in json.loads(jobs.read_text(encoding="utf-8")):
        if job["port"] is not None:
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(job["port"])}
        config = load_config(Path(job["config"]))
        reached, action = Path(job["config"]).with_suffix(".reached"), ACTIONS[job["action"]]
        step = job["step"] if last_rank else None
        lost_seconds = job["lost_seconds"] or LOST_SECONDS
        result = train(config, step, partial(touch_and_act, reached, action), lost_seconds).result
        finished = (config.output_dir / "lora_adapters").exists()
        seen = {"step": result.state.step, "signal": result.signal, "finished": finished}
        Path(f"{job['config']}.rank{os.environ['RANK']}").write_text(json.dumps(seen))


def run_command_line(recipe: Path, step: int) -> int:
    """`speechtune train`, which says in a file `reached` that it is in step `step`, and waits there."""

    def wait() -> None:
        recipe.with_name("reached").touch()
        deadline = time.monotonic() + WAIT_SECONDS
        while not recipe.with_name("go").exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    speechtune.training.prepare.create_family = lambda config: hooked(config, step, wait)
    return command_line(["train", str(recipe)])


if __name__ == "__main__":
    if sys.argv[1] == "ranks":
        sys.exit(guarded(lambda: run_ranks(Path(sys.argv[2]))))
    else:
        sys.exit(run_command_line(Path(sys.argv[2]), int(sys.argv[3])))

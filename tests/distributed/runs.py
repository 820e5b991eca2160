"""What tests of complete runs share: comparing two run directories, and runs on two ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from speechtune.config import RunConfig
from speechtune.storage.verified_folder import find_checkpoints, verify_folder

RANKS_SECONDS = 120
STEPS = 6  # of the runs on real speech and the tiny Higgs
TOLERANCE = 1e-6
SCRIPT = Path(__file__).with_name("interrupted.py")

Configure = Callable[..., RunConfig]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def greatest_difference(one: Path, other: Path) -> float:
    """Between the final adapters of two run directories."""
    ours, theirs = weights(one / "lora_adapters"), weights(other / "lora_adapters")
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def curve(output: Path, key: str = "loss") -> dict[int, float]:
    """A number by step; a step that stands twice in metrics.jsonl fails the test."""
    pairs = [(record["step"], record[key]) for record in records(output) if key in record]
    assert len(dict(pairs)) == len(pairs), f"steps stand twice: {pairs}"
    return dict(pairs)


def assert_same_to_the_bit(output: Path, reference: Path, steps: int) -> None:
    """Adapter, Adam's moments, the losses of every step, and the state of the last checkpoint."""
    assert greatest_difference(output, reference) == 0.0
    assert list(curve(output)) == list(range(1, steps + 1))
    assert curve(output) == curve(reference) and curve(output, "grad_norm") == curve(reference, "grad_norm")
    last, expected = output / f"checkpoint-{steps}", reference / f"checkpoint-{steps}"
    ours, theirs = (torch.load(folder / "optimizer.pt")["optimizer"]["state"] for folder in (last, expected))
    assert all(torch.equal(ours[i][name], theirs[i][name]) for i in theirs for name in theirs[i])
    assert all(verify_folder(path) == [] for _, path in find_checkpoints(output))


@dataclass(frozen=True)
class Row:
    """One run of a launch, and what happens in it, if anything, to the last rank."""

    config: RunConfig
    step: int | None = None
    action: str = "sigterm"
    lost_seconds: float | None = None
    own_port: bool = True


def write_jobs(folder: Path, rows: dict[str, Row]) -> Path:
    """The file that a launch of `interrupted.py` reads."""
    jobs = []
    for name, row in rows.items():
        recipe = folder / f"{name}.yaml"
        recipe.write_text(row.config.to_yaml(), encoding="utf-8")
        more = {"step": row.step, "action": row.action, "lost_seconds": row.lost_seconds}
        jobs.append({"config": str(recipe), "port": free_port() if row.own_port else None, **more})
    path = folder / f"{'-'.join(rows)}.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    return path


def start_torchrun(jobs: Path, *options: str, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start `interrupted.py` under torchrun; `prefix` stands before the command."""
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPT), "ranks", str(jobs)]
    return subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True)


def ended(launch: subprocess.Popen[str], seconds: float = RANKS_SECONDS) -> str:
    """Wait for a launch; what it wrote to stderr."""
    try:
        return launch.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        launch.terminate()  # torchrun takes its ranks along; killed, it would leave them behind
        pytest.fail(f"the ranks hang: {launch.communicate()[1][-4000:]}")


def results_of(folder: Path, rows: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """What each of two ranks says of each run."""
    return {name: [json.loads((folder / f"{name}.yaml.rank{rank}").read_text()) for rank in (0, 1)] for name in rows}


def run_on_two_ranks(folder: Path, jobs: dict[str, tuple[RunConfig, int | None]]) -> dict[str, list[dict[str, Any]]]:
    """Run all jobs in one launch of torchrun, a SIGTERM in the step named; what each rank says of each run."""
    path = write_jobs(folder, {name: Row(config, step) for name, (config, step) in jobs.items()})
    launch = start_torchrun(path, "--standalone", "--nproc_per_node=2")
    errors = ended(launch)
    assert launch.returncode == 0, errors[-4000:]
    return results_of(folder, jobs)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def child_environment() -> dict[str, str]:
    source = Path(__file__).parents[2] / "src"
    return {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

"""What tests of whole runs share: comparing two run directories, and runs on two ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from speechtune.checkpoint import find_checkpoints, verify_folder
from speechtune.config import RunConfig

RANKS_SECONDS = 120
SCRIPT = Path(__file__).with_name("interrupted.py")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def greatest_difference(one: Path, other: Path) -> float:
    """Between the final adapters of two run directories."""
    ours, theirs = weights(one / "lora_adapters"), weights(other / "lora_adapters")
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def curve(output: Path, key: str = "loss") -> dict[int, float]:
    """A number by step; a step that stands twice in metrics.jsonl fails the test."""
    found = [(record["step"], record[key]) for record in records(output) if key in record]
    assert len(dict(found)) == len(found), f"steps stand twice: {found}"
    return dict(found)


def assert_same_to_the_bit(output: Path, reference: Path, steps: int) -> None:
    """Adapter, Adam's moments, the losses of every step, and the state of the last checkpoint."""
    assert greatest_difference(output, reference) == 0.0
    assert list(curve(output)) == list(range(1, steps + 1))
    assert curve(output) == curve(reference) and curve(output, "grad_norm") == curve(reference, "grad_norm")
    last, expected = output / f"checkpoint-{steps}", reference / f"checkpoint-{steps}"
    ours, theirs = (torch.load(folder / "optimizer.pt")["optimizer"]["state"] for folder in (last, expected))
    assert all(torch.equal(ours[i][name], theirs[i][name]) for i in theirs for name in theirs[i])
    assert all(verify_folder(path) == [] for _, path in find_checkpoints(output))


def run_on_two_ranks(folder: Path, jobs: dict[str, tuple[RunConfig, int | None]]) -> dict[str, list[dict[str, Any]]]:
    """Run all jobs in one launch of torchrun; what each rank says of each run."""
    rows = []
    for name, (config, signal_step) in jobs.items():
        recipe = folder / f"{name}.yaml"
        recipe.write_text(config.to_yaml(), encoding="utf-8")
        rows.append({"config": str(recipe), "signal_step": signal_step, "port": free_port()})
    (folder / "jobs.json").write_text(json.dumps(rows), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(SCRIPT), "ranks", str(folder / "jobs.json")]
    launch = subprocess.Popen(command, env=child_environment(), stderr=subprocess.PIPE, text=True)
    try:
        _, errors = launch.communicate(timeout=RANKS_SECONDS)
    except subprocess.TimeoutExpired:
        launch.terminate()  # torchrun takes its ranks along; killed, it would leave them behind
        pytest.fail(f"the ranks hang: {launch.communicate()[1][-4000:]}")
    assert launch.returncode == 0, errors[-4000:]
    return {name: [json.loads((folder / f"{name}.yaml.rank{rank}").read_text()) for rank in (0, 1)] for name in jobs}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def child_environment() -> dict[str, str]:
    source = Path(__file__).parents[2] / "src"
    return {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

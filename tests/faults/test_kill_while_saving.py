"""kill -9 at random moments of a run that saves after every step: nothing torn is accepted, nothing learnt is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked import fork, wait
from safetensors.torch import load_file

import speechtune.training.run  # noqa: F401  # imported before the fork: a child lives for a second
from helpers import DemoClip
from speechtune.commands.guarded import guarded
from speechtune.commands.train import train
from speechtune.config import RunConfig
from speechtune.storage.verified_folder import find_checkpoints, newest_valid, verify_folder

KILLS = int(os.environ.get("SPEECHTUNE_KILLS", "200")) // 2
STEPS = 12
LONGEST_LIFE_SECONDS = 1.6


@pytest.fixture
def saving_config(
    tmp_path: Path, make_config: Callable[..., RunConfig], write_chatml: Callable, demo_clips: list[DemoClip]
) -> Callable[[str], RunConfig]:
    manifest = write_chatml(tmp_path / "train.json", demo_clips[:4])

    def build(name: str) -> RunConfig:
        return make_config(
            output_dir=tmp_path / name,
            data={"train": manifest},
            lora={"rank": 8, "dropout": 0.1},
            train={"max_steps": STEPS, "batch_size": 2, "learning_rate": 1e-3},
            checkpoint={"every_steps": 1, "keep_last": 2, "resume": "auto"},
            tracking={"log_every_steps": 1},
        )

    return build


def adapter(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(config.output_dir / "lora_adapters" / "adapter_model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("half", [1, 2])  # two tests of half the kills each, for two processes
def test_killed_runs_resume_to_the_undisturbed_weights(
    tmp_path: Path, saving_config: Callable[[str], RunConfig], half: int
) -> None:
    """Guards against a torn checkpoint that is taken for complete, and against progress lost or repeated on resume."""
    straight = saving_config("straight")
    assert wait(fork(lambda: guarded(lambda: train(straight)), tmp_path / "straight.log")) == 0
    expected = adapter(straight)
    chance = random.Random(half)
    kills = completed = mid_save = 0
    while kills < KILLS:
        config = saving_config(f"run-{completed}")
        output = tmp_path / f"run-{completed}.log"
        pid = fork(lambda config=config: guarded(lambda: train(config)), output)
        time.sleep(chance.uniform(0.05, LONGEST_LIFE_SECONDS))
        os.kill(pid, signal.SIGKILL)  # of no effect where the run has ended: its zombie is not reaped yet
        code = wait(pid)
        if code == -signal.SIGKILL:
            kills += 1
            mid_save += any(config.output_dir.glob(".writing-*"))
            for _, folder in find_checkpoints(config.output_dir):
                assert (folder / "MANIFEST.json").exists() is False or not verify_folder(folder), folder
            continue
        assert code == 0, output.read_text()
        final = adapter(config)
        assert all(torch.equal(final[name], expected[name]) for name in expected)
        assert newest_valid(config.output_dir)[0] == config.output_dir / f"checkpoint-{STEPS}"
        completed += 1
    last = saving_config(f"run-{completed}")
    assert wait(fork(lambda: guarded(lambda: train(last)), tmp_path / "last.log")) == 0
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter(last).items())
    assert mid_save >= KILLS // 40, f"only {mid_save} of {kills} kills fell into a save"
    print(f"{kills} kills, {mid_save} of them while a folder was written, {completed + 1} runs completed")

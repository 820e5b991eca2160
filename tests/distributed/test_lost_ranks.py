"""A rank or an entire machine that vanishes ends the job with a clear error, and the run resumes to the same weights.

Two machines are two network namespaces with a cable between them; one is lost by pulling the cable first, so that no
goodbye of its kernel reaches the other.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from interrupted import SLEEP_SECONDS, WAIT_SECONDS, train
from runs import TOLERANCE, Configure, Row, curve, ended, greatest_difference, start_torchrun, write_jobs

from speechtune.errors import LostRankError
from speechtune.storage.verified_folder import find_checkpoints, verify_folder
from speechtune.training.watchdog import EXIT_SECONDS, LOST_BEATS, LOST_SECONDS

FOUR = {"train": {"batch_size": 4}}
FSDP = {"train": {"batch_size": 4}, "speed": {"parallel": "fsdp"}}
PORT = 29500  # of the namespaces' own
SHORT = 6.0  # in place of LOST_SECONDS
RESUME = "start the same command again with checkpoint.resume=auto"


def sound_steps(output: Path) -> list[int]:
    return [step for step, path in find_checkpoints(output) if verify_folder(path) == []]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {WAIT_SECONDS} s"
        time.sleep(0.05)


def test_a_minute_is_enough() -> None:
    """What the scaled-down tests below stand for: silence, the beats around it, and the end of a process."""
    assert LOST_SECONDS + 2 * LOST_SECONDS / LOST_BEATS + EXIT_SECONDS < 60


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_the_run_resumes(configure: Configure, straight: Path, tmp_path: Path) -> None:
    """Killed in step 3, restarted by torchrun itself, killed in step 5, and resumed by hand."""
    output = tmp_path / "output"
    row = Row(configure(output, FOUR), step=3, action="sigkill", lost_seconds=2 * SHORT, own_port=False)
    options = ("--standalone", "--nproc_per_node=2", "--max-restarts=1")
    unshared = ["env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
    launch = start_torchrun(write_jobs(tmp_path, {"killed": row}), *options, prefix=unshared)
    errors = ended(launch)
    seconds = time.time() - (tmp_path / "killed.reached").stat().st_mtime
    assert launch.returncode != 0 and seconds < 60 and sound_steps(output) == [2, 3, 4]
    for newest in (2, 4):
        expected = rf"rank 1 on \S+ was last seen at step [0-4]\. Rank 0 .*{output}/checkpoint-{newest} is the newest"
        assert re.search(f"LostRankError: .*{expected}", errors), errors[-4000:]
    assert RESUME in errors and f"exitcode  : {LostRankError.exit_code}" in errors and "exitcode  : -9" in errors
    assert errors.count("resuming from") == 1 and "onnection closed" not in errors
    assert not (output / "lora_adapters").exists()

    train(configure(output))
    assert greatest_difference(output, straight) < TOLERANCE
    assert curve(output) == pytest.approx(curve(straight), rel=1e-6)


# -- two machines --------------------------------------------------------------------------------------------------


class Machines:
    """Two network namespaces joined by a cable."""

    def __init__(self) -> None:
        self.names = [f"speechtune-{os.getpid()}-{end}" for end in "ab"]

    def __enter__(self) -> Machines:
        one, other = self.names
        try:
            for name in self.names:
                ip("netns", "add", name)
            ip("link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", other)
            for number, name in enumerate(self.names, start=1):
                ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
                for device in ("lo", "cable"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            self.kill(name)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def start(self, jobs: Path) -> list[subprocess.Popen[str]]:
        """One torchrun on each machine."""
        options = ("--nnodes=2", "--nproc_per_node=1", "--master_addr=10.77.0.1", f"--master_port={PORT}")
        return [
            start_torchrun(
                jobs,
                *options,
                f"--node_rank={number}",
                prefix=["ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=cable"],
            )
            for number, name in enumerate(self.names)
        ]

    def lose(self, number: int) -> None:
        """Pull the cable of a machine, then end everything on it."""
        ip("-n", self.names[number], "link", "set", "cable", "down")
        self.kill(self.names[number])

    def kill(self, name: str) -> None:
        listed = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True)
        for process in listed.stdout.split():
            os.kill(int(process), signal.SIGKILL)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[Machines]:
    with Machines() as both:
        yield both


def lose_one(
    machines: Machines, number: int, running: Sequence[subprocess.Popen[str]], victim: Path
) -> tuple[str, float]:
    """Lose a machine once the run `victim` hangs with a checkpoint behind it; what the other one says, and when."""
    output = victim.with_suffix("")
    wait_for(lambda: victim.with_suffix(".reached").exists() and 4 in sound_steps(output), "the victim hangs")
    machines.lose(number)
    lost = time.monotonic()
    left = running[1 - number]
    errors, seconds = ended(left), time.monotonic() - lost
    running[number].communicate()
    assert left.returncode != 0 and RESUME in errors, errors[-4000:]
    return errors, seconds


@pytest.mark.slow
def test_two_machines_and_the_loss_of_either(
    machines: Machines, configure: Configure, straight: Path, tmp_path: Path
) -> None:
    """The plain run has a rank that stands still for longer than the silence allowed: it beats on, and is not lost."""
    assert SLEEP_SECONDS > SHORT / 2
    plain, victim, second = (tmp_path / name for name in ("plain", "victim", "second"))
    rows = {
        "plain": Row(configure(plain, FOUR), step=2, action="sleep", lost_seconds=SHORT / 2),
        "victim": Row(configure(victim, FSDP), step=5, action="hang", lost_seconds=SHORT),
    }
    running = machines.start(write_jobs(tmp_path, rows))
    errors, seconds = lose_one(machines, 1, running, tmp_path / "victim.yaml")
    assert greatest_difference(plain, straight) < TOLERANCE
    assert curve(plain) == pytest.approx(curve(straight), rel=1e-6)
    expected = rf"no sign of life for 6 s: rank 1 on \S+ was last seen at step [0-4]\. .*{victim}/checkpoint-4 is"
    assert re.search(f"LostRankError: {expected}", errors), errors[-4000:]
    assert seconds < 60 - LOST_SECONDS + SHORT

    shutil.copytree(victim, tmp_path / "on-one-machine")
    train(configure(tmp_path / "on-one-machine"))
    assert greatest_difference(tmp_path / "on-one-machine", straight) < TOLERANCE

    ip("-n", machines.names[1], "link", "set", "cable", "up")
    rows = {
        "resumed": Row(configure(victim, FSDP)),
        "second": Row(configure(second, FOUR), step=5, action="hang", lost_seconds=SHORT),
    }
    running = machines.start(write_jobs(tmp_path, rows))
    errors, seconds = lose_one(machines, 0, running, tmp_path / "second.yaml")
    assert greatest_difference(victim, straight) < TOLERANCE
    expected = r"the launch's store at 10\.77\.0\.1:\d+ has not answered .*rank 0 on \S+ was last seen at step [0-4]"
    assert re.search(f"LostRankError: {expected}", errors), errors[-4000:]
    assert seconds < 60 - LOST_SECONDS + SHORT

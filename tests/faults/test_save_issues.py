"""Disks that fill up, turn read-only, are not ours or vanish under a run: the promised message and exit code.

What is promised stands in docs/checkpoints.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import fork, wait

import speechtune.training.run  # noqa: F401  # imported before the fork: quick there, and readable without rights
from helpers import DemoClip
from speechtune.commands.guarded import guarded
from speechtune.commands.train import train
from speechtune.config import RunConfig
from speechtune.storage.verified_folder import find_checkpoints, verify_folder

NOBODY = 65534
DISK_MEGABYTES = 40


@pytest.fixture
def start(
    tmp_path: Path, make_config: Callable[..., RunConfig], write_chatml: Callable, demo_clips: list[DemoClip]
) -> Callable[..., int]:
    """Fork a long run that saves after every step; its console goes to `log`."""
    manifest = write_chatml(tmp_path / "train.json", demo_clips[:2])

    def begin(output_dir: Path, *, steps: int = 2000, user: int | None = None) -> int:
        config = make_config(
            output_dir=output_dir,
            data={"train": manifest},
            lora={"rank": 4},
            train={"max_steps": steps, "batch_size": 1},
            checkpoint={"every_steps": 1, "keep_last": 2},
            tracking={"log_every_steps": 1},
        )

        def work() -> int:
            if user is not None:
                os.setuid(user)
            return guarded(lambda: train(config))

        return fork(work, tmp_path / "log")

    return begin


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"no right to mount a file system here: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def wait_for_checkpoint(output_dir: Path) -> None:
    deadline = time.monotonic() + 60
    while not find_checkpoints(output_dir):
        assert time.monotonic() < deadline, "no checkpoint within a minute"
        time.sleep(0.01)


def intact(output_dir: Path) -> int:
    """Number of checkpoints left, each of them verified."""
    checkpoints = find_checkpoints(output_dir)
    for _, folder in checkpoints:
        assert verify_folder(folder) == [], folder
    assert not (output_dir / "lora_adapters").exists(), "a failed run must leave nothing that says success"
    return len(checkpoints)


def test_disk_that_fills_up(disk: Path, tmp_path: Path, start: Callable[..., int]) -> None:
    """Guards against a save that fails on a full disk and is reported as done."""
    pid = start(disk / "run")
    wait_for_checkpoint(disk / "run")
    with (disk / "ballast").open("wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(b"0" * (1 << 20))
        except OSError:
            pass
    assert wait(pid) == 3
    log = (tmp_path / "log").read_text()
    assert "free space or write to another disk" in log
    assert "trying once more" in log
    assert "CheckpointError" in log.splitlines()[-1]
    assert intact(disk / "run") >= 1


def test_disk_too_small_is_refused_before_training(disk: Path, tmp_path: Path, start: Callable[..., int]) -> None:
    """Guards against finding out after hours that the first save does not fit."""
    (disk / "ballast").write_bytes(b"0" * ((DISK_MEGABYTES - 8) << 20))
    assert wait(start(disk / "run")) == 3
    log = (tmp_path / "log").read_text()
    assert "GB free, a save needs" in log
    assert "step 1/" not in log


def test_disk_that_turns_read_only(disk: Path, tmp_path: Path, start: Callable[..., int]) -> None:
    """Guards against a read-only remount (a disk with errors) that ends in a traceback or in silence."""
    pid = start(disk / "run")
    wait_for_checkpoint(disk / "run")
    # A second mount on top: the first one cannot be made read-only while the run holds its lock open for writing.
    subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)
    assert wait(pid) == 3
    assert "read-only" in (tmp_path / "log").read_text().lower()
    subprocess.run(["umount", str(disk)], check=True)
    assert intact(disk / "run") >= 1


def test_read_only_from_the_start(disk: Path, tmp_path: Path, start: Callable[..., int]) -> None:
    """Guards against `os.access`, which tells root that everything can be written."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert wait(start(disk / "run")) == 3
    assert "the file system is read-only" in (tmp_path / "log").read_text()


def test_folder_of_somebody_else(tmp_path: Path, start: Callable[..., int]) -> None:
    """Guards against running without rights to the output folder until the first save."""
    for parent in (tmp_path, *tmp_path.parents[:3]):
        parent.chmod(0o755)
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o755)
    assert wait(start(folder / "run", user=NOBODY)) == 3
    log = (tmp_path / "log").read_text()
    assert "no permission: change the folder's owner or mode" in log
    assert str(folder) in log


def test_file_where_the_folder_should_be(tmp_path: Path, start: Callable[..., int]) -> None:
    """Guards against a traceback where a file stands in the way."""
    (tmp_path / "run").write_text("not a folder")
    assert wait(start(tmp_path / "run")) == 3
    assert "a file stands where a folder should be" in (tmp_path / "log").read_text()


def test_folder_replaced_by_a_file(tmp_path: Path, start: Callable[..., int]) -> None:
    """Guards against a run that goes on without a place to save to."""
    pid = start(tmp_path / "run")
    wait_for_checkpoint(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    while not (tmp_path / "run").is_file():
        try:
            (tmp_path / "run").write_text("not a folder")
        except IsADirectoryError:  # a save came in between, and made the folder again
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert wait(pid) == 3
    assert "Error" in (tmp_path / "log").read_text().splitlines()[-1]
    assert intact(tmp_path / "moved") >= 1


def test_folder_deleted_in_mid_run(tmp_path: Path, start: Callable[..., int]) -> None:
    """Guards against losing hours of training because somebody tidied up: the folder is made again, loudly."""
    pid = start(tmp_path / "run", steps=60)
    wait_for_checkpoint(tmp_path / "run")
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert wait(pid) == 0
    log = (tmp_path / "log").read_text()
    assert "deleted while the run goes on; made again" in log
    assert verify_folder(tmp_path / "run" / "lora_adapters") == []
    assert verify_folder(tmp_path / "run" / "checkpoint-60") == []

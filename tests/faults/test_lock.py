"""One process at a time writes into a folder: a second one is refused, and what a killed one left behind is told."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from pathlib import Path

import pytest
from forked import fork, wait

from speechtune.errors import CheckpointError, ConfigError
from speechtune.storage.lock import LOCK_NAME, locked


def hold(folder: Path, seconds: float = 60.0, child: bool = False) -> int:
    """A process that holds the lock, and is known to; with `child` one forked from it goes on after it."""

    def work() -> int:
        with locked(folder):
            if child and not os.fork():
                time.sleep(5)
                os._exit(0)
            (folder / "held").touch()
            time.sleep(seconds)
        return 0

    pid = fork(work, folder.parent / "holder.log")
    deadline = time.monotonic() + 20
    while not (folder / "held").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (folder / "held").exists()
    return pid


def test_a_second_writer_is_refused_and_told_who_holds_the_folder(tmp_path: Path) -> None:
    """Guards against two runs that both "succeed" on one set of checkpoints."""
    folder = tmp_path / "out"
    pid = hold(folder)
    told = rf"process {pid} on {socket.gethostname()} .* is writing .*another folder"
    try:
        with pytest.raises(ConfigError, match=told), locked(folder):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        wait(pid)


@pytest.mark.parametrize("child", [False, True])
def test_a_killed_writers_lock_is_taken_over_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, child: bool
) -> None:
    """Guards against a folder that a killed run blocks for good, also while processes it started live on."""
    monkeypatch.setattr(logging.getLogger("speechtune"), "propagate", True)
    folder = tmp_path / "out"
    pid = hold(folder, child=child)
    os.kill(pid, signal.SIGKILL)
    wait(pid)
    with locked(folder):
        assert f"process {pid} on {socket.gethostname()}" in caplog.text and "ended without a word" in caplog.text
        assert str(os.getpid()) in (folder / LOCK_NAME).read_text()
    assert not (folder / LOCK_NAME).exists()
    caplog.clear()
    with locked(folder):
        pass
    assert not caplog.text


def test_a_lock_of_another_machine_is_named_as_such(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("speechtune"), "propagate", True)
    (tmp_path / LOCK_NAME).write_text("process 7 on elsewhere (since 2026-01-01T00:00:00+00:00)")
    with locked(tmp_path):
        assert "process 7 on elsewhere" in caplog.text and "shares no locks with this one" in caplog.text


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="a file stands where a folder should be"), locked(tmp_path / "file"):
        pass

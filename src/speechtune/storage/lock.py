"""A folder that one process at a time writes into."""

import fcntl
import logging
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from speechtune.errors import ConfigError
from speechtune.storage.verified_folder import check_writable

log = logging.getLogger("speechtune")

LOCK_NAME = ".lock"


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes from writing into a folder, which is made if need be; the lock ends with this process.

    Raises ConfigError: another process holds it, which is named; CheckpointError: the folder cannot be written.
    """
    check_writable(directory, 0)
    path = directory / LOCK_NAME
    file = _acquire(path)
    try:
        yield
    finally:
        with suppress(OSError):  # the disk may have turned read-only by now, and the run says so itself
            path.unlink()  # before it is let go: who waits for this file sees that it is no longer there
        file.close()


def lock_holder(directory: Path) -> int | None:
    """Id of the other process on this machine that holds a folder's lock; None where none does.

    Not to be asked by the process that holds it: closing a file lets go of every lock that a process has on it.
    """
    try:
        with (directory / LOCK_NAME).open("rb") as file:
            # struct flock of Linux: type, whence, start, length, process
            answer = fcntl.fcntl(file, fcntl.F_GETLK, struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:  # no such file, or a disk without locks
        return None
    kind, *_, pid = struct.unpack("hhqqi", answer)
    return pid if kind != fcntl.F_UNLCK and pid > 0 else None


def _acquire(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        file.seek(0)
        owner = file.read()
        try:
            # A lock of the process, not of the open file: processes forked from it must not keep it alive.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            raise ConfigError(
                f"{path.parent}: {owner or 'another process'} is writing into this folder: wait for it, stop it, or "
                "choose another folder"
            ) from None
        except OSError as error:
            log.warning("%s: this disk has no locks (%s): let no other run write here", path.parent, error.strerror)
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(file.fileno())):
                break
        file.close()  # its owner has just ended, and took the file away
    if owner:
        unseen = "" if f" on {socket.gethostname()} " in owner else ", or its machine shares no locks with this one"
        log.warning("%s: %s was to write here, and ended without a word%s", path.parent, owner, unseen)
    file.truncate(0)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    file.write(f"process {os.getpid()} on {socket.gethostname()} (since {now})")
    file.flush()
    return file

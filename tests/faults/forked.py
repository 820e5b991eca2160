"""Run a piece of work in a forked child: a real process to kill or to take rights from, without seconds of imports."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def fork(work: Callable[[], int], output: Path) -> int:
    """Start `work` in a child whose console goes to `output`; returns the child's process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # pytest's captured streams belong to the parent
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int) -> int:
    """Exit code of a child; negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

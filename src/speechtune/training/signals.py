"""Signals: SIGTERM and SIGINT end a run after the current step, with a checkpoint."""

import logging
import signal
from types import FrameType
from typing import Self

log = logging.getLogger("speechtune")


def ignore_signals(_worker: int = 0) -> None:
    """Leave a signal to the process group to the main process; called in worker processes."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class Interruption:
    """Catches SIGTERM and SIGINT while a run trains; the loop finishes its step, saves and leaves."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Self:
        self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal:  # the second signal: stop at once
            raise KeyboardInterrupt
        self.signal = number
        log.warning("%s: finishing this step, then saving and stopping", signal.Signals(number).name)

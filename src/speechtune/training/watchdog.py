"""Watchdog: ends a run on several ranks when one of them is gone, even while the others hang in a collective.

Neither torchrun nor a collective notices a machine that lost power or network: both wait until the timeout of
collectives, which must be hours (docs/decisions/0010). So each rank writes a beat into the launch's store every two
seconds and reads those of the others.
"""

import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch.distributed import (
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from speechtune.errors import LostRankError, TrainingError
from speechtune.storage.verified_folder import MANIFEST_NAME, find_checkpoints

log = logging.getLogger("speechtune")

LOST_SECONDS = 40.0  # a healthy rank is silent while a library holds the interpreter
LOST_BEATS = 20  # so many missed beats are that silence
QUICK_BEATS = 3  # once a collective has failed, so many missed beats show which rank is the cause
EXIT_SECONDS = 10.0  # for a message and the end of a process; a disk that went with a machine may block both
DONE = "done"
CONNECTION = re.compile(r"gloo|nccl|connection|broken pipe|socket|process group|peer", re.IGNORECASE)


def connect(timeout_seconds: float) -> Store:
    """A connection to the launch's store for beats alone: one that waits in a collective cannot carry them."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = broadcast_object_list([uuid.uuid4().hex])[0]  # torchrun's restarts share one store
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=timeout_seconds))
    except RuntimeError as error:
        raise TrainingError(f"the launch's store at {address}:{port} cannot be reached: {error}") from error
    return PrefixStore(f"speechtune/{attempt}", store)


class Watchdog:
    """Context manager around a run: shows that this rank is alive, and watches the others; does nothing on one rank.

    A rank, or the launch's store, counts as lost after `lost_seconds` of silence. The `with` block then raises
    LostRankError where a collective failed; where the main thread hangs, the process prints the same message and ends
    with the same exit code. `step` says where this rank is, at every beat.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        lost_seconds: float = LOST_SECONDS,
        connect: Callable[[float], Store] = connect,
    ) -> None:
        self.accelerator, self.output_dir, self.connect = accelerator, output_dir, connect
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.lost_seconds, self.beat_seconds = lost_seconds, lost_seconds / LOST_BEATS
        self.step: Callable[[], int] = lambda: 0
        self._end = ""  # how this rank ended; part of its last beat
        self._stop = threading.Event()
        self._num_written = 0
        self._beats: dict[int, str] = {}  # last beat of each rank
        self._missed: Counter[int] = Counter()  # how often that was read unchanged
        self._unanswered = 0  # turns since the store last answered
        self._beating: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self.ranks > 1:
            self._store = self.connect(self.lost_seconds)
            self._write()
            self.accelerator.wait_for_everyone()  # reading waits for keys that are not there yet
            self._read()
            self._beating = threading.Thread(target=self._keep_beating)
            self._beating.start()  # no daemon: one still in the store when the interpreter ends aborts the process
            threading.Thread(target=self._judge, daemon=True).start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._beating is None:
            return
        lost = ""
        if isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or CONNECTION.search(str(error))):
            # torchrun sends SIGTERM to the ranks that are left, which must not keep this one from naming the lost one.
            previous = signal.signal(signal.SIGTERM, signal.SIG_IGN)
            lost = self._wait_for_lost()
            signal.signal(signal.SIGTERM, previous)
        self._end = f"lost: {lost}" if lost else DONE if error is None else f"{type(error).__name__}: {error}"
        self._stop.set()
        self._beating.join(self.beat_seconds)
        if lost or (error is not None and self._beating.is_alive()):
            # What closes connections at the end of a process may wait for ranks that are gone.
            _end_in(EXIT_SECONDS, LostRankError.exit_code if lost else getattr(error, "exit_code", 1))
        if error is None:
            self.accelerator.wait_for_everyone()  # the process that holds the store outlives everybody's last beat
        if lost:
            raise LostRankError(self._message(lost)) from error

    def _write(self) -> None:
        self._num_written += 1
        beat = {"beat": self._num_written, "step": self.step(), "host": socket.gethostname(), "end": self._end}
        self._store.set(str(self.rank), json.dumps(beat))

    def _read(self) -> None:
        for rank, value in enumerate(self._store.multi_get([str(rank) for rank in range(self.ranks)])):
            beat = value.decode()
            self._missed[rank] = self._missed[rank] + 1 if self._beats.get(rank) == beat else 0
            self._beats[rank] = beat

    def _keep_beating(self) -> None:
        """Thread that alone speaks with the store, which may block."""
        last = False
        while not last:
            last = self._stop.is_set()
            try:
                self._write()
                self._read()
                self._unanswered = 0
            except dist.DistNetworkError as error:  # its process is gone; each further attempt would print a C++ trace
                log.debug("the launch's store is gone: %s", error)
                return
            except RuntimeError as error:  # it does not answer: the judge counts
                log.debug("no answer of the launch's store: %s", error)
            self._stop.wait(self.beat_seconds)

    def _judge(self) -> None:
        """Thread that ends the process when a rank is lost.

        It counts its own turns and reads instead of asking the clock: when the interpreter stood still, it did too.
        """
        while not self._stop.wait(self.beat_seconds):
            self._unanswered += 1
            if lost := self._lost(LOST_BEATS):
                _end_in(EXIT_SECONDS, LostRankError.exit_code)
                print(f"speechtune: LostRankError: {self._message(lost)}", file=sys.stderr, flush=True)
                os._exit(LostRankError.exit_code)  # nothing else ends a thread that waits inside gloo or NCCL

    def _lost(self, beats: int) -> str:
        """Which ranks missed so many beats or ended with an error; empty for none."""
        store_gone = self._beating is not None and not self._beating.is_alive()
        if self._unanswered >= (QUICK_BEATS if store_gone else beats):
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            first = f"; {self._describe(0)}" if self.rank else ""
            return (
                f"the launch's store at {address} has not answered for {self._unanswered * self.beat_seconds:.0f} s: "
                f"the machine it runs on is gone, or the network to it{first}"
            )
        lost = []
        for rank, missed in self._missed.items():
            end = json.loads(self._beats[rank])["end"]
            if rank == self.rank or end == DONE:
                continue
            if end and missed >= QUICK_BEATS:  # time for its own message, and for this rank to meet the same error
                lost.append(f"{self._describe(rank)}, and ended with: {end}")
            elif missed >= beats:
                lost.append(f"no sign of life for {missed * self.beat_seconds:.0f} s: {self._describe(rank)}")
        return "; ".join(lost)

    def _describe(self, rank: int) -> str:
        beat = json.loads(self._beats[rank])
        return f"rank {rank} on {beat['host']} was last seen at step {beat['step']}"

    def _wait_for_lost(self) -> str:
        """After a failed collective: wait until missed beats show which rank is the cause."""
        deadline = time.monotonic() + (2 * QUICK_BEATS + 1) * self.beat_seconds
        while not (lost := self._lost(QUICK_BEATS)) and time.monotonic() < deadline:
            time.sleep(self.beat_seconds / 10)
        return lost

    def _message(self, lost: str) -> str:
        saved = [path for _, path in find_checkpoints(self.output_dir) if (path / MANIFEST_NAME).is_file()]
        newest = f"{saved[-1]} is the newest checkpoint" if saved else "no checkpoint was saved yet"
        return (
            f"{lost}. Rank {self.rank} on {socket.gethostname()} ends at step {self.step()}; {newest}: start the same "
            "command again with checkpoint.resume=auto"
        )


def _end_in(seconds: float, code: int) -> None:
    """End this process after a while, whatever it hangs in."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()

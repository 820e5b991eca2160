"""Ranks watch one another: when one vanishes the others end with a clear error, even while they hang in a collective.

A machine that loses power says goodbye to nobody: collectives with it would wait until their timeout, hours later.
"""

from __future__ import annotations

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
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType

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

BEAT_SECONDS = 2.0
LOST_SECONDS = 40.0  # a healthy rank is silent while a library holds the interpreter; a dead one may cost a minute
QUICK_BEATS = 3  # once a collective has failed, so many missed beats show whose end it was
EXIT_SECONDS = 10.0  # for a message and the end of a process; a disk that went with a machine may block both
VERDICT = "verdict"
DONE = "done"
CONNECTION = re.compile(r"gloo|nccl|connection|broken pipe|socket|process group|peer", re.IGNORECASE)


@dataclass(slots=True)
class _Peer:
    """What this rank knows of another: its last beat, and how often it was read unchanged since."""

    beat: str
    missed: int = 0


class Watchdog:
    """Around a run on several ranks: shows that this rank lives, and watches the others; a single one has none.

    Args:
        accelerator: has joined the ranks.
        output_dir: holds the checkpoints that the error names.
        beat_seconds: time between signs of life.
        lost_seconds: silence after which a rank, or the store of the launch, counts as lost.

    Raises:
        LostRankError: a collective failed in the `with` block and another rank is the reason. Where the main thread
            hangs, the process prints the same message and ends with the same exit code.

    Attributes:
        step: where this rank is, asked at every beat.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: Path,
        *,
        beat_seconds: float = BEAT_SECONDS,
        lost_seconds: float = LOST_SECONDS,
    ) -> None:
        self.accelerator, self.output_dir = accelerator, output_dir
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self.beat_seconds, self.lost_seconds = beat_seconds, lost_seconds
        self.step: Callable[[], int] = lambda: 0
        self._end = ""
        self._verdict = ""
        self._stop = threading.Event()
        self._unanswered = 0
        self._cut_off = False
        self._beats = 0
        self._peers: dict[int, _Peer] = {}

    def __enter__(self) -> Watchdog:
        if self.ranks == 1:
            return self
        self._store = self._connect()
        self._write()
        self.accelerator.wait_for_everyone()  # reading waits for keys that are not there yet
        self._read()
        self._process = os.getpid()
        self._old = signal.signal(signal.SIGTERM, self._terminated)
        # No daemon: one that comes back from the store while the interpreter is torn down aborts the process.
        self._beating = threading.Thread(target=self._beat)
        self._beating.start()
        threading.Thread(target=self._judge, daemon=True).start()
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self.ranks == 1:
            return
        failed = isinstance(error, RuntimeError) and (
            isinstance(error, dist.DistError) or CONNECTION.search(str(error)) is not None
        )
        lost = self._find_lost() if failed else ""
        self._end = f"lost: {lost}" if lost else DONE if error is None else f"{type(error).__name__}: {error}"
        self._stop.set()
        self._beating.join(self.beat_seconds)
        if lost or (error is not None and self._beating.is_alive()):
            # What closes connections at the end of a process may wait for the dead.
            _end_in(EXIT_SECONDS, LostRankError.exit_code if lost else getattr(error, "exit_code", 1))
        if error is None:
            self.accelerator.wait_for_everyone()  # the process that holds the store outlives everybody's last beat
        signal.signal(signal.SIGTERM, self._old)
        if lost:
            raise LostRankError(self._message(lost)) from error

    def _connect(self) -> Store:
        """A connection of its own to the launch's store: one that hangs in a collective cannot carry beats."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = broadcast_object_list([uuid.uuid4().hex])[0]  # torchrun's restarts share one store
        timeout = timedelta(seconds=self.lost_seconds)
        try:
            store = TCPStore(address, port, is_master=False, timeout=timeout)
        except RuntimeError as error:
            raise TrainingError(f"the launch's store at {address}:{port} cannot be reached: {error}") from error
        return PrefixStore(f"speechtune/{attempt}", store)

    def _write(self) -> None:
        self._beats += 1
        beat = {"beat": self._beats, "step": self.step(), "host": socket.gethostname(), "end": self._end}
        self._store.set(str(self.rank), json.dumps(beat))

    def _read(self) -> None:
        for rank, value in enumerate(self._store.multi_get([str(rank) for rank in range(self.ranks)])):
            beat = value.decode()
            peer = self._peers.setdefault(rank, _Peer(beat))
            peer.missed = peer.missed + 1 if peer.beat == beat else 0
            peer.beat = beat
        if not self._verdict and self._store.check([VERDICT]):
            self._verdict = self._store.get(VERDICT).decode()

    def _beat(self) -> None:
        """Thread: all that speaks with the store, which may block."""
        while True:
            last = self._stop.is_set()
            try:
                self._write()
                self._read()
                self._unanswered = 0
            except dist.DistNetworkError as error:  # its process is gone; every further attempt would print a C++ trace
                log.debug("the launch's store is gone: %s", error)
                self._cut_off = True
            except RuntimeError as error:  # it does not answer: the judge counts
                log.debug("no answer of the launch's store: %s", error)
            if last or self._cut_off:
                return
            self._stop.wait(self.beat_seconds)

    def _judge(self) -> None:
        """Thread: counts, and ends the process.

        It counts its own turns and reads instead of asking the clock: when the interpreter stood still, it did too.
        """
        while not self._stop.wait(self.beat_seconds):
            self._unanswered += 1
            if lost := self._lost(self.lost_seconds / self.beat_seconds):
                _end_in(EXIT_SECONDS, LostRankError.exit_code)
                self._tell(lost)
                print(f"speechtune: LostRankError: {self._message(lost)}", file=sys.stderr, flush=True)
                os._exit(LostRankError.exit_code)

    def _lost(self, beats: float) -> str:
        """Who has missed so many beats, or said that it ends; empty for nobody."""
        if self._verdict:
            return self._verdict
        if self._unanswered >= (QUICK_BEATS if self._cut_off else beats):
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            first = f"; {self._describe(0)}" if self.rank and 0 in self._peers else ""
            return (
                f"the launch's store at {address} has not answered for {self._unanswered * self.beat_seconds:.0f} s: "
                f"the machine it runs on is gone, or the network to it{first}"
            )
        found = []
        for rank, peer in self._peers.items():
            end = json.loads(peer.beat)["end"]
            if rank == self.rank or end == DONE:
                continue
            if end and peer.missed >= QUICK_BEATS:  # time for its own message, and for this rank to meet the same end
                found.append(f"{self._describe(rank)}, and ended with: {end}")
            elif peer.missed >= beats:
                found.append(f"no sign of life for {peer.missed * self.beat_seconds:.0f} s: {self._describe(rank)}")
        return "; ".join(found)

    def _describe(self, rank: int) -> str:
        beat = json.loads(self._peers[rank].beat)
        return f"rank {rank} on {beat['host']} was last seen at step {beat['step']}"

    def _find_lost(self) -> str:
        """After a failed collective: wait until it shows who is gone."""
        deadline = time.monotonic() + (2 * QUICK_BEATS + 1) * self.beat_seconds
        while not (lost := self._lost(QUICK_BEATS)) and time.monotonic() < deadline:
            time.sleep(self.beat_seconds / 10)
        if lost:
            self._tell(lost)
        return lost

    def _tell(self, lost: str) -> None:
        """Let the other ranks say the same, and at once."""
        if self._cut_off:
            return
        teller = threading.Thread(target=_quietly, args=(lambda: self._store.set(VERDICT, lost),))
        teller.start()
        teller.join(self.beat_seconds)  # the store may be what is lost

    def _message(self, lost: str) -> str:
        saved = [path for _, path in find_checkpoints(self.output_dir) if (path / MANIFEST_NAME).is_file()]
        newest = f"{saved[-1]} is the newest checkpoint" if saved else "no checkpoint was saved yet"
        return (
            f"{lost}. Rank {self.rank} on {socket.gethostname()} ends at step {self.step()}; {newest}: start the same "
            "command again with checkpoint.resume=auto"
        )

    def _terminated(self, number: int, _frame: FrameType | None) -> None:
        """SIGTERM outside the loop: a launcher sends it to those who are left, and then this says who is not."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if os.getpid() == self._process and (lost := self._find_lost()):
            _end_in(EXIT_SECONDS, LostRankError.exit_code)
            print(f"speechtune: LostRankError: {self._message(lost)}", file=sys.stderr, flush=True)
            os._exit(LostRankError.exit_code)
        signal.raise_signal(number)


def _end_in(seconds: float, code: int) -> None:
    """End this process after a while, whatever it hangs in."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _quietly(call: Callable[[], None]) -> None:
    try:
        call()
    except RuntimeError as error:
        log.debug("no answer of the launch's store: %s", error)

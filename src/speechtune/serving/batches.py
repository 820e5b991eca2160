"""Requests to a model in batches: those that arrive while one runs form the next, as soon as it ends."""

import asyncio
import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

QUIET_SECONDS = 0.005
MOST_QUIET = 20  # times that long a request waits at the most
Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")
T = TypeVar("T")
Observe = Callable[[int], object]


@dataclass(eq=False, slots=True)
class _Job(Generic[Key, Item, Result]):
    key: Key
    item: Item
    answer: asyncio.Future[Result]
    size: float
    alone: bool = False


class Batches(Generic[Key, Item, Result]):
    """A queue before a model, which works in one thread of its own; made and used inside a running event loop.

    A batch holds requests of one key, the oldest one's, of like size. Who cancels the future of a request is
    left out of the next batch. A batch that fails is tried again request by request, so that one that cannot be
    answered spoils no other's answer.
    """

    def __init__(
        self,
        work: Callable[[Key, Sequence[Item], Callable[[], bool]], Sequence[Result]],
        batch_size: int,
        observe: Observe = lambda size: None,
        quiet_seconds: float = QUIET_SECONDS,
    ) -> None:
        """`work` answers the items of a batch; it may stop early where the function it gets says that nobody waits.

        `observe` is told the size of each batch. When nothing runs, a batch begins after `quiet_seconds` without a new
        request.
        """
        self._work, self._batch_size, self._observe = work, batch_size, observe
        self._quiet_seconds = quiet_seconds
        self._jobs: deque[_Job[Key, Item, Result]] = deque()
        self._arrived = asyncio.Event()
        self._closing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._seconds = 1.0
        self._task = asyncio.get_running_loop().create_task(self._dispatch())

    def __len__(self) -> int:
        """Number of requests that wait for a batch."""
        return len(self._jobs)

    def submit(self, key: Key, item: Item, size: float = 0.0) -> asyncio.Future[Result]:
        """Queue a request, whose answer takes as long as its `size` says; the future holds it, or the error it met."""
        job = _Job[Key, Item, Result](key, item, asyncio.get_running_loop().create_future(), size)
        self._jobs.append(job)
        self._arrived.set()
        return job.answer

    async def call(self, function: Callable[[], T]) -> T:
        """Call something that uses the model, between two batches."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def wait_seconds(self) -> int:
        """Roughly how long a request that comes now has to wait, at least a second."""
        return max(1, math.ceil((len(self._jobs) / self._batch_size + 1) * self._seconds))

    async def close(self) -> None:
        """Answer what is queued, then end."""
        self._closing = True
        self._arrived.set()
        await self._task
        self._thread.shutdown()

    async def _dispatch(self) -> None:
        loop = asyncio.get_running_loop()
        while self._jobs or not self._closing:
            if not self._jobs:
                self._arrived.clear()
                await self._arrived.wait()
                await self._gather()
                continue
            if not (batch := self._take()):
                continue
            self._observe(len(batch))
            items, abandoned = [job.item for job in batch], _all_cancelled(batch)
            started = time.monotonic()
            running = loop.run_in_executor(self._thread, self._work, batch[0].key, items, abandoned)
            await asyncio.wait([running])
            self._seconds += 0.3 * (time.monotonic() - started - self._seconds)
            self._deliver(batch, running)

    async def _gather(self) -> None:
        """Wait until no more come: requests that are sent together go together."""
        seen = 0
        for _ in range(MOST_QUIET):
            if not seen < len(self._jobs) < self._batch_size:
                break
            seen = len(self._jobs)
            await asyncio.sleep(self._quiet_seconds)

    def _take(self) -> list[_Job[Key, Item, Result]]:
        """The oldest request, and of those that may go with it the ones nearest to its size: a batch is as long as its
        longest answer.
        """
        waiting = [job for job in self._jobs if not job.answer.cancelled()]
        batch = waiting[:1]
        if batch and not batch[0].alone:
            mates = [job for job in waiting[1:] if job.key == batch[0].key and not job.alone]
            batch += sorted(mates, key=lambda job: abs(job.size - batch[0].size))[: self._batch_size - 1]
        taken = set(map(id, batch))
        self._jobs = deque(job for job in waiting if id(job) not in taken)
        return batch

    def _deliver(self, batch: list[_Job[Key, Item, Result]], done: asyncio.Future[Sequence[Result]]) -> None:
        error = done.exception()
        waiting = [job for job in batch if not job.answer.done()]
        if error is None:
            for job, result in zip(batch, done.result(), strict=True):
                if not job.answer.done():
                    job.answer.set_result(result)
        elif len(batch) > 1:
            for job in reversed(waiting):
                job.alone = True
                self._jobs.appendleft(job)
        else:
            for job in waiting:
                job.answer.set_exception(error)
                with contextlib.suppress(asyncio.CancelledError):
                    job.answer.exception()  # seen: nobody may be left to ask for it


def _all_cancelled(batch: Sequence[_Job[Key, Item, Result]]) -> Callable[[], bool]:
    return lambda: all(job.answer.cancelled() for job in batch)

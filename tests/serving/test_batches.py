"""Batches: what runs together, what follows, who is left out, and what an error does to others."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from speechtune.serving.batches import QUIET_SECONDS, Batches


class Work:
    """Answers a number by its square, when it is let; a negative one is an error."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.free = threading.Event()
        self.stopped = False

    def __call__(self, key: str, items: Sequence[int], abandoned: Callable[[], bool]) -> list[int]:
        self.batches.append((key, list(items)))
        while not self.free.wait(0.01):
            if abandoned():
                self.stopped = True
                return [0] * len(items)
        if min(items) < 0:
            raise ValueError(f"{min(items)} is negative")
        return [item**2 for item in items]


def run(
    test: Callable[[Work, Batches[str, int, int]], Coroutine[Any, Any, None]],
    size: int = 3,
    quiet_seconds: float = QUIET_SECONDS,
) -> Work:
    work = Work()

    async def inside() -> None:
        batches = Batches(work, size, quiet_seconds=quiet_seconds)
        await asyncio.wait_for(test(work, batches), 20)
        work.free.set()
        await batches.close()

    asyncio.run(inside())
    return work


async def first_runs(work: Work) -> None:
    while not work.batches:
        await asyncio.sleep(0.001)


def test_what_arrives_while_a_batch_runs_is_the_next() -> None:
    async def test(work: Work, batches: Batches[str, int, int]) -> None:
        answers = [batches.submit("a", 1)]
        await first_runs(work)
        for key, item in (("a", 2), ("b", 3), ("a", 4), ("b", 5), ("a", 6), ("a", 7)):
            answers.append(batches.submit(key, item))
        assert len(batches) == 6
        work.free.set()
        assert await asyncio.gather(*answers) == [1, 4, 9, 16, 25, 36, 49]

    assert run(test).batches == [("a", [1]), ("a", [2, 4, 6]), ("b", [3, 5]), ("a", [7])]


@pytest.mark.parametrize(("size", "expected"), [(9, [[0, 1, 2, 3]]), (2, [[0, 1], [2, 3]])])
def test_an_idle_one_waits_until_no_more_come_or_a_batch_is_full(size: int, expected: list[list[int]]) -> None:
    """Requests that come one by one, each sooner than the quiet that it waits for."""

    async def test(work: Work, batches: Batches[str, int, int]) -> None:
        work.free.set()
        answers = []
        for item in range(4):
            answers.append(batches.submit("a", item))
            await asyncio.sleep(0.01)
        assert await asyncio.gather(*answers) == [0, 1, 4, 9]

    assert [items for _, items in run(test, size, quiet_seconds=0.5).batches] == expected


def test_who_keeps_coming_does_not_keep_a_batch_waiting() -> None:
    async def test(work: Work, batches: Batches[str, int, int]) -> None:
        work.free.set()
        first = batches.submit("a", 0)
        while not first.done():
            batches.submit("a", 1)
            await asyncio.sleep(0)

    run(test, 10**9, quiet_seconds=0.001)


def test_a_batch_is_of_like_size_and_the_oldest_is_in_it() -> None:
    async def test(work: Work, batches: Batches[str, int, int]) -> None:
        answers = [batches.submit("a", 1)]
        await first_runs(work)
        answers += [batches.submit("a", item, size) for item, size in ((2, 50), (3, 9), (4, 51), (5, 8), (6, 49))]
        work.free.set()
        assert await asyncio.gather(*answers) == [1, 4, 9, 16, 25, 36]

    assert run(test).batches == [("a", [1]), ("a", [2, 4, 6]), ("a", [3, 5])]


def test_who_left_is_left_out_and_a_batch_for_nobody_stops() -> None:
    async def test(work: Work, batches: Batches[str, int, int]) -> None:
        running = [batches.submit("a", 1)]
        await first_runs(work)
        left, stays = batches.submit("a", 2), batches.submit("a", 3)
        left.cancel()
        running[0].cancel()
        while not work.stopped:
            await asyncio.sleep(0.001)
        work.free.set()
        assert await stays == 9

    assert run(test).batches == [("a", [1]), ("a", [3])]


def test_an_error_is_that_of_its_own_request() -> None:
    async def test(work: Work, batches: Batches[str, int, int]) -> None:
        answers = [batches.submit("a", item) for item in (1, -2, 3)]
        later = batches.submit("a", 4)
        work.free.set()
        found = await asyncio.gather(*answers, return_exceptions=True)
        assert found[0] == 1 and found[2] == 9 and str(found[1]) == "-2 is negative"
        assert await later == 16

    assert run(test).batches == [("a", [1, -2, 3]), ("a", [1]), ("a", [-2]), ("a", [3]), ("a", [4])]


def test_calls_come_between_batches() -> None:
    async def test(work: Work, batches: Batches[str, int, int]) -> None:
        answer = batches.submit("a", 1)
        await first_runs(work)
        seen = asyncio.ensure_future(batches.call(lambda: (list(work.batches), threading.current_thread().name)))
        await asyncio.sleep(0.01)
        more = batches.submit("a", 2)
        assert not seen.done()
        work.free.set()
        assert (await seen)[0] == [("a", [1])] and (await seen)[1].startswith("model")
        assert [await answer, await more] == [1, 4]

    run(test)


def test_closing_answers_what_is_queued() -> None:
    async def test(work: Work, batches: Batches[str, int, int]) -> None:
        answers = [batches.submit("a", item) for item in range(1, 8)]
        work.free.set()
        await batches.close()
        assert [answer.result() for answer in answers] == [item**2 for item in range(1, 8)]
        assert batches.wait_seconds() >= 1

    work = Work()
    asyncio.run(_closing(work, test))


async def _closing(work: Work, test: Callable[..., Coroutine[Any, Any, None]]) -> None:
    await test(work, Batches(work, 3))


@pytest.mark.parametrize(("waiting", "seconds"), [(0, 1), (6, 3)])
def test_the_wait_that_is_told_grows_with_the_queue(waiting: int, seconds: int) -> None:
    async def test(work: Work, batches: Batches[str, int, int]) -> None:
        for item in range(waiting):
            batches.submit("a", item)
        assert batches.wait_seconds() == seconds  # a batch is taken to last a second before one was seen

    run(test)

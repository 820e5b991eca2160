"""When the watchdog calls a rank lost, two ranks in one process; killed ranks of real runs are in tests/distributed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from speechtune.errors import LostRankError
from speechtune.training import watchdog
from speechtune.training.watchdog import LOST_BEATS, QUICK_BEATS, Watchdog

SILENCE_SECONDS = 0.2


class Ranks:
    """As much of an accelerator as the watchdog asks for."""

    num_processes = 2

    def __init__(self, rank: int) -> None:
        self.process_index = rank

    def wait_for_everyone(self) -> None:
        pass


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """Two watchdogs that have seen each other once; their threads never run."""
    store = HashStore()
    monkeypatch.setenv("MASTER_ADDR", "node-a")
    monkeypatch.setenv("MASTER_PORT", "29500")
    dogs = [Watchdog(Ranks(rank), tmp_path, SILENCE_SECONDS, connect=lambda _: store) for rank in (0, 1)]  # type: ignore[arg-type]
    for dog in dogs:
        dog._store = store
        dog._write()
    for dog in dogs:
        dog._read()
    yield dogs[0], dogs[1]


def beats(dog: Any, other: Any | None, times: int) -> None:
    """Let both (or `dog` alone) write `times` beats, and `dog` read them."""
    for _ in range(times):
        for one in (dog, other):
            if one is not None:
                one._write()
        dog._read()


def test_ranks_that_beat_are_not_lost(pair: tuple[Any, Any]) -> None:
    beats(*pair, 3 * LOST_BEATS)
    assert pair[0]._lost(LOST_BEATS) == "" and pair[0]._lost(QUICK_BEATS) == ""


def test_silence_counts_from_its_limit_on(pair: tuple[Any, Any]) -> None:
    one, other = pair
    other.step = lambda: 7
    beats(one, other, 1)
    beats(one, None, LOST_BEATS - 1)
    assert one._lost(LOST_BEATS) == ""
    beats(one, None, 1)
    assert one._lost(LOST_BEATS).startswith("no sign of life for 0 s: rank 1 on ")
    assert one._lost(LOST_BEATS).endswith("was last seen at step 7")


def test_a_rank_that_is_done_is_not_lost(pair: tuple[Any, Any]) -> None:
    one, other = pair
    other._end = watchdog.DONE
    beats(one, other, 1)
    beats(one, None, 3 * LOST_BEATS)
    assert one._lost(LOST_BEATS) == ""


def test_a_rank_that_failed_is_quoted_after_a_few_beats(pair: tuple[Any, Any]) -> None:
    one, other = pair
    other._end = "OutOfMemoryError: 80 GiB"
    beats(one, other, 1)
    assert one._lost(LOST_BEATS) == ""
    beats(one, None, QUICK_BEATS)
    assert one._lost(LOST_BEATS).endswith("step 0, and ended with: OutOfMemoryError: 80 GiB")


def test_a_store_that_does_not_answer(pair: tuple[Any, Any]) -> None:
    _, other = pair
    other._unanswered = LOST_BEATS
    assert other._lost(LOST_BEATS).startswith("the launch's store at node-a:29500 has not answered for 0 s")
    assert "rank 0 on" in other._lost(LOST_BEATS)


def test_the_message_names_the_newest_checkpoint_that_was_finished(pair: tuple[Any, Any], tmp_path: Path) -> None:
    one, _ = pair
    assert "no checkpoint was saved yet" in one._message("x")
    for step, finished in ((5, True), (10, True), (15, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if finished:
            (folder / "MANIFEST.json").write_text(json.dumps({"files": []}))
    assert f"{tmp_path}/checkpoint-10 is the newest checkpoint" in one._message("x")
    assert "checkpoint.resume=auto" in one._message("x")


FAILURES = {
    "a closed connection": (RuntimeError("[pair.cc:538] Connection closed by peer [10.0.0.1]:1234"), True),
    "the model's own error": (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    "another kind": (OSError("Connection reset by peer"), False),
}


@pytest.mark.parametrize("case", FAILURES)
def test_only_a_failed_connection_is_blamed_on_a_lost_rank(case: str, pair: tuple[Any, Any]) -> None:
    error, others = FAILURES[case]
    one, _ = pair
    ends: list[tuple[float, int]] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(LostRankError if others else type(error)) as caught:
        patch.setattr(watchdog, "_end_in", lambda *end: ends.append(end))
        with one:
            raise error
    assert (LostRankError.exit_code in [code for _, code in ends]) is others
    assert ("rank 1" in str(caught.value)) is others


def test_one_rank_alone_watches_nothing(tmp_path: Path) -> None:
    class Alone(Ranks):
        num_processes = 1

    with Watchdog(Alone(0), tmp_path) as dog:  # type: ignore[arg-type]
        assert not hasattr(dog, "_store")

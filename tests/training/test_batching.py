"""Batching: the order of a run follows from (seed, epoch) alone, however the global batches are cut."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import numpy as np
import pytest

from speechtune.family import Family
from speechtune.training.batching import BatchPlan, StepBatches, cut_by_tokens, evaluation_batches
from speechtune.types import Batch, Encoded

CUTS = [(8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (2, 1, 4), (1, 2, 4)]


def plan(size: int = 21, batch_size: int = 8, accumulation: int = 1, world_size: int = 1, **values: Any) -> BatchPlan:
    lengths = np.random.default_rng(size).integers(50, 500, size)
    return BatchPlan(lengths, batch_size, accumulation, world_size, **values)


def cut(plan: BatchPlan, step: int) -> list[list[int]]:
    """All micro-batches of a step, in the order (micro-step, rank)."""
    per_rank = [plan.micro_batches(step, rank) for rank in range(plan.world_size)]
    return [per_rank[rank][micro] for micro in range(len(per_rank[0])) for rank in range(plan.world_size)]


@pytest.mark.parametrize("size", [1, 5, 8, 21, 64])
def test_each_epoch_visits_every_sample_once(size: int) -> None:
    """Also where a global batch spans epochs, or the set is smaller than one batch; nothing is dropped."""
    batches = plan(size, batch_size=8)
    epochs = 5
    stream = [index for step in range(batches.num_steps(epochs)) for index in batches.global_batch(step)]
    assert len(stream) >= epochs * size
    for epoch in range(epochs):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_epochs_differ_and_seeds_differ() -> None:
    batches = plan(size=16, batch_size=16)
    assert batches.global_batch(0) != batches.global_batch(1)
    assert batches.global_batch(0) != plan(size=16, batch_size=16, seed=43).global_batch(0)
    assert batches.global_batch(0) != list(range(16))


def test_the_order_is_the_same_whichever_step_is_asked_first() -> None:
    """A resume asks for step 40 first; it must get what a straight run gets there."""
    straight = [plan().global_batch(step) for step in range(60)]
    assert plan().global_batch(40) == straight[40]
    batches = plan()
    assert [batches.global_batch(step) for step in reversed(range(60))] == straight[::-1]


@pytest.mark.parametrize("group_by_length", [True, False])
@pytest.mark.parametrize(("batch_size", "accumulation", "world_size"), CUTS)
def test_a_global_batch_is_the_same_however_it_is_cut(
    batch_size: int, accumulation: int, world_size: int, group_by_length: bool
) -> None:
    uncut = plan()
    parts = plan(21, batch_size, accumulation, world_size, group_by_length=group_by_length)
    for step in range(9):
        assert parts.global_batch(step) == uncut.global_batch(step)
        micro_batches = cut(parts, step)
        assert {len(chosen) for chosen in micro_batches} == {batch_size}
        assert Counter(i for chosen in micro_batches for i in chosen) == Counter(uncut.global_batch(step))


def test_grouping_by_length_reorders_inside_the_global_batch_only() -> None:
    grouped, plain = plan(200, 4, 4, 2), plan(200, 4, 4, 2, group_by_length=False)
    padding = Counter[str]()
    for step in range(6):
        assert grouped.global_batch(step) == plain.global_batch(step)
        lengths = [int(grouped.lengths[i]) for chosen in cut(grouped, step) for i in chosen]
        assert lengths == sorted(lengths)
        assert [i for chosen in cut(plain, step) for i in chosen] == plain.global_batch(step)
        for name, batches in (("grouped", grouped), ("plain", plain)):
            for chosen in cut(batches, step):
                sizes = [int(batches.lengths[i]) for i in chosen]
                padding[name] += max(sizes) * len(sizes) - sum(sizes)
    assert padding["grouped"] < 0.5 * padding["plain"]


def test_samples_of_one_length_keep_a_fixed_order() -> None:
    """Ties broken by anything but the index would let two ranks see different cuts."""
    batches = BatchPlan(np.full(12, 7), batch_size=3, world_size=2)
    indices = [i for chosen in cut(batches, 0) for i in chosen]
    assert indices == sorted(indices)


@pytest.mark.parametrize(
    ("size", "epochs", "expected"),
    [(8, 1.0, 1), (9, 1.0, 2), (16, 3.0, 6), (21, 3.0, 8), (3, 0.1, 1), (80, 0.5, 5), (10, 0.8, 1), (24, 1 / 3, 1)],
)
def test_number_of_steps(size: int, epochs: float, expected: int) -> None:
    """Enough steps that every sample was seen `epochs` times; 1/3 of 24 samples is one batch of 8, not two."""
    batches = plan(size)
    assert batches.num_steps(epochs) == expected
    assert batches.epoch_at(expected) >= epochs - 1e-9
    assert expected == 1 or batches.epoch_at(expected - 1) < epochs


class CollatesIds:
    def collate(self, items: list[Encoded]) -> Batch:
        return Batch(tuple(item.sample_id for item in items), {}, {"audio": 1}, 1, 1.0)


@pytest.mark.parametrize("tokens", [None, 900])
@pytest.mark.parametrize("rank", [0, 1])
def test_an_item_holds_the_micro_batches_of_a_step(rank: int, tokens: int | None) -> None:
    """Item s is step s of the run, so that a loader can start anywhere."""
    encoded = [Encoded(f"s{i}", {}, 1, 1.0) for i in range(21)]
    batches = plan(21, batch_size=2, accumulation=3, world_size=2, tokens=tokens)
    items = StepBatches(batches, encoded, cast(Family, CollatesIds()), rank)
    for step in range(10):
        expected = [tuple(f"s{i}" for i in part) for part in batches.micro_batches(step, rank)]
        assert [batch.sample_ids for batch in items[step]] == expected
        assert tokens is not None or len(expected) == 3


# -- budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [500, 800, 2000, 100_000])
@pytest.mark.parametrize(("batch_size", "accumulation", "world_size"), CUTS)
def test_a_budget_cuts_the_same_global_batch(
    batch_size: int, accumulation: int, world_size: int, tokens: int, packed: bool
) -> None:
    """No sample lost, duplicated or over the budget; every rank has as many forward passes (DDP would hang)."""
    uncut = plan()
    parts = plan(21, batch_size, accumulation, world_size, tokens=tokens, packed=packed)
    for step in range(9):
        per_rank = [parts.micro_batches(step, rank) for rank in range(world_size)]
        assert len({len(micro_batches) for micro_batches in per_rank}) == 1
        cut_parts = cut(parts, step)
        assert Counter(i for part in cut_parts for i in part) == Counter(uncut.global_batch(step))
        for part in cut_parts:
            sizes = [int(parts.lengths[i]) for i in part]
            assert part and (sum(sizes) if packed else max(sizes) * len(sizes)) <= tokens


def test_a_budget_takes_few_and_even_parts() -> None:
    """Ranks wait for the one with most to do: parts differ by less than the longest sample."""
    lengths = np.random.default_rng(5).integers(100, 2000, 64)
    parts = cut_by_tokens(range(64), lengths, 8192, 2, packed=True)
    sums = [int(lengths[part].sum()) for part in parts]
    assert max(sums) <= 8192 and max(sums) - min(sums) < lengths.max() / 2
    assert len(parts) <= int(np.ceil(lengths.sum() / 8192)) + 2


def test_padding_counts_in_a_padded_budget() -> None:
    """Issues: a budget of real positions, which one long sample among short ones exceeds many times over."""
    lengths = np.array([1000, *[10] * 7])
    padded = cut_by_tokens(range(8), lengths, 1200, 1, packed=False)
    assert sorted(len(part) for part in padded) == [1, 7]
    assert len(cut_by_tokens(range(8), lengths, 1200, 1, packed=True)) == 1


def test_a_sample_over_the_budget_goes_alone() -> None:
    for packed in (True, False):
        assert [3] in cut_by_tokens(range(5), np.array([10, 20, 30, 5000, 40]), 100, 1, packed=packed)


@pytest.mark.parametrize("size", [1, 2, 7, 24])
@pytest.mark.parametrize("batch_size", [1, 4, 30])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_takes_every_sample_once(size: int, batch_size: int, world_size: int) -> None:
    """A sample evaluated twice, to fill up a rank, would move the mean; one left out as well."""
    lengths = np.random.default_rng(0).integers(1, 9, size)
    shares = [evaluation_batches(lengths, batch_size, rank, world_size) for rank in range(world_size)]
    assert sorted(i for share in shares for chosen in share for i in chosen) == list(range(size))
    assert max(len(chosen) for share in shares for chosen in share) <= batch_size

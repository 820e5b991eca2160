"""Learning rate by step: warm-up that starts above zero, the peak, the decay; against formulas and two libraries."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from speechtune.config import TrainConfig
from speechtune.training.loop import learning_rate

PEAK = 3e-4


def rates(total: int, **values: Any) -> list[float]:
    config = TrainConfig(learning_rate=PEAK, **values)
    return [learning_rate(step, total, config) for step in range(total)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 10, 1000])
@pytest.mark.parametrize("total", [1, 2, 3, 9, 10, 11, 250])
def test_every_rate_is_above_zero_and_the_peak_is_reached(schedule: str, warmup_steps: int, total: int) -> None:
    """A first step at rate 0 changes nothing, and would stop the run as "the optimizer step changed none"."""
    found = rates(total, schedule=schedule, warmup_steps=warmup_steps)
    assert min(found) > 0
    assert max(found) == pytest.approx(PEAK, rel=1e-12)


@pytest.mark.parametrize(("total", "asked", "used"), [(1000, 100, 100), (1000, 200, 100), (50, 100, 5), (5, 100, 1)])
def test_warm_up_is_linear_and_at_most_a_tenth_of_the_run(total: int, asked: int, used: int) -> None:
    found = rates(total, warmup_steps=asked)
    for step in range(used):
        assert found[step] == pytest.approx(PEAK * (step + 1) / used, rel=1e-12)
    assert found[used] == pytest.approx(PEAK, rel=1e-12)
    assert found[used + 1] < PEAK if used + 1 < total else True


def test_shapes_of_the_decay() -> None:
    total, warmup = 1000, 100
    left = total - warmup
    cosine, linear = rates(total), rates(total, schedule="linear")
    for step in (warmup, 101, 325, 550, 775, 999):
        passed = (step - warmup) / left
        assert cosine[step] == pytest.approx(PEAK * (1 + math.cos(math.pi * passed)) / 2, rel=1e-12)
        assert linear[step] == pytest.approx(PEAK * (1 - passed), rel=1e-12)
    assert cosine[550] == pytest.approx(PEAK / 2) and linear[550] == pytest.approx(PEAK / 2)
    assert 0 < cosine[-1] < linear[-1] < PEAK / 500
    assert rates(total, schedule="constant")[warmup:] == [PEAK] * left


@pytest.mark.parametrize(
    ("schedule", "library"), [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]
)
def test_the_decay_is_that_of_transformers(schedule: str, library: Any) -> None:
    """Theirs warms up from 0, ours from PEAK / warmup: from the end of the warm-up on they are the same."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = library(optimizer, num_warmup_steps=20, num_training_steps=200)
    found = rates(200, schedule=schedule, warmup_steps=20)
    for step in range(200):
        if step >= 20:
            assert found[step] == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_without_warm_up_the_cosine_is_that_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50)
    for rate in rates(50, warmup_steps=0):
        assert rate == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()

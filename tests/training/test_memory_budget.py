"""Budgets found by measuring, on a device whose memory is made up: what fits, what is chosen, what is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import DemoClip
from speechtune.cli import main
from speechtune.config import RunConfig
from speechtune.errors import TrainingError
from speechtune.training import memory_budget as budget
from speechtune.training.distributed import start_accelerator
from speechtune.training.job import Job
from speechtune.training.memory_budget import Fit, choose_budget, measure_budgets, settle_checkpointing
from speechtune.training.prepare import prepare
from speechtune.training.run import run_training

BYTES_PER_POSITION = 1000
FIXED = 50_000


@pytest.fixture
def config(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
    monkeypatch: pytest.MonkeyPatch,
) -> RunConfig:
    """Six short clips, three a step."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    short = sorted(demo_clips, key=lambda clip: clip.duration_seconds)[:6]
    return make_config(
        data={"train": write_chatml(tmp_path / "train.json", short)},
        lora={"rank": 4, "dropout": 0.1},
        train={"max_steps": 2, "batch_size": 3},
        evaluate={"enabled": False},
    )


@pytest.fixture
def job(config: RunConfig) -> Job:
    return prepare(config, start_accelerator(config))


def device_of(monkeypatch: pytest.MonkeyPatch, limit: int, out_of_memory: int | None = None) -> list[int]:
    """A device with `limit` bytes, each position taking some; above `out_of_memory` positions it raises."""
    seen: list[int] = []
    original = budget._one_pass

    def one_pass(objective: Any, batch: Any, device: torch.device) -> float:
        seen.append(sum(batch.lengths))
        if out_of_memory is not None and seen[-1] > out_of_memory:
            raise torch.OutOfMemoryError("none left")
        return original(objective, batch, device)

    monkeypatch.setattr(budget, "_one_pass", one_pass)
    monkeypatch.setattr(budget.Memory, "start", lambda self: None)
    monkeypatch.setattr(budget.Memory, "peak", lambda self: FIXED + seen[-1] * BYTES_PER_POSITION)
    monkeypatch.setattr(budget.Memory, "limit", lambda self: limit)
    return seen


@pytest.mark.parametrize("raises", [False, True], ids=["measured over", "out of memory"])
def test_the_largest_budget_lies_near_the_limit(raises: bool, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last doubling that fits and the first that does not; an overfull device is survived."""
    longest, most = int(job.train_set.lengths.max()), sum(sorted(job.train_set.lengths.tolist())[-3:])
    room = (longest + most) // 2
    moments = budget._moments(job)
    assert moments == 2 * sum(p.numel() * 4 for p in job.model.parameters() if p.requires_grad)
    device_of(monkeypatch, FIXED + moments + room * BYTES_PER_POSITION, room if raises else None)
    results = measure_budgets(job)
    fitting = [fit for fit in results if fit.peak_bytes is not None]
    assert len(fitting) < len(results) and results == sorted(results, key=lambda fit: fit.tokens)
    assert longest <= max(fit.tokens for fit in fitting) <= room


def test_budgets_end_at_what_a_step_can_use(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    device_of(monkeypatch, 10**12)
    results = measure_budgets(job)
    most = sum(sorted(job.train_set.lengths.tolist())[-3:])
    assert results[-1].tokens > 0.8 * most and all(fit.tokens < most for fit in results[:-1])
    assert all(fit.peak_bytes is not None and fit.samples >= 1 and fit.seconds > 0 for fit in results)


def test_nothing_fits(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    device_of(monkeypatch, 1000)
    with pytest.raises(TrainingError, match=r"the longest sample \(\d+ positions\) does not fit"):
        measure_budgets(job)


def test_measuring_leaves_weights_gradients_and_random_state(job: Job) -> None:
    """A run with `auto` must be the run with the number that auto finds."""
    before = {name: tensor.clone() for name, tensor in job.model.state_dict().items()}
    state = torch.get_rng_state()
    results = measure_budgets(job)
    assert all(torch.equal(before[name], tensor) for name, tensor in job.model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in job.model.parameters())
    assert all(0 < (fit.peak_bytes or 0) < 2**40 for fit in results)


def test_a_smaller_budget_nearly_as_fast_is_taken() -> None:
    def fit(tokens: int, speed: float, peak: int | None = 1) -> Fit:
        return Fit(tokens, 1, 1.0, tokens / speed, peak)

    assert choose_budget([fit(512, 80), fit(1024, 99), fit(2048, 100)]).tokens == 1024
    assert choose_budget([fit(512, 80), fit(1024, 90), fit(2048, 100)]).tokens == 2048
    assert choose_budget([fit(512, 80), fit(1024, 500, None)]).tokens == 512


def test_auto_trains_as_the_number_it_finds(config: RunConfig, tmp_path: Path) -> None:
    def run(name: str, tokens: Any) -> tuple[RunConfig, dict[str, torch.Tensor]]:
        batch = config.batch.model_copy(update={"tokens": tokens})
        outcome = run_training(config.model_copy(update={"output_dir": tmp_path / name, "batch": batch}))
        state = outcome.job.model.state_dict()
        return outcome.job.config, {key: value.clone() for key, value in state.items() if "lora_" in key}

    found, automatic = run("auto", "auto")
    assert isinstance(found.batch.tokens, int)
    _, by_number = run("number", found.batch.tokens)
    assert all(torch.equal(automatic[name], by_number[name]) for name in by_number)


@pytest.mark.parametrize("enough", [True, False])
def test_activations_are_kept_where_they_fit(enough: bool, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` for a micro-batch of three samples of the longest's length."""
    train = job.config.train.model_copy(update={"gradient_checkpointing": "auto"})
    asked = replace(job, config=job.config.model_copy(update={"train": train}))
    room = sum(sorted(job.train_set.lengths.tolist())[-3:])
    seen = device_of(monkeypatch, FIXED + budget._moments(job) + (room - (0 if enough else 500)) * BYTES_PER_POSITION)
    settled = settle_checkpointing(asked, 1, lambda fits: fits)
    assert settled.config.train.gradient_checkpointing is (not enough)
    assert bool(getattr(job.model, "is_gradient_checkpointing", False)) is (not enough)
    assert max(seen) <= room


def test_fit_says_what_the_run_will_take(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And leaves no run directory behind."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml(), encoding="utf-8")
    assert main(["fit", str(recipe), "--json", "--price-per-hour", "3.5"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["steps"] == 2 and answer["tokens"] <= answer["largest_tokens"]
    assert answer["cost"] == pytest.approx(3.5 * answer["hours"])
    longest = max(fit["tokens"] for fit in answer["measured"])
    assert 0 < answer["hours"] * 3600 * answer["tokens_per_second"] <= 2 * longest
    assert not config.output_dir.exists()
    assert main(["fit", str(recipe)]) == 0
    shown = capsys.readouterr().out
    assert "for the complete run" in " ".join(shown.split()) and "batch.tokens=" in shown

"""What the loop is fed, and steps that do not fit the memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from speechtune.errors import ConfigError, TrainingError
from speechtune.families import build_config
from speechtune.training.batching import BatchLoader, BatchPlan
from speechtune.types import Batch, Encoded

SIZES = [300, 120, 80, 500, 220, 90, 400, 60]
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


class Numbers:
    """A family that collates nothing but lengths."""

    def collate(self, items: list[Encoded]) -> Batch:
        sizes = tuple(item.num_tokens for item in items)
        return Batch(tuple(item.sample_id for item in items), {}, {"audio": 1}, sum(sizes), 1.0, sizes)


class Samples(list[Encoded]):
    family = Numbers()


def loader(world_size: int = 1, **batch: Any) -> BatchLoader:
    values = {"model": {"path": "base"}, "train": {"batch_size": 8 // world_size, "workers": 0}, "batch": batch}
    config = build_config({"family": "higgs_audio_v2", **values}, "test")
    samples: Any = Samples(Encoded(f"s{i}", {}, size, 1.0) for i, size in enumerate(SIZES))
    return BatchLoader(config, BatchPlan.of(config, np.array(SIZES), world_size), samples, 0, torch.device("cpu"))


def ids(batches: list[Batch]) -> list[str]:
    return sorted(sample_id for batch in batches for sample_id in batch.sample_ids)


def test_steps_come_in_order_and_from_anywhere() -> None:
    """After a resume the first step asked for is not the first of the run."""
    straight, later = loader(tokens=600), loader(tokens=600)
    wanted = [[batch.sample_ids for batch in straight.take(step)] for step in range(6)]
    assert [[batch.sample_ids for batch in later.take(step)] for step in (4, 5, 1)] == [wanted[i] for i in (4, 5, 1)]


def test_out_of_memory_says_what_to_set() -> None:
    one = loader(tokens=1000)
    batches = one.take(0)
    with pytest.raises(TrainingError) as caught:
        one.cut_finer(0, batches, FULL)
    message, largest = str(caught.value), max(sum(batch.lengths) for batch in batches)
    full = next(batch for batch in batches if sum(batch.lengths) == largest)
    for part in (
        "step 1",
        f"{largest} positions",
        f"batch.tokens={largest // 2}",
        "resume=auto",
        "2 GiB",
        *full.sample_ids[:3],
    ):
        assert part in message


def test_a_halved_budget_holds_for_the_step_and_all_after() -> None:
    one = loader(on_oom="halve")
    before = one.take(3)
    finer = one.cut_finer(3, before, FULL)
    assert ids(finer) == ids(before) and len(finer) > len(before)
    half = sum(sum(batch.lengths) for batch in before) // 2
    assert all(sum(batch.lengths) <= half or len(batch.lengths) == 1 for batch in [*finer, *one.take(4)])


def test_halving_ends_at_single_samples() -> None:
    one = loader(on_oom="halve")
    batches = one.take(0)
    for _ in range(8):
        if all(len(batch.sample_ids) == 1 for batch in batches):
            break
        batches = one.cut_finer(0, batches, FULL)
    with pytest.raises(TrainingError, match=r"one sample already.*gradient_checkpointing"):
        one.cut_finer(0, batches, FULL)


def test_a_sample_longer_than_the_budget_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"batch\.tokens=450: sample s3 alone takes 500 positions"):
        loader(tokens=450)


def test_halving_is_refused_on_several_ranks() -> None:
    with pytest.raises(ConfigError, match=r"batch\.on_oom=halve is for one rank"):
        loader(world_size=2, on_oom="halve")


def test_a_run_out_of_memory_goes_on_and_ends_at_the_same_weights(
    make_config: Callable[..., Any],
    write_chatml: Callable[..., Path],
    demo_clips: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device that holds 700 positions: with halving, the run of one that holds all; without, a clear end.

    With dropout: the step that failed has drawn random numbers, and must not have drawn them for the one taken again.
    """
    from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
    from speechtune.training.run import run_training

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    losses = HiggsAudioV2Family.losses
    rows = write_chatml(tmp_path / "train.json", sorted(demo_clips, key=lambda clip: clip.duration_seconds)[:4])
    limit = [10**9]

    def limited(self: Any, model: torch.nn.Module, batch: Batch) -> Any:
        found = losses(self, model, batch)
        if sum(batch.lengths) > limit[0]:
            raise torch.OutOfMemoryError("out of memory in a test")
        return found

    monkeypatch.setattr(HiggsAudioV2Family, "losses", limited)

    def run(name: str, **batch: Any) -> dict[str, Any]:
        config = make_config(
            output_dir=tmp_path / name,
            data={"train": rows},
            lora={"rank": 4, "dropout": 0.1},
            train={"max_steps": 3, "batch_size": 4, "learning_rate": 5e-3},
            batch=batch,
            evaluate={"enabled": False},
            tracking={"trackers": ()},
        )
        state = run_training(config).job.model.state_dict()
        return {key: tensor.clone() for key, tensor in state.items() if "lora_" in key}

    longest = 1200
    plain = run("plain", tokens=longest)
    limit[0] = longest // 2
    with pytest.raises(TrainingError, match="out of memory on cpu"):
        run("stopped", tokens=longest)
    halved, finer = run("halved", tokens=longest, on_oom="halve"), run("finer", tokens=longest // 2)
    assert all(torch.equal(halved[name], finer[name]) for name in finer)
    assert any(not torch.equal(plain[name], finer[name]) for name in finer)  # dropout is drawn per micro-batch

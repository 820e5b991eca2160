"""One training, however it is run: accumulated, on two ranks, or stopped and resumed, it ends at the same weights.

Real speech, the tiny base, float32. "The same" is to the bit for a resume, and within 1e-6 where sums are taken in
another order (the adapters move by more than 1e-2).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import WAIT_SECONDS, train
from runs import (
    SCRIPT,
    STEPS,
    TOLERANCE,
    Configure,
    assert_same_to_the_bit,
    child_environment,
    curve,
    greatest_difference,
    run_on_two_ranks,
    weights,
)

from speechtune.config import RunConfig
from speechtune.errors import CheckpointError, ConfigError
from speechtune.families.higgs_audio_v2 import tiny
from speechtune.storage.verified_folder import find_checkpoints, newest_valid

WITH_DROPOUT = {"lora": {"dropout": 0.1}, "train": {"batch_size": 4, "accumulation": 2}}


@pytest.fixture(scope="module")
def straight_with_dropout(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with dropout 0.1 and two accumulated micro-batches of 4."""
    output = tmp_path_factory.mktemp("straight-with-dropout") / "output"
    train(configure(output, WITH_DROPOUT))
    return output


# -- cut in another way --------------------------------------------------------------------------------------------


def test_the_plain_run_learns(straight: Path) -> None:
    """Else all that follows would compare runs in which nothing happens."""
    losses = list(curve(straight).values())
    assert losses[-1] < losses[0] - 0.5
    moved = [
        float(tensor.abs().max()) for name, tensor in weights(straight / "lora_adapters").items() if "lora_B" in name
    ]
    assert max(moved) > 1e-2


CUTS = {
    "4 x 2 accumulated": {"train": {"batch_size": 4, "accumulation": 2}},
    "1 x 8 accumulated": {"train": {"batch_size": 1, "accumulation": 8}},
    "not grouped by length": {"train": {"batch_size": 2, "accumulation": 4, "group_by_length": False}},
    "gradient checkpointing": {"train": {"gradient_checkpointing": True}, "evaluate": {"batch_size": 3}},
    "budgets": {"batch": {"tokens": 1000}},
    "padded": {"batch": {"packing": False}},
    "padded budgets": {"batch": {"packing": False, "tokens": 1500}},
    "native forward": {"speed": {"fast_forward": False}, "train": {"batch_size": 4, "accumulation": 2}},
    "padded, native forward": {"speed": {"fast_forward": False}, "batch": {"packing": False}},
    "checkpointing in the native forward": {
        "speed": {"fast_forward": False},
        "train": {"gradient_checkpointing": True},
    },
}
PLAIN = {"batch": {"packing": False}, "speed": {"fast_forward": False}}
BUDGET = {"batch": {"tokens": 1000}}


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_into_micro_batches_changes_nothing(
    cut: str, configure: Configure, straight: Path, tmp_path: Path
) -> None:
    """Means of means weigh a short clip as much as a long one: with sums over counts the cut does not matter."""
    output = tmp_path / "output"
    train(configure(output, CUTS[cut]))
    assert greatest_difference(output, straight) < TOLERANCE
    assert curve(output) == pytest.approx(curve(straight), rel=1e-6)
    assert curve(output, "eval_loss") == pytest.approx(curve(straight, "eval_loss"), rel=1e-6)


def test_the_environment_of_accelerate_launch_changes_nothing(
    configure: Configure, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It exports the answers of `accelerate config`; taken up, they would train an fp32 plan in bfloat16."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(configure(tmp_path / "output"))
    assert_same_to_the_bit(tmp_path / "output", straight, STEPS)


@pytest.mark.slow
def test_two_ranks_equal_one_process(configure: Configure, straight: Path, tmp_path: Path) -> None:
    """Gradients, losses and evaluation span the ranks; a signal to one rank ends all; a resume goes on exactly.

    Calling the inner model past DDP lets the ranks drift apart by 7e-2 without an error; a barrier after the process
    group was destroyed ended every run on two ranks with a traceback.
    """
    four, dropout = {"train": {"batch_size": 4}}, {"lora": {"dropout": 0.1}}
    plain, stopped, from_one = (tmp_path / name for name in ("plain", "stopped", "from-one-process"))
    train(configure(from_one), step=3)
    says = run_on_two_ranks(
        tmp_path,
        {
            "plain": (configure(plain, four), None),
            "with dropout": (configure(tmp_path / "dropout", four, dropout), None),
            "stopped": (configure(stopped, four, dropout), 3),
            "resumed": (configure(stopped, four, dropout), None),
            "resumed from one process": (configure(from_one, four), None),
        },
    )
    assert says.pop("stopped") == [{"step": 3, "signal": signal.SIGTERM, "finished": False}] * 2
    assert all(say == {"step": STEPS, "signal": None, "finished": True} for both in says.values() for say in both)
    for output in (plain, from_one):
        assert greatest_difference(output, straight) < TOLERANCE
        assert curve(output) == pytest.approx(curve(straight), rel=1e-6)
    assert curve(plain, "eval_loss") == pytest.approx(curve(straight, "eval_loss"), rel=1e-6)
    assert_same_to_the_bit(stopped, tmp_path / "dropout", STEPS)


# -- stopped and resumed -------------------------------------------------------------------------------------------


def test_stopped_and_resumed_is_the_straight_run(configure: Configure, straight: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    stopped = train(configure(output), step=3)
    assert stopped.result.signal == signal.SIGTERM and stopped.result.state.step == 3
    assert not (output / "lora_adapters").exists() and not (output / "summary.json").exists()
    assert newest_valid(output)[0] == output / "checkpoint-3"
    resumed = train(configure(output))
    assert resumed.result.signal is None and resumed.result.state.step == STEPS
    assert_same_to_the_bit(output, straight, STEPS)


@pytest.mark.parametrize("way", [PLAIN, BUDGET], ids=["padded and native", "budgets"])
def test_a_resume_is_exact_whichever_way_it_is_computed(
    way: dict[str, Any], configure: Configure, tmp_path: Path
) -> None:
    """The defaults, packed and fast, are resumed all over this file; here the others, with dropout."""
    train(configure(tmp_path / "straight", WITH_DROPOUT, way))
    for step in (3, None):
        train(configure(tmp_path / "stopped", WITH_DROPOUT, way), step=step)
    assert_same_to_the_bit(tmp_path / "stopped", tmp_path / "straight", STEPS)


def test_a_resume_may_take_another_budget(configure: Configure, straight: Path, tmp_path: Path) -> None:
    """Who ran out of memory goes on with a smaller one: the samples of a step, and so the run, are the same."""
    output = tmp_path / "output"
    train(configure(output), step=3)
    train(configure(output, {"batch": {"tokens": 900}}))
    assert greatest_difference(output, straight) < TOLERANCE
    assert curve(output) == pytest.approx(curve(straight), rel=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_dropout_goes_on_where_it_was(
    workers: int, configure: Configure, straight_with_dropout: Path, tmp_path: Path
) -> None:
    """A DataLoader without a generator of its own draws from the global one when it starts, and shifts all dropout."""
    output, more = tmp_path / "output", {"train": {"workers": workers}}
    train(configure(output, WITH_DROPOUT, more), step=3)
    train(configure(output, WITH_DROPOUT, more))
    assert_same_to_the_bit(output, straight_with_dropout, STEPS)


def test_dropout_is_really_on(straight: Path, straight_with_dropout: Path) -> None:
    assert greatest_difference(straight, straight_with_dropout) > 1e-3


@pytest.mark.slow
def test_sigterm_from_outside(configure: Configure, straight_with_dropout: Path, tmp_path: Path) -> None:
    """The command line, with a collating process; the signal goes to the whole group, as service managers send it.

    A collating process that dies of it takes the run along: "DataLoader worker is killed by signal: Terminated".
    """
    recipe = tmp_path / "recipe.yaml"
    config = configure(tmp_path / "output", WITH_DROPOUT, {"train": {"workers": 1}})
    recipe.write_text(config.to_yaml(), encoding="utf-8")
    child = subprocess.Popen(
        [sys.executable, str(SCRIPT), "cli", str(recipe), "3"],
        env=child_environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + WAIT_SECONDS
    while not (tmp_path / "reached").exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGTERM)
    time.sleep(0.3)  # time for a collating process to die, if it does
    (tmp_path / "go").touch()
    _, errors = child.communicate(timeout=WAIT_SECONDS)
    assert child.returncode == 128 + signal.SIGTERM, errors[-3000:]
    assert "SIGTERM: finishing this step, then saving and stopping" in errors
    assert "stopped at step 3; go on with checkpoint.resume=auto" in errors
    assert not (tmp_path / "output" / "lora_adapters").exists()
    train(config)
    assert_same_to_the_bit(tmp_path / "output", straight_with_dropout, STEPS)


def crash() -> None:
    raise RuntimeError("the machine is gone")


def test_a_crash_and_a_torn_checkpoint_cost_steps_and_nothing_else(
    configure: Configure, straight: Path, tmp_path: Path
) -> None:
    """The torn checkpoint of a step that is reached again gives way to a sound one, and so do the records after it.

    No evaluation here: neither it nor its checkpoints may change what is trained.
    """
    output, plain = tmp_path / "output", {"evaluate": {"enabled": False}}
    with pytest.raises(RuntimeError, match="machine is gone"):
        train(configure(output, plain), step=6, action=crash)
    assert list(curve(output)) == [1, 2, 3, 4, 5]
    os.truncate(output / "checkpoint-4" / "optimizer.pt", 1000)
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "epo')
    train(configure(output, plain))
    assert [step for step, _ in find_checkpoints(output)] == [2, 4, 6]
    assert_same_to_the_bit(output, straight, STEPS)


def test_pruning_does_not_count_a_torn_checkpoint(configure: Configure, tmp_path: Path) -> None:
    """A torn checkpoint of a later step, passed over by the resume, must not push out the sound ones."""
    output, plain = tmp_path / "output", {"evaluate": {"enabled": False}}
    with pytest.raises(RuntimeError, match="machine is gone"):
        train(configure(output, plain), step=5, action=crash)
    (output / "checkpoint-4" / "adapter_model.safetensors").unlink()
    train(configure(output, plain, {"checkpoint": {"keep_last": 1}}), step=1)
    assert newest_valid(output)[0] == output / "checkpoint-3"


def test_a_finished_run_resumed_stays_as_it_is(configure: Configure, straight: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    shutil.copytree(straight, output)
    outcome = train(configure(output))
    assert outcome.result.state.step == STEPS and outcome.proof.lora_b_moved == outcome.proof.lora_b_total
    assert_same_to_the_bit(output, straight, STEPS)


def test_full_fine_tuning_resumes_as_well(configure: Configure, tmp_path: Path) -> None:
    full = {"lora": {"enabled": False}, "train": {"batch_size": 2, "max_steps": 4, "learning_rate": 1e-3}}
    for name, step in (("straight", None), ("stopped", 2), ("stopped", None)):
        train(configure(tmp_path / name, full), step=step)
    ours, theirs = (weights(tmp_path / name / "checkpoint-4") for name in ("stopped", "straight"))
    assert ours.keys() == theirs.keys() and len(ours) > 30
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert Counter(curve(tmp_path / "stopped")) == Counter(curve(tmp_path / "straight"))


# -- refused -------------------------------------------------------------------------------------------------------


def changed_data(config: RunConfig, folder: Path) -> dict[str, Any]:
    rows = json.loads(config.data.train.read_text())  # type: ignore[union-attr]
    rows[3]["misc"]["ref_transcript"] += " indeed"
    for item in rows[3]["messages"][1]["content"][:1]:
        item["text"] += " indeed"
    (folder / "changed.json").write_text(json.dumps(rows))
    return {"data": {"train": folder / "changed.json"}}


def changed_base(config: RunConfig, folder: Path) -> dict[str, Any]:
    tiny.make_model(folder / "another-model", seed=1)
    return {"model": {"path": str(folder / "another-model")}}


CHANGES: dict[str, tuple[Callable[[RunConfig, Path], dict[str, Any]], str]] = {
    "one text of the data": (changed_data, "dataset: checkpoint '"),
    "the base's weights": (changed_base, "base: checkpoint '"),
    "rank": (lambda config, folder: {"lora": {"rank": 8}}, "lora: checkpoint {'rank': 4"),
    "targets": (lambda config, folder: {"lora": {"targets": "attention"}}, "lora: checkpoint {'rank': 4"),
    "batch size": (lambda config, folder: {"train": {"batch_size": 4}}, "global_batch: checkpoint 8, this run 4"),
    "seed": (lambda config, folder: {"train": {"seed": 1}}, "seed: checkpoint 42, this run 1"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_into_another_run_is_refused(
    change: str, configure: Configure, straight: Path, tmp_path: Path
) -> None:
    """The difference is named, and what lies there stays."""
    make, expected = CHANGES[change]
    output = tmp_path / "output"
    shutil.copytree(straight, output)
    before = {path: path.read_bytes() for path in output.rglob("*.safetensors")}
    with pytest.raises(CheckpointError) as caught:
        train(configure(output, make(configure(output), tmp_path), {"train": {"max_steps": 8}}))
    message = str(caught.value)
    assert "checkpoint-6: it is not a checkpoint of this run" in message and expected in message
    assert caught.value.exit_code == 3
    assert {path: path.read_bytes() for path in output.rglob("*.safetensors")} == before
    assert curve(output) == curve(straight)


def test_a_resume_by_force_is_a_run_of_its_own_from_there_on(
    configure: Configure, straight: Path, tmp_path: Path
) -> None:
    """Forced onto other data once, it goes on with that data; what it saves must not claim the data before."""
    output = tmp_path / "output"
    shutil.copytree(straight, output)
    more = {**changed_data(configure(output), tmp_path), "train": {"max_steps": 9}}
    train(configure(output, more, {"checkpoint": {"force": True}}), step=1)
    assert newest_valid(output)[0] == output / "checkpoint-7"
    outcome = train(configure(output, more))
    assert outcome.result.state.step == 9 and list(curve(output)) == list(range(1, 10))


def test_a_new_run_into_an_old_folder_is_refused(configure: Configure, straight: Path) -> None:
    """It would prune the old run's checkpoints, and mix two runs in one metrics.jsonl."""
    with pytest.raises(
        ConfigError, match=r"holds the checkpoints of an earlier run.*checkpoint\.resume=auto"
    ) as caught:
        train(configure(straight, {"checkpoint": {"resume": None}}))
    assert str(straight) in str(caught.value) and caught.value.exit_code == 2
    assert list(curve(straight)) == list(range(1, STEPS + 1)) and len(find_checkpoints(straight)) == 3

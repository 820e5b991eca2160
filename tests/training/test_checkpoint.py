"""What a checkpoint holds, bit for bit there and back; what a resume refuses; and how a signal ends a run."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from speechtune.config import RunConfig
from speechtune.errors import AdapterError, CheckpointError
from speechtune.export.extract import extract
from speechtune.export.find import find_adapters
from speechtune.export.verify import verify_adapter
from speechtune.families import create_family
from speechtune.inference.load import open_adapter
from speechtune.lora.apply import apply_lora, model_tensors, trainable
from speechtune.lora.files import adapter_folder
from speechtune.lora.save import save_lora_adapters
from speechtune.precision import plan_precision
from speechtune.storage.verified_folder import verify_folder
from speechtune.tensors import rng_state
from speechtune.training.checkpoint import RunParts, RunState, Saver, checkpoint_writer, choose_checkpoint, restore
from speechtune.training.loop import Interruption

IDENTITY = {"dataset": "d1", "base": "b1", "lora": {"rank": 4, "targets": "x"}, "seed": 42, "global_batch": 8}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "rslora": {"rank": 4, "rslora": True},
    "dora": {"rank": 4, "dora": True},
    "with a module in full": {"rank": 4, "modules_to_save": ("audio_lm_head",)},
    "full fine-tuning": {"enabled": False},
}


class Trained:
    """A model with an optimizer that has taken a few steps of made-up gradients."""

    def __init__(self, config: RunConfig, steps: int = 0) -> None:
        family = create_family(config)
        plan = plan_precision(full_finetune=not config.lora.enabled, device=torch.device("cpu"))
        self.model: nn.Module = family.load(plan)
        if config.lora.enabled:
            self.model = apply_lora(self.model, family, config.lora, seed=1)
        self.optimizer = torch.optim.AdamW(list(trainable(self.model).values()), lr=1e-3)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        for _ in range(steps):
            self.step()

    def step(self) -> None:
        for parameter in trainable(self.model).values():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()

    def parts(self) -> RunParts:
        return RunParts(self.model, self.optimizer, self.scaler, "family: x\n", {"README.md": "card"})

    def writer(self, directory: Path, step: int = 3, copy: bool | None = None) -> Callable[[], Path]:
        """What the loop makes: usually with an adapter a copy of this moment, else a view of the live model."""
        state = RunState(step=step, total_steps=9, epoch=0.5, identity=IDENTITY)
        copy = isinstance(self.model, PeftModel) if copy is None else copy
        return checkpoint_writer(directory, self.parts(), state, [rng_state()], copy=copy)

    def save(self, directory: Path, copy: bool | None = None) -> Path:
        return self.writer(directory, copy=copy)()

    def restore(
        self, directory: Path, identity: dict[str, Any] = IDENTITY, rank: int = 0, force: bool = False
    ) -> RunState:
        return restore(directory, self.parts(), identity, rank, force=force)

    def everything(self) -> dict[str, torch.Tensor]:
        """Copies of all weights and of the optimizer's state."""
        tensors = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{number} {name}": value.clone() for name, value in state.items()}
        return tensors


@pytest.fixture
def trained(make_config: Callable[..., RunConfig]) -> Callable[..., Trained]:
    return lambda steps=0, **lora: Trained(make_config(lora=lora or {"rank": 4}), steps)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_checkpoint_comes_back_bit_for_bit(
    kind: str, copy: bool, tmp_path: Path, trained: Callable[..., Trained]
) -> None:
    """Weights of every kind of adapter, Adam's moments and step, and the random state: the next step is the same."""
    torch.manual_seed(5)
    first = trained(3, **ADAPTERS[kind])
    folder = first.save(tmp_path / "checkpoint-3", copy)
    saved = first.everything()
    first.step()
    second = trained(0, **ADAPTERS[kind])
    assert any(not torch.equal(second.everything()[name], saved[name]) for name in second.model.state_dict())
    torch.manual_seed(99)
    state = second.restore(folder)
    assert state.step == 3 and dict(state.identity) == IDENTITY
    assert differing(second.everything(), saved) == []
    second.step()
    assert differing(second.everything(), first.everything()) == []


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_checkpoint_verifies_and_holds_what_is_trained(
    kind: str, tmp_path: Path, trained: Callable[..., Trained]
) -> None:
    """With LoRA no part of the base is stored: a checkpoint of a 5 B model must not take 11 GB."""
    one = trained(1, **ADAPTERS[kind])
    folder = one.save(tmp_path / "checkpoint-3")
    assert verify_folder(folder) == []
    expected = {id(parameter) for parameter in one.model.parameters() if parameter.requires_grad}
    pointers = {parameter.data_ptr(): id(parameter) for parameter in one.model.parameters()}
    stored = {pointers[tensor.data_ptr()] for tensor in model_tensors(one.model).values() if tensor.numel()}
    assert stored == expected
    weights = "model.safetensors" if kind == "full fine-tuning" else "adapter_model.safetensors"
    assert {weights, "trainer_state.json", "optimizer.pt", "rng_state.pt", "config.yaml"} <= set(os.listdir(folder))


def test_the_save_of_a_checkpoint_tells_what_the_final_one_tells(
    tmp_path: Path, trained: Callable[..., Trained], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against checkpoints of which only a name is logged; `tracking.log_saves` is the level's switch."""
    monkeypatch.setattr(logging.getLogger("speechtune"), "propagate", True)
    one = trained(1)
    with caplog.at_level(logging.INFO, "speechtune.saving"):
        folder = one.save(tmp_path / "run" / "checkpoint-3")
        of_checkpoint = caplog.messages[:]
        caplog.clear()
        save_lora_adapters(one.model, tmp_path / "other" / "lora_adapters", save_embedding_layers=False)
    kinds = ("Model to save type", "Adapter:", "Output directory", "Write test passed", "  adapter_", "Verified")
    for kind in kinds:
        told, final = ([line for line in lines if line.startswith(kind)] for lines in (of_checkpoint, caplog.messages))
        assert len(told) == len(final) > 0, kind
        if kind in ("Adapter:", "  adapter_", "Verified"):
            assert told == final
    assert f"  optimizer.pt  {(folder / 'optimizer.pt').stat().st_size} bytes" in of_checkpoint
    with caplog.at_level(logging.WARNING, "speechtune.saving"):
        caplog.clear()
        one.save(tmp_path / "run" / "checkpoint-4")
    assert caplog.messages == []


def test_adapters_inside_a_checkpoint_are_understood(tmp_path: Path, trained: Callable[..., Trained]) -> None:
    """Guards against "no such folder" for the place that the original's documents name."""
    folder = trained(1).save(tmp_path / "checkpoint-3")
    inside = folder / "lora_adapters"
    assert open_adapter(inside).directory == folder and adapter_folder(inside) == folder
    assert choose_checkpoint(tmp_path, str(inside)) == folder
    assert find_adapters(inside) == find_adapters(folder)
    assert verify_adapter(inside).valid
    extract(inside, tmp_path / "extracted", alpha=8)
    inside.mkdir()  # where it is there, it is meant
    with pytest.raises(AdapterError):
        open_adapter(inside)


@pytest.mark.parametrize("copy", [True, False])
def test_buffers_of_a_module_trained_in_full_are_saved(copy: bool, tmp_path: Path) -> None:
    """Issue: they were missing from what a save was given, and the module came back with the statistics of the base."""
    stack = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model = get_peft_model(cast(Any, stack), LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    model.train()(torch.randn(8, 4))
    optimizer = torch.optim.AdamW(trainable(model).values())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    parts, state = RunParts(model, optimizer, scaler), RunState(1, 1, 1.0, {})
    folder = checkpoint_writer(tmp_path / "checkpoint-1", parts, state, [rng_state()], copy=copy)()
    (mean,) = (t for name, t in load_file(folder / "adapter_model.safetensors").items() if "running_mean" in name)
    assert torch.equal(mean, cast(Any, model.base_model.model)[1].modules_to_save["default"].running_mean)
    assert mean.abs().max() > 0


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("kind", [kind for kind in ADAPTERS if kind != "full fine-tuning"])
def test_a_save_beside_the_training_holds_the_moment_it_was_asked_for(
    kind: str, tmp_path: Path, trained: Callable[..., Trained]
) -> None:
    """The loop goes on while a checkpoint is written; no later step may get into it."""
    one = trained(2, **ADAPTERS[kind])
    asked, random = one.everything(), torch.get_rng_state()
    publish = one.writer(tmp_path / "checkpoint-3")
    one.step()
    assert differing(one.everything(), asked)
    folder = publish()
    assert verify_folder(folder) == []
    one.restore(folder)
    assert differing(one.everything(), asked) == [] and torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_save_ends_the_run(background: bool) -> None:
    """At the next look, the next save, or the end; once, and never later than that."""

    def fail() -> None:
        raise CheckpointError("the disk is gone")

    done: list[int] = []
    for look in (lambda saver: saver.wait(), lambda saver: saver.submit(lambda: done.append(1))):
        with pytest.raises(CheckpointError, match="the disk is gone"), Saver(background) as saver:
            saver.submit(fail)
            look(saver)
    assert done == []
    with Saver(background) as saver:
        for number in range(5):
            saver.submit(lambda number=number: done.append(number))  # type: ignore[misc]
            saver.poll()
        saver.wait()
        assert done == [0, 1, 2, 3, 4]
        saver.wait()


def test_what_a_resume_refuses(tmp_path: Path, trained: Callable[..., Trained]) -> None:
    folder = trained(1).save(tmp_path / "checkpoint-3")
    for name, value in (("dataset", "d2"), ("base", "b2"), ("lora", {"rank": 8}), ("global_batch", 16)):
        fresh = trained()
        before = fresh.everything()
        with pytest.raises(CheckpointError) as caught:
            fresh.restore(folder, {**IDENTITY, name: value})
        message = str(caught.value)
        assert str(folder) in message and f"{name}: checkpoint {IDENTITY[name]!r}, this run {value!r}" in message
        assert caught.value.exit_code == 3
        assert "checkpoint.force=true" in message
        assert differing(fresh.everything(), before) == []


def test_all_differences_are_named_at_once(tmp_path: Path, trained: Callable[..., Trained]) -> None:
    folder = trained(1).save(tmp_path / "checkpoint-3")
    with pytest.raises(CheckpointError, match=r"dataset: checkpoint 'd1', this run 'd2'; seed: checkpoint 42, this"):
        trained().restore(folder, {**IDENTITY, "dataset": "d2", "seed": 1})


def test_force_turns_differences_into_warnings(
    tmp_path: Path, trained: Callable[..., Trained], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("speechtune"), "propagate", True)
    one = trained(1)
    folder, saved = one.save(tmp_path / "checkpoint-3"), one.everything()
    another = trained()
    another.restore(folder, {**IDENTITY, "dataset": "d2", "seed": 1}, force=True)
    assert differing(another.everything(), saved) == []
    assert "dataset: checkpoint 'd1', this run 'd2'" in caplog.text and "seed: checkpoint 42" in caplog.text
    with pytest.raises(CheckpointError, match="its tensors are not those"):
        trained(0, rank=8).restore(folder, {**IDENTITY, "lora": {"rank": 8}}, force=True)


def test_tensors_of_another_adapter_are_refused(tmp_path: Path, trained: Callable[..., Trained]) -> None:
    """Also where the identity does not tell: an adapter of other modules, or of another rank."""
    folder = trained(1, rank=4, targets="attention").save(tmp_path / "checkpoint-3")
    with pytest.raises(CheckpointError, match="its tensors are not those of this run's model"):
        trained(0, rank=4, targets="all").restore(folder)
    with pytest.raises(CheckpointError):
        trained(0, rank=8, targets="attention").restore(folder)


def test_a_rank_that_was_not_there_is_told(
    tmp_path: Path, trained: Callable[..., Trained], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("speechtune"), "propagate", True)
    folder = trained(1).save(tmp_path / "checkpoint-3")
    trained().restore(folder, rank=1)
    assert "random states of 1 ranks: dropout differs" in caplog.text


def test_which_checkpoint_a_run_goes_on_from(
    tmp_path: Path, trained: Callable[..., Trained], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("speechtune"), "propagate", True)
    caplog.set_level(logging.INFO, "speechtune")
    assert choose_checkpoint(tmp_path, None) is None and choose_checkpoint(tmp_path, "auto") is None
    assert f"nothing to resume in {tmp_path}" in caplog.text
    good, torn = trained(1).save(tmp_path / "checkpoint-3"), trained(1).save(tmp_path / "checkpoint-6")
    assert choose_checkpoint(tmp_path, "auto") == torn
    (torn / "optimizer.pt").unlink()
    assert choose_checkpoint(tmp_path, "auto") == good
    assert f"resume passes over {torn}: optimizer.pt: missing" in caplog.text
    assert choose_checkpoint(tmp_path, str(good)) == good
    with pytest.raises(CheckpointError, match=r"checkpoint-6: cannot resume from it: optimizer\.pt: missing"):
        choose_checkpoint(tmp_path, str(torn))
    with pytest.raises(CheckpointError, match=r"nowhere: cannot resume from it"):
        choose_checkpoint(tmp_path, str(tmp_path / "nowhere"))


def test_a_branch_off_an_earlier_checkpoint_is_refused(tmp_path: Path, trained: Callable[..., Trained]) -> None:
    """Guards against `auto` taking the abandoned branch's checkpoint-6 for the end of a run begun anew from step 3."""
    early, late = trained(1).save(tmp_path / "checkpoint-3"), trained(1).writer(tmp_path / "checkpoint-6", step=6)()
    with pytest.raises(CheckpointError, match=r"holds later checkpoints \(checkpoint-6\)"):
        choose_checkpoint(tmp_path, str(early))
    (late / "optimizer.pt").unlink()  # what does not verify is no branch to mix up with
    assert choose_checkpoint(tmp_path, str(early)) == early


# -- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with Interruption() as interruption:
        assert interruption.signal == 0
        signal.raise_signal(number)
        assert interruption.signal == number
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_second_signal_leaves_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Interruption():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("the second signal was swallowed")
    assert signal.getsignal(signal.SIGINT) == before


def test_the_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError), Interruption():
        raise ValueError
    assert signal.getsignal(signal.SIGTERM) == before

"""LoRACheckpointCallback in a plain transformers.Trainer: what it saves, and the failures it does not let pass."""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from speechtune import LoRACheckpointCallback
from speechtune.errors import AdapterError, CheckpointError, ConfigError, TrainingError
from speechtune.storage.verified_folder import verify_folder

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from lora_saving_example import SENTENCES, collate, make_base  # pyright: ignore[reportMissingImports]


def make_model(**settings: Any) -> PeftModel:
    config = LoraConfig(r=2, lora_alpha=4, **{"target_modules": ["q_proj", "v_proj"], **settings})
    torch.manual_seed(2)
    return get_peft_model(make_base(), config)  # pyright: ignore[reportReturnType]


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A Trainer of six steps that saves every second one; keywords are TrainingArguments."""

    def make(
        model: nn.Module,
        *callbacks: TrainerCallback,
        kind: type[Trainer] = Trainer,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> Trainer:
        options = {
            "output_dir": str(tmp_path / "output"),
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        return kind(
            model=model,
            args=TrainingArguments(**(options | kwargs)),
            train_dataset=list(SENTENCES),  # pyright: ignore[reportArgumentType]
            eval_dataset=list(SENTENCES),  # pyright: ignore[reportArgumentType]
            data_collator=collate,
            callbacks=list(callbacks),
            optimizers=(optimizer, None),
        )

    return make


class At(TrainerCallback):
    """Calls `act(model)` at one event; from step `step` on, counted as that event sees it."""

    def __init__(self, event: str, act: Callable[[nn.Module], object], step: int = 0) -> None:
        def handle(args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            if state.global_step >= step:
                act(kwargs["model"])

        setattr(self, event, handle)


def plant(mark: str, value: float = math.nan) -> Callable[[nn.Module], None]:
    """Write a value into one element of the first parameter with this name."""

    def act(model: nn.Module) -> None:
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if mark in name).view(-1)[0] = value

    return act


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**collate(list(SENTENCES))).logits


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(get_peft_model_state_dict(model))


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# -- what it leaves ------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **batch: torch.Tensor) -> Any:
        return self.inner(**batch)


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper], ids=["PeftModel", "wrapper"])
def test_verified_adapters_in_every_checkpoint_and_at_the_end(
    wrap: Callable[[nn.Module], nn.Module], make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    model, seen = make_model(), []
    trainer = make_trainer(wrap(model), At("on_save", lambda _: seen.append(state_of(model))), LoRACheckpointCallback())
    trainer.train()
    output = tmp_path / "output"
    for step, state in zip((2, 4, 6), seen, strict=True):
        folder = output / f"checkpoint-{step}" / "lora_adapters"
        assert verify_folder(folder) == [] and equal(load_file(folder / "adapter_model.safetensors"), state)
    assert verify_folder(output / "lora_adapters") == []
    assert equal(load_file(output / "lora_adapters" / "adapter_model.safetensors"), state_of(model))
    loaded = PeftModel.from_pretrained(make_base(), str(output / "lora_adapters"))
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(model), logits(make_base()))
    assert not seen or not equal(seen[0], seen[-1])


def test_a_resumed_run_equals_a_straight_one(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    straight = make_model()
    make_trainer(straight, LoRACheckpointCallback()).train()
    resumed = make_model()
    trainer = make_trainer(resumed, LoRACheckpointCallback())
    trainer.train(resume_from_checkpoint=str(tmp_path / "output" / "checkpoint-4"))
    assert list(resumed.peft_config) == ["default"] and resumed.active_adapters == ["default"]
    assert equal(state_of(resumed), state_of(straight))
    assert verify_folder(tmp_path / "output" / "lora_adapters") == []


def test_the_best_adapters_are_the_final_ones(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    trainer = make_trainer(
        make_model(), LoRACheckpointCallback(), eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    trainer.train()
    best = Path(str(trainer.state.best_model_checkpoint)) / "lora_adapters" / "adapter_model.safetensors"
    final = tmp_path / "output" / "lora_adapters" / "adapter_model.safetensors"
    assert equal(load_file(best), load_file(final)) and equal(load_file(final), state_of(trainer.model))  # pyright: ignore


def test_a_warm_up_from_zero_is_no_issue(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """The first step's learning rate is 0 then: nothing moves, and the first checkpoint is untrained."""
    trainer = make_trainer(
        make_model(), LoRACheckpointCallback(), lr_scheduler_type="linear", warmup_steps=2, save_steps=1, max_steps=3
    )
    trainer.train()
    assert trainer.state.log_history[0]["learning_rate"] == 0.0
    assert all(verify_folder(folder) == [] for folder in tmp_path.glob("output/checkpoint-*/lora_adapters"))
    assert len(list(tmp_path.glob("output/checkpoint-*/lora_adapters"))) == 3


def test_a_failing_save_ends_the_training(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    block = At("on_save", lambda _: (tmp_path / "output" / "checkpoint-2" / "lora_adapters").write_text("in the way"))
    with pytest.raises(CheckpointError, match="a file stands where a folder should be"):
        make_trainer(make_model(), block, LoRACheckpointCallback("warn")).train()
    assert not (tmp_path / "output" / "lora_adapters").exists()


# -- "loss 0.0 for 120 steps" --------------------------------------------------------------------------------------


def half_precision() -> PeftModel:
    model = make_model()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    return model


def test_a_plain_trainer_shows_nan_as_loss_zero(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """What this callback exists for: with float16 adapters and AdamW the loss is NaN, and the log says 0.0.

    The fused AdamW, which is the default now, computes in float32 and gets away with it.
    """
    model = half_precision()
    trainer = make_trainer(model, save_strategy="no", optim="adamw_torch")
    trainer.train()  # no error
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 4 and losses[1:] == [0.0] * 5
    assert all(bool(p.isnan().any()) for name, p in model.named_parameters() if "lora_B" in name)
    model.save_pretrained(str(tmp_path / "garbage"))  # no error either
    assert (tmp_path / "garbage" / "adapter_model.safetensors").exists()


def test_with_the_callback_it_does_not_start(make_trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(TrainingError, match=r"before step 1: 8 trainable parameters are half precision.*float32"):
        make_trainer(half_precision(), LoRACheckpointCallback()).train()


def test_with_warnings_only_it_is_named_and_never_saved(
    make_trainer: Callable[..., Trainer], tmp_path: Path, said: list[str]
) -> None:
    trainer = make_trainer(half_precision(), LoRACheckpointCallback("warn"), optim="adamw_torch")
    with pytest.raises(AdapterError, match="hold NaN or infinity"):
        trainer.train()
    assert trainer.args.logging_nan_inf_filter is False
    text = "\n".join(said)
    for part in (
        "NaN loss as 0.0: switched off",
        "before step 1: 8 trainable parameters are half precision",
        "step 1: the optimizer step left 8 parameters that are not finite",
        "step 2: the gradient norm is nan",
        "step 2: the logged 'loss': loss is nan",
    ):
        assert part in text, text
    assert not list(tmp_path.glob("output/**/lora_adapters"))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Messages of the speechtune logger, also where a test before has set it up for the command line."""
    log, lines = logging.getLogger("speechtune"), []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    monkeypatch.setattr(log, "handlers", [Keep()])
    monkeypatch.setattr(log, "level", logging.INFO)
    log.manager._clear_cache()  # pyright: ignore[reportAttributeAccessIssue]  # it remembers which levels are on
    return lines


# -- issues while training --------------------------------------------------------------------------------------------


class WithLoss(Trainer):
    """A Trainer whose loss passes through `change`."""

    change: Callable[[torch.Tensor], torch.Tensor]

    def compute_loss(self, model: nn.Module, inputs: Any, **kwargs: Any) -> torch.Tensor:  # pyright: ignore
        return type(self).change(super().compute_loss(model, inputs, **kwargs))  # pyright: ignore[reportArgumentType]


def with_loss(change: Callable[[torch.Tensor], torch.Tensor]) -> type[Trainer]:
    return type("Changed", (WithLoss,), {"change": staticmethod(change)})


def unfreeze(mark: str) -> PeftModel:
    model = make_model()
    next(p for name, p in model.named_parameters() if mark in name).requires_grad_(True)
    return model


def frozen() -> PeftModel:
    model = make_model()
    model.requires_grad_(False)
    return model


ISSUES: dict[str, tuple[Callable[[], nn.Module], list[TrainerCallback], type[Trainer], str]] = {
    "everything frozen": (frozen, [], Trainer, "before step 1: nothing is trainable"),
    "base trainable": (lambda: unfreeze("lm_head"), [], Trainer, "before step 1: 1 parameters of the base.*lm_head"),
    "NaN in an adapter": (
        make_model,
        [At("on_optimizer_step", plant("layers.1.self_attn.v_proj.lora_B"), 2)],
        Trainer,
        r"step 3: the optimizer step left 1 parameters .*layers.1.self_attn.v_proj.lora_B\S* holds NaN",
    ),
    "NaN in the base": (
        make_model,
        [At("on_step_begin", plant("embed_tokens"), 2)],
        Trainer,
        "step 3: the gradient norm",
    ),
    "no gradients": (make_model, [], with_loss(lambda loss: loss * 0), "step 1: all gradients are zero"),
    "NaN loss": (make_model, [], with_loss(lambda loss: loss + math.nan), "step 1: the logged 'loss': loss is nan"),
    "loss 0.0": (
        make_model,
        [],
        with_loss(lambda loss: loss - loss.detach()),
        "step 1: the logged 'loss': .*exactly 0.0",
    ),
    "NaN in evaluation": (
        make_model,
        [At("on_step_end", plant("embed_tokens"), 2)],
        Trainer,
        "step 2: the logged 'eval_loss': loss is nan",
    ),
    "nothing moves": (
        make_model,
        [At("on_optimizer_step", plant("nowhere"), 99), At("on_optimizer_step", lambda model: zero_lora_b(model))],
        Trainer,
        "step 1: the optimizer step changed none of the 4",
    ),
}


def zero_lora_b(model: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()


@pytest.mark.parametrize("name", ISSUES)
def test_an_issue_stops_the_training_at_its_step(
    name: str, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    make, planted, kind, message = ISSUES[name]
    trainer = make_trainer(
        make(), *planted, LoRACheckpointCallback(), kind=kind, eval_strategy="steps", eval_steps=2, save_steps=3
    )
    with pytest.raises(TrainingError, match=message):
        trainer.train()
    assert not list(tmp_path.glob("output/**/lora_adapters"))


def test_a_frozen_model_trains_with_a_normal_loss_without_the_callback(make_trainer: Callable[..., Trainer]) -> None:
    """With gradient checkpointing no error comes: the loss looks right, and only grad_norm 0.0 tells."""
    model = make_model()
    model.enable_input_require_grads()
    model.requires_grad_(False)
    trainer = make_trainer(model, save_strategy="no", gradient_checkpointing=True)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["loss"] > 4 and entry["grad_norm"] == 0.0 for entry in logs) and len(logs) == 6

    with pytest.raises(TrainingError, match="nothing is trainable"):
        make_trainer(model, LoRACheckpointCallback(), gradient_checkpointing=True).train()


def copied(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in copy.deepcopy(model).parameters() if p.requires_grad]


def half_of(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad][:4]


@pytest.mark.parametrize(
    ("held", "message"),
    [(copied, "holds 8 parameters that are not the model's, and misses 8 of"), (half_of, "holds 0 .* misses 4 of")],
)
def test_an_optimizer_of_another_object_is_caught(
    held: Callable[[nn.Module], list[nn.Parameter]], message: str, make_trainer: Callable[..., Trainer]
) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(held(model), lr=1e-2)
    with pytest.raises(TrainingError, match=f"before step 1: the optimizer {message}"):
        make_trainer(model, LoRACheckpointCallback(), optimizer=optimizer).train()


def test_with_warnings_only_another_object_s_adapter_is_never_saved_as_trained(
    make_trainer: Callable[..., Trainer], tmp_path: Path, said: list[str]
) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(copied(model), lr=1e-2)
    with pytest.raises(AdapterError, match="never trained"):
        make_trainer(model, LoRACheckpointCallback("warn"), optimizer=optimizer, save_strategy="no").train()
    assert any("the optimizer step changed none of the 4 trainable parameters" in line for line in said)
    assert sum("changed none" in line for line in said) == 3  # then only the count at the end
    assert "the training had 6 issues of the kind check_moved" in said
    assert not (tmp_path / "output" / "lora_adapters").exists()


def test_a_model_without_lora_does_not_start(make_trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(AdapterError, match=r"got LlamaForCausalLM.*get_peft_model was never applied"):
        make_trainer(make_base(), LoRACheckpointCallback()).train()


def test_a_learning_rate_of_zero_ends_without_an_adapter(make_trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(AdapterError, match="never trained"):
        make_trainer(make_model(), LoRACheckpointCallback(), learning_rate=0.0).train()


def test_adapters_that_no_signal_reaches_are_named(make_trainer: Callable[..., Trainer], said: list[str]) -> None:
    base = make_base()
    base.unused = nn.Linear(4, 4)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "unused"]))
    make_trainer(model, LoRACheckpointCallback()).train()
    assert "step 1: 2 of 3 lora_B moved" in said
    assert any("no training signal reached" in line and "unused.lora_B" in line for line in said)


def test_overflow_under_a_loss_scaler_is_left_to_it() -> None:
    """float16 autocast needs a GPU; the event is called as the Trainer would there."""
    callback, model = LoRACheckpointCallback(), make_model()
    callback._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in callback._parameters.values():
        parameter.grad = torch.full_like(parameter, math.inf)
    groups = [{"lr": 1e-3, "params": []}]
    state, args, control = TrainerState(), TrainingArguments(report_to="none", use_cpu=True), TrainerControl()
    scaled = SimpleNamespace(param_groups=groups, scaler=object(), step_was_skipped=True)
    callback.on_pre_optimizer_step(args, state, control, optimizer=scaled)
    callback.on_step_end(args, state, control, optimizer=scaled)  # nothing moved: the step was skipped
    with pytest.raises(TrainingError, match="the gradient norm is"):
        callback.on_pre_optimizer_step(args, state, control, optimizer=SimpleNamespace(param_groups=groups))


def test_another_word_for_on_issue_is_refused() -> None:
    with pytest.raises(ConfigError, match="on_issue='ignore'"):
        LoRACheckpointCallback("ignore")  # pyright: ignore[reportArgumentType]


def test_a_warm_start_that_changes_nothing_is_no_success(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    """Its lora_B are not zero to begin with: only their beginning tells that nothing was learnt."""
    with pytest.raises(AdapterError, match=r"has the weights it began with: .* changed none of its lora_B"):
        make_trainer(make_model(init_lora_weights=False), LoRACheckpointCallback(), learning_rate=0.0).train()
    assert not (tmp_path / "output" / "lora_adapters").exists()
    make_trainer(make_model(init_lora_weights=False), LoRACheckpointCallback()).train()
    assert (tmp_path / "output" / "lora_adapters").exists()

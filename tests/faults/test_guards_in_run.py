"""Every guard provoked in a real run: it stops with exit code 4, names what it saw, and leaves no sign of success.

The issues are put where they come from in life: into the model, the loss, the data or the configuration, never into the
guard. Where no configuration can cause one, a thin wrapper around the real family or around `apply_lora` does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import speechtune.training.prepare
from helpers import DemoClip
from speechtune.cli import main as command_line
from speechtune.config import RunConfig
from speechtune.errors import ConfigError, TrainingError
from speechtune.families import create_family
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
from speechtune.family import Family
from speechtune.lora.apply import apply_lora, plain_model, trainable
from speechtune.precision import PrecisionPlan
from speechtune.storage.verified_folder import find_checkpoints, verify_folder
from speechtune.training.distributed import start_accelerator
from speechtune.training.loop import Run
from speechtune.training.prepare import prepare
from speechtune.training.run import run_training
from speechtune.types import Batch, Encoded, Losses, Sample

NewFamily = Callable[[RunConfig], Family]
RARE = "#"  # put into the text of one clip only


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """Also where there is a GPU: another precision and order of sums would be another test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture
def configure(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
) -> Callable[..., RunConfig]:
    """Six short clips, three steps of batches of two; sections given are laid over it."""
    short = sorted(demo_clips, key=lambda clip: clip.duration_seconds)[:6]

    def build(**sections: Any) -> RunConfig:
        sections.setdefault("data", {"train": write_chatml(tmp_path / "train.json", short)})
        defaults = {"max_steps": 3, "batch_size": 2, "learning_rate": 1e-3}
        sections["train"] = defaults | sections.get("train", {})
        sections.setdefault("checkpoint", {"every_steps": 1})
        return make_config(**{"lora": {"rank": 2, "dropout": 0.0}} | sections)

    return build


def stopped(
    config: RunConfig,
    *parts: str,
    family: Callable[[RunConfig], Family] = create_family,
    checkpoints: Sequence[int] = (),
) -> str:
    """Run; it must stop with a TrainingError that holds all `parts`, and leave only sound, earlier checkpoints."""
    with pytest.raises(TrainingError) as caught:
        run_training(config, family(config))
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    assert caught.value.exit_code == 4
    found = find_checkpoints(config.output_dir)
    assert [step for step, _ in found] == list(checkpoints)
    assert all(verify_folder(path) == [] for _, path in found)
    for success in ("lora_adapters", "summary.json", "trainer_state.json"):
        assert not (config.output_dir / success).exists(), f"{success} says that the run succeeded"
    return message


def use_after_lora(monkeypatch: pytest.MonkeyPatch, change: Callable[[nn.Module], object]) -> None:
    def apply_and_change(*arguments: Any) -> nn.Module:
        model = apply_lora(*arguments)
        change(model)
        return model

    monkeypatch.setattr(speechtune.training.prepare, "apply_lora", apply_and_change)


class InvalidLoss(HiggsAudioV2Family):
    """The real losses, changed by `issue` from the step `first_step` on (one forward pass a step)."""

    def __init__(
        self, config: RunConfig, issue: Callable[[nn.Module, torch.Tensor], torch.Tensor], first_step: int = 1
    ):
        super().__init__(config)
        self.issue, self.passes_left = issue, first_step - 1

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        sums = dict(super().losses(model, batch).sums)
        self.passes_left -= 1
        if self.passes_left < 0:
            sums = {head: self.issue(model, value) for head, value in sums.items()}
        return Losses(sums)


# -- what is trainable ---------------------------------------------------------------------------------------------


def test_everything_frozen_by_the_configuration(configure: Callable[..., RunConfig]) -> None:
    stopped(configure(lora={"enabled": False}, train={"freeze": ".*"}), "nothing is trainable", "frozen")


def test_an_adapter_that_was_frozen(configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """`PeftModel.from_pretrained` gives one like it unless asked for a trainable one."""
    use_after_lora(monkeypatch, lambda model: model.requires_grad_(False))
    stopped(configure(), "nothing is trainable")


def test_a_base_that_is_trained_along(configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume that forgot to freeze the base trained all of it, and saved an adapter that fitted nothing."""
    use_after_lora(monkeypatch, lambda model: plain_model(model).model.norm.requires_grad_(True))
    stopped(configure(), "1 parameters of the base", "base_model.model.model.norm.weight", "modules_to_save")


def test_trainable_parameters_in_half_precision(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_after_lora(monkeypatch, lambda model: model.half())
    message = stopped(configure(), "lora_A.default.weight is torch.float16", "keep trainable parameters in float32")
    assert "28 trainable parameters" in message and "and 23 more" in message


def test_modules_to_save_are_trained_in_float32(configure: Callable[..., RunConfig]) -> None:
    """PEFT keeps them in the base's bfloat16, so that the guard above refused the option on every GPU."""
    config = configure(lora={"rank": 2, "modules_to_save": ["audio_lm_head"]}, train={"precision": "bf16"})
    outcome = run_training(config)
    parameters = trainable(outcome.job.model)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert any("modules_to_save" in name for name in parameters)


# -- losses --------------------------------------------------------------------------------------------------------


class BrokenEmbedding(HiggsAudioV2Family):
    """A base with one NaN: in the embedding of a letter that few samples hold."""

    def load(self, plan: PrecisionPlan) -> nn.Module:
        model = super().load(plan)
        letter = self.tokenizer(RARE, add_special_tokens=False)["input_ids"][0]
        with torch.no_grad():
            plain_model(model).get_input_embeddings().weight[letter, 0] = float("nan")
        return model


def add_rare_letter(manifest: Path, row: int) -> Path:
    """Put the letter into the target text of one row (from 1)."""
    rows = json.loads(manifest.read_text(encoding="utf-8"))
    user, assistant = (message["content"] for message in rows[row - 1]["messages"][1:])
    user[2]["text"] += RARE
    assistant[0]["text"] += RARE
    rows[row - 1]["misc"]["target_transcript"] += RARE
    manifest.write_text(json.dumps(rows), encoding="utf-8")
    return manifest


@pytest.mark.parametrize(("batch_size", "accumulation", "named"), [(1, 6, 1), (2, 3, 2), (6, 1, 6)])
def test_a_nan_in_the_base_names_the_samples_it_meets(
    batch_size: int,
    accumulation: int,
    named: int,
    configure: Callable[..., RunConfig],
) -> None:
    """Of all micro-batches of the step only that with the letter is named: there one looks first."""
    config = configure(train={"batch_size": batch_size, "accumulation": accumulation})
    add_rare_letter(config.data.train, 4)  # type: ignore[arg-type]
    message = stopped(config, "step 1: the audio loss is nan", "samples of the step: ", family=BrokenEmbedding)
    ids = message.rpartition("samples of the step: ")[2]
    assert ids == "train-4" if named == 1 else True
    assert ("train-4" in ids and ids.count("train-") == named) or "and 1 more" in ids


def test_a_nan_in_a_later_step_leaves_the_checkpoints_before(configure: Callable[..., RunConfig]) -> None:
    stopped(
        configure(),
        "step 3: the audio loss is nan",
        "train-",
        checkpoints=[1, 2],
        family=partial(InvalidLoss, issue=lambda model, value: value * float("nan"), first_step=3),
    )


def test_a_nan_in_evaluation_only(configure: Callable[..., RunConfig]) -> None:
    """A first evaluation of NaN is below nothing and nothing is below it: the "best" checkpoint for ever after."""
    config = configure(evaluate={"every_steps": 2})
    held_out = config.output_dir.parent / "eval.json"
    shutil.copy(config.data.train, held_out)  # type: ignore[arg-type]
    config = configure(data={"train": config.data.train, "eval": held_out}, evaluate={"every_steps": 2, "prompts": 0})
    add_rare_letter(held_out, 2)
    stopped(config, "evaluation after step 2: the audio loss is nan", "eval-", checkpoints=[1], family=BrokenEmbedding)


def test_a_loss_of_exactly_zero(configure: Callable[..., RunConfig]) -> None:
    """The original pipeline answered every exception with a loss of zero, and trained on."""
    stopped(
        configure(),
        "step 1: the audio and text loss is exactly 0.0",
        "train-",
        family=partial(InvalidLoss, issue=lambda model, value: value * 0.0),
    )


# -- gradients -----------------------------------------------------------------------------------------------------


def test_a_loss_cut_off_from_the_model(configure: Callable[..., RunConfig]) -> None:
    """Detached: the loss is real, looks well, and teaches nothing."""
    stopped(
        configure(),
        "step 1",
        "carries no gradient: it does not reach any trainable",
        "train-",
        family=partial(InvalidLoss, issue=lambda model, value: value.detach()),
    )


def test_gradients_of_zero(configure: Callable[..., RunConfig]) -> None:
    def detached(model: nn.Module, value: torch.Tensor) -> torch.Tensor:
        return value.detach() + 0.0 * torch.stack([p.sum() for p in trainable(model).values()]).sum()

    stopped(
        configure(),
        "step 2: all gradients are zero",
        "train-",
        checkpoints=[1],
        family=partial(InvalidLoss, issue=detached, first_step=2),
    )


def test_a_finite_loss_with_gradients_that_are_not(configure: Callable[..., RunConfig]) -> None:
    """The root of a sum of squares at zero: its value is 0, its derivative 0 / 0."""

    def add_norm(model: nn.Module, value: torch.Tensor) -> torch.Tensor:
        (weight,) = (p for name, p in trainable(model).items() if "layers.1.self_attn.v_proj.lora_B" in name)
        return value + weight.square().sum().sqrt()

    message = stopped(
        configure(),
        "step 1: the gradient norm is nan",
        "in 1 parameters",
        "train-",
        family=partial(InvalidLoss, issue=add_norm),
    )
    assert "layers.1.self_attn.v_proj.lora_B.default.weight" in message


def test_adapters_where_the_loss_does_not_pass(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A base saved without its text head has no text loss: nothing passes the text FFN of its last layer."""
    config = configure(lora={"rank": 2, "targets": "all"})
    headless = tmp_path / "headless"
    shutil.copytree(config.model.path, headless)
    weights = load_file(headless / "model.safetensors")
    del weights["text_lm_head.weight"]
    save_file(weights, headless / "model.safetensors", metadata={"format": "pt"})
    config = configure(
        lora={"rank": 2, "targets": "all"}, model={"path": str(headless), "codec_path": config.model.codec_path}
    )
    message = stopped(config, "step 1: no gradient reached 3 lora_B", "narrow lora.targets")
    for part in ("gate", "up", "down"):
        assert f"layers.1.mlp.{part}_proj.lora_B" in message
    assert "layers.0" not in message and "audio_mlp" not in message


def test_a_rate_too_small_to_change_a_float(configure: Callable[..., RunConfig]) -> None:
    stopped(configure(train={"learning_rate": 1e-46}), "step 1: the optimizer step changed none of the 28 trainable")


def test_an_optimizer_that_holds_other_parameters(configure: Callable[..., RunConfig]) -> None:
    """As after `model = get_peft_model(model)` behind an optimizer that was made before it."""
    config = configure()
    accelerator = start_accelerator(config)
    run = Run(prepare(config, accelerator), accelerator)
    strangers = [nn.Parameter(torch.ones(3))]
    run.optimizer = torch.optim.AdamW(strangers)
    with pytest.raises(TrainingError, match=r"step 1: the optimizer step changed none.*hold other parameters"):
        run.train()
    assert find_checkpoints(config.output_dir) == []


def test_a_base_that_changes_in_training(configure: Callable[..., RunConfig]) -> None:
    """Buffers or weights written to in a forward pass: the adapter would belong to a base that nobody has."""

    def write(model: nn.Module, value: torch.Tensor) -> torch.Tensor:
        plain_model(model).model.norm.weight.data[0] += 1e-3
        return value

    stopped(
        configure(),
        "the frozen base changed during training",
        checkpoints=[1, 2, 3],
        family=partial(InvalidLoss, issue=write),
    )


def test_kernels_that_cannot_run_here_are_refused_before_encoding(
    configure: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speechtune.training.prepare, "encode_sets", lambda *_: pytest.fail("hours of encoding began"))
    with pytest.raises(ConfigError, match=r"speed\.liger: Liger's kernels need a GPU"):
        run_training(configure(speed={"liger": True}))


# -- data ----------------------------------------------------------------------------------------------------------


class WithoutTargets(HiggsAudioV2Family):
    """Labels of one sample all masked, as a wrong start_index or a turn cut short leaves them."""

    def encode(self, sample: Sample, features: Sequence[np.ndarray]) -> Encoded:
        encoded = super().encode(sample, features)
        if sample.id != "train-2":
            return encoded
        masked = {"audio_targets": np.full_like(encoded.arrays["audio_targets"], -100)}
        return replace(encoded, arrays={**encoded.arrays, **masked})


def test_a_batch_without_targets(configure: Callable[..., RunConfig]) -> None:
    """The native class answers it with a loss of NaN."""
    config = configure(train={"batch_size": 1, "accumulation": 6})
    stopped(config, "step 1: no target for audio in the batch of samples train-2", family=WithoutTargets)


def test_a_weight_for_a_head_that_is_not_there(configure: Callable[..., RunConfig]) -> None:
    """A misspelt head would be trained with weight 1, and the recipe would say something else."""
    with pytest.raises(ConfigError, match=r"train\.head_weights.*'speech'.*audio, text"):
        run_training(configure(train={"head_weights": {"speech": 2.0, "text": 0.5}}))


# -- on the command line -------------------------------------------------------------------------------------------


def test_the_command_line_ends_with_4_and_one_message(
    configure: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(configure(train={"learning_rate": 1e-46}).to_yaml(), encoding="utf-8")
    assert command_line(["train", str(recipe)]) == 4
    errors = capsys.readouterr().err
    assert "speechtune: TrainingError: step 1: the optimizer step changed none" in errors
    assert "Traceback" not in errors

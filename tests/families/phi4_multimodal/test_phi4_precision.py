"""Phi-4-multimodal in bfloat16 and float16: base in half, adapters in float32, a scaler where float16 needs one.

A Turing GPU (7.5) is emulated: its plan, on a CPU. Base, autocast and gradient scaler are real, in real float16;
what a CPU cannot show is the GPU's own kernels and their speed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import speechtune.training.loop
import speechtune.training.prepare
from phi4_cases import FP32, encoded, family_on, run_config
from speechtune.config import RunConfig
from speechtune.errors import ConfigError, TrainingError
from speechtune.families.phi4_multimodal.family import Phi4MultimodalFamily
from speechtune.lora.apply import apply_lora, trainable
from speechtune.lora.base_identity import describe_base
from speechtune.precision import PrecisionPlan, plan_precision
from speechtune.training.checkpoint import RunParts, RunState
from speechtune.training.job import Objective
from speechtune.training.run import run_training
from speechtune.types import Sample

CPU = torch.device("cpu")
TURING = plan_precision(capability=(7, 5), device=CPU)
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "targets": "language"}


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """Also where there is a GPU: it would be asked for its own plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture
def configure(tmp_path: Path, phi4_base: Path, phi4_rows: Path) -> Callable[..., RunConfig]:
    """A short run of batches of four; keyword arguments are options of `train`."""

    def build(name: str = "run", base: Path = phi4_base, **train: Any) -> RunConfig:
        values = {"max_steps": 3, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 1} | train
        resume = values.pop("resume", None)
        config = run_config(
            tmp_path, base, phi4_rows, lora=LORA, train=values, tracking={"log_every_steps": 1},
            checkpoint={"every_steps": 2, "resume": resume},
        )  # fmt: skip
        return config.model_copy(update={"output_dir": tmp_path / name})

    return build


@pytest.fixture
def turing(monkeypatch: pytest.MonkeyPatch) -> PrecisionPlan:
    """Runs are planned for a GPU of capability 7.5."""
    monkeypatch.setattr(speechtune.training.prepare, "plan_precision", lambda *_, **__: TURING)
    return TURING


def losses_of(folder: Path) -> list[float]:
    """The weighted loss of every step, from the run's own record."""
    record = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    return [row["loss"] for row in rows]


def assert_float32_adapters(model: torch.nn.Module, folder: Path) -> None:
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    files = [*folder.glob("checkpoint-*/adapter_model.safetensors"), folder / "lora_adapters/adapter_model.safetensors"]
    for file in files:
        tensors = load_file(file)
        assert tensors and {tensor.dtype for tensor in tensors.values()} == {torch.float32}, file
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def amplify(base: Path, folder: Path, factors: dict[str, float]) -> Path:
    """A copy of the base with some weights multiplied."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, factor in factors.items():
        tensors[name] = tensors[name] * factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_plan_of_turing() -> None:
    assert (TURING.name, TURING.base_dtype, TURING.autocast, TURING.scaler) == (
        "fp16",
        torch.float16,
        torch.float16,
        True,
    )


def test_one_scaled_step_in_float16_by_hand(phi4_base: Path, phi4_samples: list[Sample]) -> None:
    """Base in float16, adapters in float32, autocast, scaler: the step is taken, and close to the one in float32."""
    after = {}
    for plan in (TURING, FP32):
        family = family_on(phi4_base, lora=LORA)
        base = family.load(plan)
        assert {p.dtype for p in base.parameters()} == {plan.base_dtype}
        model = apply_lora(base, family, family.config.lora, 0)
        parameters = trainable(model)
        assert {p.dtype for p in parameters.values()} == {torch.float32}
        batch = family.collate(encoded(family, phi4_samples[:4]))
        objective = Objective(model, family, plan, {})
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=plan.scaler)
        loss, _ = objective(batch, batch.target_counts)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
        assert all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in gradients.values())
        scaler.step(optimizer)
        scaler.update()
        assert all(bool(p.isfinite().all()) for p in parameters.values())
        assert all(bool(p.any()) for name, p in parameters.items() if "lora_B" in name)
        after[plan.name] = (float(loss.detach()), gradients)
    (half, half_gradients), (full, full_gradients) = after["fp16"], after["fp32"]
    assert half == pytest.approx(full, rel=1e-2)
    for name, wanted in full_gradients.items():
        assert float((half_gradients[name] - wanted).norm()) <= 0.05 * float(wanted.norm()) + 1e-6, name


def test_a_run_as_on_turing(configure: Callable[..., RunConfig], turing: PrecisionPlan) -> None:
    """Steps that the scaler skips count as steps; adapters stay float32, in memory and in every file."""
    config = configure(max_steps=8, precision="auto")
    outcome = run_training(config)
    assert outcome.job.precision is turing
    assert outcome.proof.lora_b_moved == outcome.proof.lora_b_total > 0 and outcome.proof.base_unchanged
    frozen = {p.dtype for p in outcome.job.model.parameters() if not p.requires_grad}
    assert frozen == {torch.float16}
    assert_float32_adapters(outcome.job.model, config.output_dir)


def test_the_scaler_is_saved_and_restored(
    configure: Callable[..., RunConfig], turing: PrecisionPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scaler that starts anew at 65536 would skip the first steps of every resumed run."""
    config = configure(max_steps=6)
    run_training(config)
    saved = torch.load(config.output_dir / "checkpoint-6/optimizer.pt", weights_only=True)["scaler"]
    assert saved["_growth_tracker"] > 0 and saved["scale"] > 0

    found: list[dict[str, Any]] = []
    restore = speechtune.training.loop.restore

    def restore_and_look(directory: Path, parts: RunParts, *rest: Any, **options: Any) -> RunState:
        state = restore(directory, parts, *rest, **options)
        found.append(dict(parts.scaler.state_dict()))
        return state

    monkeypatch.setattr(speechtune.training.loop, "restore", restore_and_look)
    run_training(configure(max_steps=8, resume="auto"))
    assert found == [saved]
    later = torch.load(config.output_dir / "checkpoint-8/optimizer.pt", weights_only=True)["scaler"]
    assert later["_growth_tracker"] == saved["_growth_tracker"] + 2 and later["scale"] == saved["scale"]


def test_the_scaler_comes_down_from_infinities(
    configure: Callable[..., RunConfig], turing: PrecisionPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a scale far too high, steps are skipped and the scale halved until one is taken."""
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, init_scale=2.0**26, **k))
    config = configure(max_steps=16)
    outcome = run_training(config)
    assert outcome.proof.lora_b_moved == outcome.proof.lora_b_total
    state = torch.load(config.output_dir / "checkpoint-16/optimizer.pt", weights_only=True)
    assert state["scaler"]["scale"] < 2.0**26
    steps = {int(moments["step"]) for moments in state["optimizer"]["state"].values()}
    assert len(steps) == 1 and 0 < steps.pop() < 16
    assert_float32_adapters(outcome.job.model, config.output_dir)


# -- the probe for infinity ----------------------------------------------------------------------------------------

LOUD = {"model.layers.0.mlp.gate_up_proj.weight": 300.0, "model.layers.0.mlp.down_proj.weight": 300.0}


def test_activations_beyond_float16_are_refused_before_training(
    configure: Callable[..., RunConfig], turing: PrecisionPlan, phi4_base: Path, tmp_path: Path
) -> None:
    """Weights that fit, and activations that do not: a probe finds them, and names the way out."""
    base = amplify(phi4_base, tmp_path / "loud", LOUD)
    config = configure(base=base)
    with pytest.raises(TrainingError, match=r"NaN or infinity in fp16.*overflow float16; set train\.precision=fp32"):
        run_training(config)
    assert not list(config.output_dir.glob("checkpoint-*"))
    for plan in (FP32, replace(FP32, name="bf16", base_dtype=torch.bfloat16, autocast=torch.bfloat16)):
        family = family_on(base)
        recipe = describe_base(family.config, family, family.load(plan), plan)
        assert all(abs(value) < float("inf") for value in recipe.logits)


@pytest.mark.parametrize("mode", ["merge", "stack", "drop"])
def test_weights_beyond_float16_are_named(mode: str, phi4_base: Path, tmp_path: Path) -> None:
    """They are infinite as soon as they are loaded; merging would blame the speech LoRA for it."""
    name = "model.layers.1.mlp.down_proj.weight"
    base = amplify(phi4_base, tmp_path / "large", {name: 1e7})
    family = family_on(base, model={"speech_lora": mode})
    with pytest.raises(ConfigError, match=r"down_proj.*holds infinity.*float16 ends at 65504, set train\.precision"):
        describe_base(family.config, family, family.load(TURING), TURING)


# -- bfloat16 ------------------------------------------------------------------------------------------------------


def test_bfloat16_learns_as_float32_does(
    configure: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan of GPUs from 8.0 on, asked for on a CPU: three losses within 2 percent."""
    half = run_training(configure("half", precision="bf16"))
    told = "precision: bf16 on cpu: asked for by train.precision=bf16 (adapters float32)"
    assert told in capsys.readouterr().err
    full = run_training(configure("full", precision="fp32"))
    assert isinstance(half.job.family, Phi4MultimodalFamily)
    assert {p.dtype for p in half.job.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    found, wanted = (losses_of(outcome.job.config.output_dir) for outcome in (half, full))
    assert len(found) == 3 and found == pytest.approx(wanted, rel=0.02)
    for outcome in (half, full):
        assert_float32_adapters(outcome.job.model, outcome.job.config.output_dir)

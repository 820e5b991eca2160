""" "Loss 0.0 for 120 steps", reproduced on the real class of Phi-4-multimodal, and where a run here stops instead.

Trainable LoRA weights in float16 and AdamW: its eps of 1e-8 is 0 in float16. Where a gradient is exactly zero, and of
every lora_A it is at the first step, for its lora_B starts at zero, the update is 0 / (sqrt(0) + 0) = NaN; where it is
small, as after clipping, its square is 0 and the update infinite. From then on the forward pass is NaN, and so are all
gradients; `Trainer` shows the loss of such a step as 0.0.

All of it runs in real float16 on a CPU: forward, backward and the optimizer's arithmetic.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import Phi4MultimodalForCausalLM, Trainer, TrainingArguments

import speechtune.training.prepare
from speechtune.audio import read_audio
from speechtune.config import RunConfig
from speechtune.errors import TrainingError
from speechtune.families.phi4_multimodal.family import LANGUAGE_MODEL, Phi4MultimodalFamily
from speechtune.family import Family
from speechtune.lora.apply import apply_lora, trainable
from speechtune.storage.verified_folder import find_checkpoints
from speechtune.training import guards
from speechtune.training.run import run_training
from speechtune.types import AudioRef, Batch

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    """Also where there is a GPU: its AdamW is another kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def half_model(base: Path) -> nn.Module:
    """A LoRA on the base, all of it in float16: what `.half()` or `torch_dtype=float16` with `add_adapter` makes."""
    torch.manual_seed(0)
    model: Any = Phi4MultimodalForCausalLM.from_pretrained(base)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=LANGUAGE_MODEL)).half()


def native_rows(base: Path, rows: Path) -> list[dict[str, torch.Tensor]]:
    """Samples as plain transformers takes them, the answer's tokens as labels."""
    from transformers import AutoTokenizer, Phi4MultimodalFeatureExtractor

    tokenizer, extractor = AutoTokenizer.from_pretrained(base), Phi4MultimodalFeatureExtractor()
    found = []
    for row in map(json.loads, rows.read_text(encoding="utf-8").splitlines()):
        ref = AudioRef(path=row["audio"], offset_seconds=row["offset"], duration_seconds=row["duration"])
        extracted = extractor(read_audio(ref, 16_000).samples, sampling_rate=16_000, return_tensors="pt")
        prompt = f"<|user|>{'<|audio|>' * int(extracted['audio_embed_sizes'][0])}Rate it.<|end|><|assistant|>"
        answer = tokenizer(json.dumps(row["target"]) + "<|end|>", return_tensors="pt")["input_ids"]
        ids = torch.cat([tokenizer(prompt, return_tensors="pt")["input_ids"], answer], 1)
        labels = ids.clone()
        labels[:, : -answer.shape[1]] = -100
        features = extracted["audio_input_features"].half()
        item = {"input_ids": ids, "labels": labels, "audio_input_features": features}
        found.append({k: v[0] for k, v in (item | {"audio_embed_sizes": extracted["audio_embed_sizes"]}).items()})
    return found


def nan_tensors(parameters: dict[str, nn.Parameter]) -> set[str]:
    return {name for name, parameter in parameters.items() if bool(parameter.isnan().any())}


# -- (a) the optimizer ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreach", [True, False])
def test_one_step_of_adamw_makes_float16_adapters_nan(foreach: bool, phi4_base: Path, phi4_rows: Path) -> None:
    """Every lora_A after one step, every LoRA tensor after two; the forward pass is NaN from the first on."""
    model = half_model(phi4_base)
    parameters = trainable(model)
    batch = {name: value[None] for name, value in native_rows(phi4_base, phi4_rows)[0].items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-5, foreach=foreach)
    assert optimizer.defaults["eps"] == 1e-8 and float(torch.tensor(1e-8).half()) == 0.0

    loss = model(**batch).loss
    loss.backward()
    assert bool(loss.isfinite())
    assert all(bool(p.grad.isfinite().all()) for p in parameters.values() if p.grad is not None)
    optimizer.step()
    assert nan_tensors(parameters) == {name for name in parameters if "lora_A" in name}
    assert all(bool(p.isnan().all()) for name, p in parameters.items() if "lora_A" in name)

    loss = model(**batch).loss
    assert bool(loss.isnan())
    loss.backward()
    optimizer.step()
    assert nan_tensors(parameters) == set(parameters)


def test_the_same_step_is_sound_in_float32(phi4_base: Path, phi4_rows: Path) -> None:
    """Half-precision base, float32 adapters, the same optimizer: what this package does."""
    model = half_model(phi4_base)
    parameters = trainable(model)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
    batch = {name: value[None] for name, value in native_rows(phi4_base, phi4_rows)[0].items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=2e-5)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        assert bool(loss.isfinite()) and not nan_tensors(parameters)


# -- (b) what the user sees ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "hidden"), [("adamw_torch", True), ("adamw_torch", False)])
def test_the_trainer_shows_nan_as_zero(
    optimizer: str, hidden: bool, phi4_base: Path, phi4_rows: Path, tmp_path: Path
) -> None:
    """A run of the real Trainer: one loss, then 0.0 to the end; without its filter the same run shows NaN."""
    model = half_model(phi4_base)
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        use_cpu=True,
        max_steps=5,
        per_device_train_batch_size=1,
        learning_rate=2e-5,
        optim=optimizer,
        logging_steps=1,
        logging_nan_inf_filter=hidden,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        label_names=["labels"],
    )
    assert TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]).logging_nan_inf_filter  # the default
    rows = native_rows(phi4_base, phi4_rows)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,  # pyright: ignore[reportArgumentType]
        data_collator=lambda items: {name: torch.stack([item[name] for item in items]) for name in items[0]},
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["loss"] for entry in log]
    assert losses[0] > 1 and len(losses) == 5
    assert all(math.isnan(entry["grad_norm"]) for entry in log[1:])
    if hidden:
        assert losses[1:] == [0.0] * 4
    else:
        assert all(math.isnan(loss) for loss in losses[1:])
    assert nan_tensors(trainable(model)) == set(trainable(model))


# -- (c), (d) where a run here stops ------------------------------------------------------------------------------


def halve_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training code that casts what it wraps, put where such code is found: after `apply_lora`."""

    def apply_and_halve(*arguments: Any) -> nn.Module:
        model = apply_lora(*arguments)
        for parameter in trainable(model).values():
            parameter.data = parameter.data.half()
        return model

    monkeypatch.setattr(speechtune.training.prepare, "apply_lora", apply_and_halve)


def stopped(config: RunConfig, family: Family | None = None) -> str:
    """Run; it must stop with a TrainingError, and leave neither a sign of success nor a NaN on the disk."""
    with pytest.raises(TrainingError) as caught:
        run_training(config, family)
    assert caught.value.exit_code == 4
    for success in ("lora_adapters", "summary.json", "trainer_state.json"):
        assert not (config.output_dir / success).exists()
    for path in config.output_dir.rglob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(path).values()), path
    return str(caught.value)


def test_half_precision_adapters_are_refused_before_the_first_step(
    phi4_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    halve_adapter(monkeypatch)
    config = phi4_config()
    message = stopped(config)
    assert "16 trainable parameters are half precision" in message
    assert "lora_A.default.weight is torch.float16" in message and "keep trainable parameters in float32" in message
    assert find_checkpoints(config.output_dir) == [] and not (config.output_dir / "metrics.jsonl").exists()


def test_without_that_guard_the_run_stops_at_the_first_nan(
    phi4_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next guard holds: the NaN that step 1 leaves is named, with its samples, and never saved."""
    halve_adapter(monkeypatch)
    monkeypatch.setattr(guards, "check_trainable", lambda *_, **__: None)
    config = phi4_config()
    message = stopped(config)
    assert message.startswith("step 1: the optimizer step left 16 parameters that are not finite")
    assert "lora_A.default.weight holds NaN" in message and "samples of the step: clip-" in message
    assert find_checkpoints(config.output_dir) == []


def test_without_any_guard_on_weights_the_loss_is_named(
    phi4_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN that comes with the second forward pass: head, value and samples, where a Trainer shows 0.0."""
    halve_adapter(monkeypatch)
    for name in ("check_trainable", "check_finite"):
        monkeypatch.setattr(guards, name, lambda *_, **__: None)
    message = stopped(phi4_config(checkpoint={"every_steps": 2}))
    assert "step 2: the APA loss is nan" in message and "clip-" in message


def test_a_nan_gradient_is_named(phi4_config: Configure) -> None:
    """A finite loss with a gradient of NaN, as 0 * inf in a backward pass gives: tensor and samples are named."""

    class Poisoned(Phi4MultimodalFamily):
        def losses(self, model: nn.Module, batch: Batch) -> Any:
            found = super().losses(model, batch)
            poison = next(p for name, p in trainable(model).items() if name.endswith("o_proj.lora_B.default.weight"))
            zero = torch.sqrt((poison * 0.0).abs()).sum()  # the slope of the root at 0 is infinite: inf * 0
            return type(found)({head: value + zero for head, value in found.sums.items()})

    config = phi4_config()
    message = stopped(config, Poisoned(config))
    assert "step 1: the gradient norm is nan; non-finite gradients in 1 parameters" in message
    assert "layers.0.self_attn.o_proj.lora_B" in message and "clip-" in message
    assert find_checkpoints(config.output_dir) == []

"""Higgs Audio v2 with Whisper conditioning: one training, however it is cut, resumed or spread, and what it leaves."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import train
from runs import (
    STEPS,
    TOLERANCE,
    Configure,
    assert_same_to_the_bit,
    curve,
    greatest_difference,
    run_on_two_ranks,
    weights,
)
from safetensors.torch import load_file
from transformers import HiggsAudioV2ForConditionalGeneration

from speechtune.config import RunConfig
from speechtune.errors import SpeechtuneError, TrainingError
from speechtune.families import create_family
from speechtune.families.higgs_audio_v2 import tiny
from speechtune.storage.verified_folder import verify_folder
from speechtune.training.run import run_training
from speechtune.types import Batch, Encoded

PROJECTOR = "reference_projector.safetensors"
TENSORS = {f"reference_projector.{name}" for name in ("scale", "gate", "norm.weight", "norm.bias")}
TENSORS |= {f"reference_projector.{layer}.{part}" for layer in ("up", "down") for part in ("weight", "bias")}


@pytest.fixture(scope="module")
def conditioned(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Configure:
    """As `configure`, conditioned; three of the eleven samples are of speakers of one clip, and have no reference."""
    folder = tmp_path_factory.mktemp("conditioned")
    tiny.make_whisper(folder / "whisper")
    plain = configure(folder / "unused")
    assert isinstance(plain.data.train, Path)
    rows = json.loads(plain.data.train.read_text())
    for number, row in enumerate(rows[:3]):
        row["speaker"] = f"alone-{number}"
        row["messages"][1]["content"] = row["messages"][1]["content"][2:]
        del row["misc"]["ref_transcript"]
    (folder / "train.json").write_text(json.dumps(rows))
    more = {
        "model": {"reference_conditioning": "whisper", "whisper_path": str(folder / "whisper")},
        "data": {"train": folder / "train.json"},
        # Adam divides by a gradient's size: with its usual eps one that is nearly zero shows the order of sums.
        "train": {"eps": 1e-4, "learning_rate": 1e-2},
    }
    return lambda output_dir, *parts: configure(output_dir, more, *parts)


@pytest.fixture(scope="module")
def run(conditioned: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain conditioned run."""
    output = tmp_path_factory.mktemp("conditioned-straight") / "output"
    outcome = train(conditioned(output))
    assert sum(not sample.references for sample in outcome.job.train_set.samples) == 3
    proof = outcome.proof
    assert proof.base_unchanged and proof.tensors_moved == proof.tensors_total
    return output


def test_the_projector_is_trained_and_saved_beside_the_adapter(run: Path, conditioned: Configure) -> None:
    """In every checkpoint and with the final adapter, in MANIFEST.json, apart from the LoRA tensors; the gate moved."""
    for folder in (run / "checkpoint-4", run / f"checkpoint-{STEPS}", run / "lora_adapters"):
        stored = load_file(folder / PROJECTOR)
        assert set(stored) == TENSORS and all(tensor.dtype == torch.float32 for tensor in stored.values())
        assert not any("reference" in name for name in load_file(folder / "adapter_model.safetensors"))
        listed = {entry["name"] for entry in json.loads((folder / "MANIFEST.json").read_text())["files"]}
        assert PROJECTOR in listed and verify_folder(folder) == []
    first, last = (load_file(run / f"checkpoint-{step}" / PROJECTOR) for step in (4, STEPS))
    assert float(last["reference_projector.gate"].abs().max()) > 1e-2
    assert [name for name in TENSORS if torch.equal(first[name], last[name])] == ["reference_projector.scale"]
    recipe = json.loads((run / "lora_adapters" / "base_recipe.json").read_text())
    assert recipe["prepared"]["reference_conditioning"] == "whisper" and len(recipe["prepared"]["whisper"]) == 64
    card = (run / "lora_adapters" / "README.md").read_text()
    assert "Plain PEFT loads the LoRA part alone" in card and PROJECTOR in card


def test_conditioning_makes_a_difference_from_the_second_step_on(
    run: Path, conditioned: Configure, tmp_path: Path
) -> None:
    """The first loss is the unconditioned run's; later ones are not."""
    off: dict[str, Any] = {"model": {"reference_conditioning": None, "whisper_path": None}}
    train(conditioned(tmp_path / "off", off))
    with_it, without = curve(run), curve(tmp_path / "off")
    assert with_it[1] == without[1] and all(with_it[step] != without[step] for step in range(2, STEPS + 1))


CUTS = {
    "accumulated": {"train": {"batch_size": 2, "accumulation": 4}},
    "one by one": {"train": {"batch_size": 1, "accumulation": 8}},
    "padded, native": {"batch": {"packing": False}, "speed": {"fast_forward": False}},
    "recomputed": {"train": {"gradient_checkpointing": True}, "evaluate": {"batch_size": 3}},
    "recomputed, native": {"train": {"gradient_checkpointing": True}, "speed": {"fast_forward": False}},
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_changes_nothing(cut: str, conditioned: Configure, run: Path, tmp_path: Path) -> None:
    """Also where a micro-batch holds no reference at all."""
    train(conditioned(tmp_path / "output", CUTS[cut]))
    assert greatest_difference(tmp_path / "output", run) < TOLERANCE
    assert curve(tmp_path / "output") == pytest.approx(curve(run), rel=1e-6)
    assert curve(tmp_path / "output", "eval_loss") == pytest.approx(curve(run, "eval_loss"), rel=1e-6)


def test_a_resumed_run_is_the_same_to_the_bit(conditioned: Configure, tmp_path: Path) -> None:
    options = {"lora": {"dropout": 0.1}, "model": {"reference_positions": 5}}
    train(conditioned(tmp_path / "straight", options))
    train(conditioned(tmp_path / "resumed", options), step=3)
    assert not (tmp_path / "resumed" / "lora_adapters").exists()
    train(conditioned(tmp_path / "resumed", options))
    assert_same_to_the_bit(tmp_path / "resumed", tmp_path / "straight", STEPS)
    assert PROJECTOR in {path.name for path in (tmp_path / "resumed" / "lora_adapters").iterdir()}


def other_whisper(config: RunConfig, folder: Path) -> dict[str, Any]:
    tiny.make_whisper(folder / "other", seed=1)
    return {"whisper_path": str(folder / "other")}


CHANGES: dict[str, Callable[[RunConfig, Path], dict[str, Any]]] = {
    "another Whisper": other_whisper,
    "other positions": lambda config, folder: {"reference_positions": 4},
    "no conditioning": lambda config, folder: {"reference_conditioning": None, "whisper_path": None},
}

REASONS = {
    "another Whisper": "not a checkpoint of this run: dataset: .*; additions: .*whisper",
    "other positions": r"trained with model\.reference_positions=None, here it is 4",
    "no conditioning": "trained with reference conditioning .*without which it would answer otherwise",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_resume_with_other_conditioning_is_refused(change: str, conditioned: Configure, tmp_path: Path) -> None:
    config = conditioned(tmp_path / "output")
    train(config, step=2)
    with pytest.raises(SpeechtuneError, match=REASONS[change]):
        train(conditioned(tmp_path / "output", {"model": CHANGES[change](config, tmp_path)}))


def test_a_run_whose_projector_is_never_reached_ends(conditioned: Configure, tmp_path: Path) -> None:
    """The guard counts what no gradient has reached after a pass over the data, and names it."""
    config = conditioned(tmp_path / "output")
    family = create_family(config)
    collate = family.collate

    def deaf(items: Sequence[Encoded]) -> Batch:
        batch = collate(items)
        nothing = {name: batch.inputs[name][:0] for name in ("reference_features", "reference_rows")}
        return replace(batch, inputs={**batch.inputs, **nothing})

    family.collate = deaf  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"step 2: no gradient has reached 7 tensors .*reference_projector\.down"):
        run_training(config, family)


def test_full_training_saves_the_projector_apart(conditioned: Configure, tmp_path: Path) -> None:
    """The model's own file is what plain transformers loads without a word; resumed, it is the same to the bit."""
    full = {"lora": {"enabled": False}, "train": {"max_steps": 4, "learning_rate": 1e-3}}
    outcome = train(conditioned(tmp_path / "straight", full))
    train(conditioned(tmp_path / "resumed", full), step=3)
    train(conditioned(tmp_path / "resumed", full))
    ours, resumed = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert ours.keys() == resumed.keys() and all(torch.equal(ours[name], resumed[name]) for name in ours)
    assert set(load_file(tmp_path / "straight" / PROJECTOR)) == TENSORS
    loaded, info = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        tmp_path / "straight", output_loading_info=True, use_text_head=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    live = dict(outcome.job.model.named_parameters())
    assert all(torch.equal(parameter, live[name]) for name, parameter in loaded.named_parameters())
    assert live.keys() >= TENSORS - {"reference_projector.scale"} and live["reference_projector.gate"].any()


@pytest.mark.slow
def test_two_ranks_equal_one_process(conditioned: Configure, run: Path, tmp_path: Path) -> None:
    """DDP and FSDP2, rows without a reference on either; a signal to one rank ends both, a resume goes on exactly."""
    two = {"train": {"batch_size": 2, "accumulation": 2}}
    sharded = {"speed": {"parallel": "fsdp"}}
    says = run_on_two_ranks(
        tmp_path,
        {
            "plain": (conditioned(tmp_path / "plain", two), None),
            "one by one": (conditioned(tmp_path / "one", {"train": {"batch_size": 1, "accumulation": 4}}), None),
            "sharded": (conditioned(tmp_path / "sharded", two, sharded), None),
            "stopped": (conditioned(tmp_path / "stopped", two), 3),
            "resumed": (conditioned(tmp_path / "stopped", two), None),
        },
    )
    assert [say["step"] for say in says["stopped"]] == [3, 3] and all(say["finished"] for say in says["resumed"])
    for name in ("plain", "one", "sharded"):
        assert greatest_difference(tmp_path / name, run) < TOLERANCE
        assert curve(tmp_path / name) == pytest.approx(curve(run), rel=1e-6)
    assert_same_to_the_bit(tmp_path / "stopped", tmp_path / "plain", STEPS)

"""Weights sharded over two ranks (FSDP2) train to what one process trains to, and leave the same files behind."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import train
from peft import PeftModel
from runs import (
    STEPS,
    TOLERANCE,
    Configure,
    Row,
    assert_same_to_the_bit,
    curve,
    ended,
    greatest_difference,
    results_of,
    start_torchrun,
    weights,
    write_jobs,
)
from transformers import HiggsAudioV2ForConditionalGeneration

from speechtune.errors import ConfigError
from speechtune.storage.verified_folder import newest_valid, verify_folder
from speechtune.training.distributed import blocks

FSDP = {"speed": {"parallel": "fsdp"}, "train": {"batch_size": 2, "accumulation": 2}, "evaluate": {"batch_size": 1}}
HALF = {"train": {"max_steps": 3, "precision": "bf16", "batch_size": 4, "accumulation": 1}}
# AdamW turns rounding of near-zero gradients, of which whole layers have many, into steps of full size: eps damps them.
FULL = {"lora": {"enabled": False}, "train": {"max_steps": 4, "eps": 1e-5, "batch_size": 4}}
MORE = {"lora": {"dora": True, "modules_to_save": ["audio_lm_head"]}, "train": {"max_steps": 3, "eps": 1e-5}}


@pytest.fixture(scope="module")
def launch(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """Folder of the runs on two ranks, what they say, and what they wrote to stderr."""
    folder = tmp_path_factory.mktemp("sharded")
    train(configure(folder / "from-one-process"), step=3)
    train(configure(folder / "full", FULL), step=2)
    shutil.copytree(folder / "full", folder / "full-in-one-process")
    # The last rank's share of the evaluation set (3 batches) runs out first.
    rows = {
        "plain": Row(configure(folder / "plain", FSDP)),
        "stopped": Row(configure(folder / "stopped", FSDP), step=4),
        "stopped-resumed": Row(configure(folder / "stopped", FSDP)),
        "to-one-process": Row(configure(folder / "to-one-process", FSDP), step=2),
        "from-one-process": Row(
            configure(folder / "from-one-process", FSDP, {"train": {"gradient_checkpointing": True}})
        ),
        "half-ddp": Row(configure(folder / "half-ddp", HALF)),
        "half": Row(configure(folder / "half", FSDP, HALF)),
        "more": Row(configure(folder / "more", FSDP, MORE, {"checkpoint": {"final": "best"}})),
        "full": Row(configure(folder / "full", FSDP, FULL, {"train": {"batch_size": 1}})),
    }
    running = start_torchrun(write_jobs(folder, rows), "--standalone", "--nproc_per_node=2")
    errors = ended(running)
    assert running.returncode == 0, errors[-4000:]
    return folder, results_of(folder, rows), errors


@pytest.mark.slow
def test_sharded_runs_equal_one_process(launch: tuple[Path, dict[str, Any], str], straight: Path) -> None:
    """Gradients deferred to the last micro-batch and averaged by FSDP, the loss scaled by ranks: the same sums."""
    folder, says, errors = launch
    assert says.pop("stopped") == [{"step": 4, "signal": signal.SIGTERM, "finished": False}] * 2
    assert says.pop("to-one-process") == [{"step": 2, "signal": signal.SIGTERM, "finished": False}] * 2
    assert all(say["signal"] is None for both in says.values() for say in both)
    for name in ("plain", "from-one-process"):
        assert greatest_difference(folder / name, straight) < TOLERANCE
        assert curve(folder / name) == pytest.approx(curve(straight), rel=1e-6)
        assert curve(folder / name, "grad_norm") == pytest.approx(curve(straight, "grad_norm"), rel=1e-4)
    assert curve(folder / "plain", "eval_loss") == pytest.approx(curve(straight, "eval_loss"), rel=1e-6)
    assert "FSDP2: 2 blocks and the rest sharded over 2 ranks; MB per rank: 2.4" in errors


@pytest.mark.slow
def test_a_sharded_run_resumes_to_the_bit(launch: tuple[Path, dict[str, Any], str]) -> None:
    folder, _, _ = launch
    assert_same_to_the_bit(folder / "stopped", folder / "plain", STEPS)


@pytest.mark.slow
def test_a_sharded_checkpoint_goes_on_in_one_process(
    launch: tuple[Path, dict[str, Any], str], configure: Configure, straight: Path
) -> None:
    folder, _, _ = launch
    output = folder / "to-one-process"
    assert newest_valid(output)[0] == output / "checkpoint-2"
    train(configure(output))
    assert greatest_difference(output, straight) < TOLERANCE


@pytest.mark.slow
def test_a_half_precision_base_is_sharded_beside_its_float32_adapter(
    launch: tuple[Path, dict[str, Any], str],
) -> None:
    folder, _, _ = launch
    assert greatest_difference(folder / "half", folder / "half-ddp") < TOLERANCE
    assert all(tensor.dtype == torch.float32 for tensor in weights(folder / "half" / "lora_adapters").values())


@pytest.mark.slow
def test_a_sharded_adapter_loads_in_plain_peft(
    launch: tuple[Path, dict[str, Any], str], straight: Path, tiny_base: Path
) -> None:
    folder, _, _ = launch

    def logits(adapter: Path) -> torch.Tensor:
        base = HiggsAudioV2ForConditionalGeneration.from_pretrained(tiny_base / "model", use_text_head=True)
        model = PeftModel.from_pretrained(base, str(adapter)).eval()
        with torch.no_grad():
            return model(input_ids=torch.arange(40)[None]).logits

    ours, theirs = logits(folder / "plain" / "lora_adapters"), logits(straight / "lora_adapters")
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert torch.equal(ours, logits(folder / "plain" / f"checkpoint-{STEPS}"))
    assert verify_folder(folder / "plain" / "lora_adapters") == []


@pytest.mark.slow
def test_dora_and_whole_modules_are_saved_whole(launch: tuple[Path, dict[str, Any], str], configure: Configure) -> None:
    """`modules_to_save` lies in the root's share; `checkpoint.final: best` puts a checkpoint back into shards."""
    folder, _, _ = launch
    train(configure(folder / "more-in-one-process", MORE))
    assert greatest_difference(folder / "more", folder / "more-in-one-process") < TOLERANCE
    names = weights(folder / "more" / "lora_adapters")
    assert any("audio_lm_head" in name for name in names) and any("magnitude" in name for name in names)


@pytest.mark.slow
def test_a_full_model_is_sharded_and_saved_whole(
    launch: tuple[Path, dict[str, Any], str], configure: Configure
) -> None:
    """Begun in one process, ended on shards: what lies on disk is the model transformers loads."""
    folder, _, _ = launch
    straight = folder / "full-in-one-process"
    train(configure(straight, FULL))
    ours, theirs = (weights(output / "checkpoint-4") for output in (folder / "full", straight))
    assert ours.keys() == theirs.keys() and len(ours) > 30
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < TOLERANCE
    HiggsAudioV2ForConditionalGeneration.from_pretrained(folder / "full" / "checkpoint-4", use_text_head=True)
    moments = [
        torch.load(output / "checkpoint-4" / "optimizer.pt")["optimizer"] for output in (folder / "full", straight)
    ]
    shapes = [{i: s["exp_avg"].shape for i, s in moment["state"].items()} for moment in moments]
    assert shapes[0] == shapes[1]


def test_blocks_are_found_by_the_base_class_too() -> None:
    """A layer swapped for a subclass of the native class must not fall out of the sharding."""

    class Layer(torch.nn.Linear):
        pass

    class Faster(Layer):
        pass

    class Model(torch.nn.Module):
        _no_split_modules = ("Layer",)

        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer(1, 1), Faster(1, 1)])
            self.head = torch.nn.Linear(1, 1)

    assert list(blocks(torch.nn.Sequential(Model()))) == ["0.layers.0", "0.layers.1"]


RESTARTS = {"WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
REFUSED = {
    "one process": ({}, {"WORLD_SIZE": "1"}, "nothing can be sharded"),
    "answers": ({"evaluate": {"prompts": 2}}, {"WORLD_SIZE": "2"}, "evaluate.prompts=0"),
    "a budget": ({"batch": {"tokens": "auto"}}, {"WORLD_SIZE": "2"}, "batch.tokens=auto .* name a value"),
    "stale addresses": ({}, {**RESTARTS, "MASTER_ADDR": "localhost"}, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_sharded_is_refused(
    case: str, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more, environment, expected = REFUSED[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=expected):
        train(configure(tmp_path / "output", FSDP, more))
    assert not (tmp_path / "output").exists()

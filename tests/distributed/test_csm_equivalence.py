"""CSM, one training, however it is run: cut into micro-batches, on two ranks, or stopped and resumed; in full too."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import train
from runs import assert_same_to_the_bit, curve, greatest_difference, run_on_two_ranks, weights

from csm_cases import plain_model, run_config
from helpers import DemoClip
from speechtune.audio import read_audio
from speechtune.config import RunConfig
from speechtune.families.csm import tiny
from speechtune.training.run import Outcome
from speechtune.types import AudioRef

STEPS = 4
TOLERANCE = 1e-6
Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def configure(
    tmp_path_factory: pytest.TempPathFactory,
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
) -> Configure:
    """Six clips in batches of four, all frames in the depth decoder unless said otherwise; an evaluation at the end."""
    folder = tmp_path_factory.mktemp("csm-equivalence")
    speech = [read_audio(AudioRef(path=str(clip.path)), 24_000) for clip in demo_clips[:4]]
    tiny.make_model(folder / "base", speech, output_scale=10.0)
    short = sorted(demo_clips, key=lambda clip: clip.duration_seconds)[:6]
    rows = write_chatml(folder / "train.json", short)
    held_out = shutil.copy(rows, folder / "eval.json")

    def build(output: Path, **more: Any) -> RunConfig:
        sections: dict[str, Any] = {
            "output_dir": output,
            # Adam divides by a gradient's size: with its usual eps one that is nearly zero shows the order of sums.
            "train": {"learning_rate": 5e-3, "eps": 1e-3},
            "data": {"eval": held_out, "cache_dir": folder / "cache", "depth_share": 1.0},
            "evaluate": {"every_steps": STEPS, "batch_size": 3, "prompts": 0},
            "checkpoint": {"every_steps": 2, "resume": "auto"},
        }
        for name, values in more.items():
            sections[name] = {**sections.get(name, {}), **values}
        return run_config(folder, folder / "base", rows, **sections)

    return build


@pytest.fixture(scope="module")
def straight(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plain run."""
    output = tmp_path_factory.mktemp("csm-straight") / "output"
    train(configure(output))
    losses = list(curve(output).values())
    assert losses[-1] < losses[0] - 0.02
    return output


CUTS: dict[str, dict[str, Any]] = {
    "2 x 2 accumulated": {"train": {"batch_size": 2, "accumulation": 2}},
    "1 x 4 accumulated, native": {"train": {"batch_size": 1, "accumulation": 4}, "speed": {"fast_forward": False}},
    "padded": {"batch": {"packing": False}},
    "padded, native, recomputed": {
        "batch": {"packing": False},
        "speed": {"fast_forward": False},
        "train": {"gradient_checkpointing": True},
    },
    "budgets": {"batch": {"tokens": 500}, "evaluate": {"batch_size": 1}},
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_changes_nothing(cut: str, configure: Configure, straight: Path, tmp_path: Path) -> None:
    """Sums over counts: neither micro-batches, nor layout, nor layers matter."""
    train(configure(tmp_path / "output", **CUTS[cut]))
    assert greatest_difference(tmp_path / "output", straight) < TOLERANCE
    assert curve(tmp_path / "output") == pytest.approx(curve(straight), rel=2e-6)
    assert curve(tmp_path / "output", "eval_loss") == pytest.approx(curve(straight, "eval_loss"), rel=2e-6)


def test_a_resumed_run_is_the_same_to_the_bit(configure: Configure, tmp_path: Path) -> None:
    """With dropout, a share of the frames drawn, and a signal in step 3: the draws go on where they were."""
    options = {"lora": {"dropout": 0.1}, "data": {"depth_share": 0.125}}
    train(configure(tmp_path / "straight", **options))
    train(configure(tmp_path / "resumed", **options), step=3)
    assert not (tmp_path / "resumed" / "lora_adapters").exists()
    train(configure(tmp_path / "resumed", **options))
    assert_same_to_the_bit(tmp_path / "resumed", tmp_path / "straight", STEPS)


def test_full_training_is_saved_resumed_and_loads_in_plain_transformers(configure: Configure, tmp_path: Path) -> None:
    """Without LoRA: all but the codec is trained; the files hold the model in memory, under names of the hub's."""
    options = {"lora": {"enabled": False}, "train": {"learning_rate": 1e-3}}
    outcome: Outcome = train(configure(tmp_path / "straight", **options))
    train(configure(tmp_path / "resumed", **options), step=3)
    train(configure(tmp_path / "resumed", **options))
    assert curve(tmp_path / "resumed") == curve(tmp_path / "straight")
    ours, resumed = (weights(tmp_path / name) for name in ("straight", "resumed"))
    assert ours.keys() == resumed.keys() and all(torch.equal(ours[name], resumed[name]) for name in ours)
    assert "codec_model.encoder_transformer.layers.0.self_attn.q_proj.weight" in ours
    loaded, info = plain_model(tmp_path / "straight", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    live, before = dict(outcome.job.model.named_parameters()), dict(plain_base(outcome).named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, live[name]), name
        assert torch.equal(parameter, before[name]) == name.startswith("codec_model."), name


def plain_base(outcome: Outcome) -> Any:
    return plain_model(outcome.job.config.model.path)


@pytest.mark.slow
def test_two_ranks_equal_one_process(configure: Configure, straight: Path, tmp_path: Path) -> None:
    """Gradients, losses and evaluation span the ranks, sharded or not; a signal to one rank ends both."""
    two = {"train": {"batch_size": 2}}
    share = {"data": {"depth_share": 0.125}}
    stopped = configure(tmp_path / "stopped", **two, **share)
    says = run_on_two_ranks(
        tmp_path,
        {
            "plain": (configure(tmp_path / "plain", **two), None),
            "sharded": (configure(tmp_path / "sharded", **two, speed={"parallel": "fsdp"}), None),
            "with a share": (configure(tmp_path / "share", **two, **share), None),
            "stopped": (stopped, 3),
            "resumed": (stopped, None),
        },
    )
    assert [say["step"] for say in says["stopped"]] == [3, 3] and all(say["finished"] for say in says["resumed"])
    for name in ("plain", "sharded"):
        assert greatest_difference(tmp_path / name, straight) < TOLERANCE
        assert curve(tmp_path / name) == pytest.approx(curve(straight), rel=2e-6)
        assert curve(tmp_path / name, "eval_loss") == pytest.approx(curve(straight, "eval_loss"), rel=2e-6)
    assert_same_to_the_bit(tmp_path / "stopped", tmp_path / "share", STEPS)

"""Evaluation during training: the same prompts at every round, answered, scored, kept; and no bit of training moved."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import DemoClip, merged, read_records
from phi4_cases import run_config, write_rows
from speechtune.audio import file_name
from speechtune.config import RunConfig
from speechtune.errors import ConfigError
from speechtune.training.run import run_training
from speechtune.types import Sample

STEPS = 6
TRAIN = {"max_steps": STEPS, "batch_size": 8, "learning_rate": 4e-3, "warmup_steps": 0}
EVALUATE = {"every_steps": 2, "batch_size": 4, "prompts": 4}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory, phi4_samples: list[Sample]) -> Path:
    return write_rows(tmp_path_factory.mktemp("held-out") / "eval.jsonl", phi4_samples[:8])


@pytest.fixture
def phi4_config(tmp_path: Path, phi4_base: Path, phi4_rows: Path, held_out: Path) -> Callable[..., RunConfig]:
    """A short Phi-4 run in a folder of its own that generates samples every other step."""

    def build(name: str = "run", **overrides: Any) -> RunConfig:
        defaults = {
            "data": {"eval": held_out, "cache_dir": tmp_path / "cache"},
            "lora": {"dropout": 0.1, "rank": 8},
            "train": TRAIN,
            "evaluate": EVALUATE,
            "checkpoint": {"every_steps": 2, "resume": "auto"},
        }
        return run_config(tmp_path / name, phi4_base, phi4_rows, **merged(defaults, overrides))

    return build


def evaluations(config: RunConfig) -> list[dict[str, Any]]:
    return [record for record in read_records(config.output_dir) if "eval_loss" in record]


def adapter(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(config.output_dir / "lora_adapters" / "adapter_model.safetensors")


def test_every_round_is_scored_and_kept_beside_the_bases(phi4_config: Callable[..., RunConfig]) -> None:
    config = phi4_config()
    run_training(config)
    found = evaluations(config)
    assert [record["step"] for record in found] == [0, 2, 4, 6]
    for record in found:
        assert record["eval_loss"] > 0 and 0 < record["time_share"] < 1
        assert {"parse_rate", "stop_rate", "token_accuracy_APA"} <= record["scores"].keys()
    assert found[-1]["scores"]["token_accuracy_APA"] > found[0]["scores"]["token_accuracy_APA"]
    samples = config.output_dir / "samples"
    prompts = [json.loads(line) for line in (samples / "prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == 4
    for step in (0, 2, 4, 6):
        rows = [json.loads(line) for line in (samples / f"step-{step}" / "scores.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == [row["id"] for row in prompts]
    assert sorted(path.stem for path in (samples / "reference").glob("*.wav")) == sorted(
        file_name(row["id"]) for row in prompts
    )


def test_generating_samples_moves_no_bit_of_the_training(phi4_config: Callable[..., RunConfig]) -> None:
    """Dropout is on: one random number drawn by an evaluation would change every later step."""
    sampled, plain = phi4_config("sampled"), phi4_config("plain", evaluate={"enabled": False})
    run_training(sampled)
    run_training(plain)
    ours, theirs = adapter(sampled), adapter(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not evaluations(plain) and not (plain.output_dir / "samples").exists()


def test_scores_are_the_same_across_a_resume(phi4_config: Callable[..., RunConfig]) -> None:
    straight, halves = phi4_config("straight"), phi4_config("halves")
    run_training(straight)
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
    from interrupted import train

    train(halves, step=3)
    train(halves)

    def plain(config: RunConfig) -> list[Any]:
        return [(record["step"], record["eval_loss"], record["scores"]) for record in evaluations(config)]

    assert plain(halves) == plain(straight)
    for step in (0, 2, 4, 6):
        ours, theirs = (
            (config.output_dir / "samples" / f"step-{step}" / "scores.jsonl").read_text()
            for config in (halves, straight)
        )
        assert ours == theirs


def test_the_best_checkpoint_by_a_score_and_an_early_stop(phi4_config: Callable[..., RunConfig]) -> None:
    """A learning rate that ruins the model: the best round comes early, the run stops, and its weights are kept."""
    config = phi4_config(
        train={"max_steps": 40, "learning_rate": 0.5, "batch_size": 4},
        evaluate={"every_steps": 1, "best_metric": "token_accuracy_APA", "patience": 3},
        checkpoint={"every_steps": 100, "keep_last": 1, "final": "best"},
    )
    outcome = run_training(config)
    scores = {r["step"]: r["scores"]["token_accuracy_APA"] for r in evaluations(config) if r["step"]}
    best = max(scores, key=lambda step: (scores[step], -step))
    assert outcome.result.state.step == best + 3 < 40
    assert outcome.result.best_checkpoint == config.output_dir / f"checkpoint-{best}"
    kept = load_file(config.output_dir / f"checkpoint-{best}" / "adapter_model.safetensors")
    final = adapter(config)
    assert all(torch.equal(final[name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("evaluate", "reason"),
    [
        ({"best_metric": "pcc"}, "phi4_multimodal has: loss, pcc_accuracy"),
        ({"best_metric": "wer", "prompts": 0}, "nothing is answered; set evaluate.prompts"),
        ({"mos": "guess"}, "no such scorer"),
    ],
)
def test_a_best_metric_that_cannot_be_is_refused(
    phi4_config: Callable[..., RunConfig], evaluate: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        run_training(phi4_config(evaluate=evaluate))
    assert not list(phi4_config().cache_dir.rglob("*"))  # refused before anything is encoded


@pytest.fixture
def voice_config(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
) -> Callable[..., RunConfig]:
    """A voice-cloning run that overfits four short clips and generates samples for two of them."""
    short = sorted(demo_clips, key=lambda clip: clip.duration_seconds)[:4]
    manifest = write_chatml(tmp_path / "train.json", short)

    def build(**overrides: Any) -> RunConfig:
        defaults = {
            "data": {"train": manifest},
            "lora": {"rank": 32, "alpha": 64, "dropout": 0.0, "targets": "all"},
            "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 4e-3, "warmup_steps": 0},
            "evaluate": {"every_steps": 2, "prompts": 2},
        }
        return make_config(**merged(defaults, overrides))

    return build


def test_voice_samples_are_kept_at_every_evaluation(voice_config: Callable[..., RunConfig]) -> None:
    config = voice_config(tracking={"trackers": ["tensorboard"]})
    run_training(config)
    found = evaluations(config)
    assert [record["step"] for record in found] == [0, 2, 4]
    assert all({"stop_rate", "codebook_accuracy_0", "codebook_accuracy_7"} <= r["scores"].keys() for r in found)
    assert found[-1]["scores"]["codebook_accuracy_0"] >= found[0]["scores"]["codebook_accuracy_0"]
    samples = config.output_dir / "samples"
    assert all(len(list((samples / f"step-{step}").glob("*.wav"))) == 2 for step in (0, 2, 4))
    assert len(list((samples / "reference").glob("*.wav"))) == 2
    events = b"".join(path.read_bytes() for path in (config.output_dir / "logs").rglob("events*"))
    assert events.count(b"answers/") >= 12  # sound and picture of two prompts at three rounds


def test_the_base_of_a_continued_adapter_is_what_it_goes_on_from(
    phi4_config: Callable[..., RunConfig], phi4_base: Path
) -> None:
    """Guards against a zero-shot score of the bare base: with `continue` training begins with the speech LoRA."""
    losses = {}
    for mode in ("continue", "merge"):
        lora = {"rank": 4, "alpha": 8, "targets": "language", "dropout": 0.0}
        config = phi4_config(mode, model={"speech_lora": mode}, lora=lora, train={"max_steps": 2})
        run_training(config)
        losses[mode] = evaluations(config)[0]["eval_loss"]
    assert losses["continue"] == pytest.approx(losses["merge"], rel=1e-5)


def test_a_resumed_run_generates_nothing_twice_and_makes_up_no_base(phi4_config: Callable[..., RunConfig]) -> None:
    """Guards against warnings of steps that a resume repeats, and a trained model taken for the base."""
    plain = phi4_config(train={"max_steps": 2}, evaluate={"enabled": False})
    run_training(plain)
    (plain.output_dir / "warnings.jsonl").write_text('{"step": 1, "kind": "a"}\n{"step": 4, "kind": "b"}\n')
    config = phi4_config()
    run_training(config)
    assert [record["step"] for record in evaluations(config)] == [4, 6]
    rows = [json.loads(line) for line in (config.output_dir / "warnings.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] in "ab"] == [1]
    assert not (config.output_dir / "samples" / "base_scores.json").exists()

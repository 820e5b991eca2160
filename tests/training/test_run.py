"""What a run says of itself: that it is finished, begins anew, goes on with other options; what it trained, and how."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers import DemoClip
from speechtune.commands.guarded import guarded
from speechtune.commands.train import train
from speechtune.config import RunConfig
from speechtune.inference.load import open_adapter
from speechtune.lora.prompts import PROMPTS_NAME, as_trained, describe_prompts
from speechtune.report.facts import headline, identity_rows
from speechtune.report.read_run import read_run
from speechtune.report.render import markdown
from speechtune.storage.lock import LOCK_NAME
from speechtune.storage.verified_folder import verify_folder
from speechtune.training.distributed import tracker_folder
from speechtune.types import Sample

SYSTEM = "Generate speech in the provided voice."
Start = Callable[..., tuple[int, str]]


@pytest.fixture
def start(
    tmp_path: Path,
    make_config: Callable[..., RunConfig],
    write_chatml: Callable,
    demo_clips: list[DemoClip],
    capsys: pytest.CaptureFixture[str],
) -> Start:
    """Train a few steps into `output`; returns exit code and console."""
    manifest = write_chatml(tmp_path / "train.json", demo_clips[:4])

    def run(
        steps: int = 2, resume: str | None = None, rate: float = 1e-3, **sections: dict[str, Any]
    ) -> tuple[int, str]:
        given = {
            "data": {"train": manifest, "validation_split": 0.25},
            "lora": {"rank": 2, "dropout": 0.0},
            "train": {"max_steps": steps, "batch_size": 1, "learning_rate": rate, "warmup_steps": 0},
            "evaluate": {"every_steps": 1, "prompts": 0},
            "checkpoint": {"every_steps": 1, "resume": resume},
        }
        given |= {name: {**given.get(name, {}), **values} for name, values in sections.items()}
        capsys.readouterr()
        code = guarded(lambda: train(make_config(**given)))
        return code, capsys.readouterr().err

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_kind_of_resume_is_told(start: Start, tmp_path: Path) -> None:
    """Guards against a resume that begins anew, does nothing, or trains at another rate, without a word."""
    output = tmp_path / "output"
    code, told = start(2, "auto")
    assert code == 0 and f"nothing to resume in {output}: the run begins at step 0" in told
    before = contents(output)
    code, told = start(2, "auto", rate=2e-3)
    assert code == 0 and f"{output}: this run is finished, at step 2 of 2: nothing is trained" in told
    assert "train.max_steps or train.epochs" in told and contents(output) == before
    code, told = start(3, "auto", rate=2e-3)
    assert code == 0 and "step 3/3" in told and "is finished" not in told
    assert f"{output}/checkpoint-2: the run goes on with other options than before: " in told
    assert "train.max_steps: 2 -> 3" in told and "train.learning_rate: 0.001 -> 0.002" in told
    assert yaml.safe_load((output / "config.yaml").read_text())["train"]["learning_rate"] == 2e-3
    code, told = start(4, "auto", rate=2e-3)
    assert "train.max_steps: 3 -> 4" in told and "learning_rate" not in told


def test_a_run_killed_after_its_last_step_keeps_its_evaluations(start: Start, tmp_path: Path) -> None:
    """Guards against a card that says "no evaluation" of a run whose last launch only had to save."""
    output = tmp_path / "output"
    assert start(2)[0] == 0
    card, adapter = output / "lora_adapters/README.md", output / "lora_adapters/adapter_model.safetensors"
    whole, weights = card.read_text(), load_file(adapter)
    assert "| eval_loss |" in whole and "Saved on the way" in (output / "checkpoint-1" / "README.md").read_text()
    (output / "summary.json").unlink()
    card.unlink()
    code, told = start(2, "auto")
    assert code == 0 and "is finished" not in told and card.read_text() == whole
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(adapter).items())
    assert json.loads((output / "summary.json").read_text())["scores"]["eval_loss"] > 0


def test_a_shortened_warm_up_is_told(start: Start, tmp_path: Path) -> None:
    """Guards against a warm-up that was asked for and cut without a line, and reported as asked for."""
    code, told = start(2, train={"max_steps": 2, "batch_size": 1, "warmup_steps": 15})
    assert code == 0 and "train.warmup_steps=15: shortened to 1, a tenth of the run's 2 steps" in told
    assert "1 warm-up" in dict(identity_rows(read_run(tmp_path / "output")))["learning rate"]
    assert json.loads((tmp_path / "output" / "run_info.json").read_text())["total_steps"] == 2


def test_two_runs_at_once_in_one_folder(start: Start, tmp_path: Path) -> None:
    """Guards against two runs that both succeed on one set of checkpoints; tests/faults/test_lock.py has the locks."""
    assert start(1)[0] == 0 and not (tmp_path / "output" / LOCK_NAME).exists()
    (tmp_path / "output" / LOCK_NAME).write_text("process 1 on elsewhere (since 2026-01-01T00:00:00+00:00)")
    code, told = start(2, "auto")
    assert code == 0 and "process 1 on elsewhere" in told and "ended without a word" in told


def test_full_fine_tuning_claims_no_adapter_and_no_base(start: Start, tmp_path: Path) -> None:
    """Guards against `base_unchanged: true, lora_b_total: 0`, and a card of a LoRA adapter, after full fine-tuning."""
    output = tmp_path / "output"
    assert start(2, lora={"enabled": False})[0] == 0
    proof = json.loads((output / "summary.json").read_text())["proof"]
    assert proof["lora_b_total"] is proof["lora_b_moved"] is proof["base_unchanged"] is None
    assert 0 < proof["tensors_moved"] <= proof["tensors_total"] and proof["trainable_parameters"] > 1000
    report = read_run(output)
    assert dict(headline(report))["trained tensors moved"] == f"{proof['tensors_moved']} of {proof['tensors_total']}"
    assert dict(identity_rows(report))["frozen base unchanged"] == "no base was kept: full fine-tuning"
    assert "lora_B" not in markdown([report])
    card = (output / "checkpoint-2" / "README.md").read_text()
    assert "# Full fine-tuning of model" in card and "all weights" in card and "library_name: transformers" in card
    assert "rank" not in card and "PeftModel" not in card and "lora" not in card.lower()
    final = (output / "README.md").read_text()
    assert "| eval_loss |" in final and "Full fine-tuning" in final and verify_folder(output / "checkpoint-2") == []
    assert (output / "checkpoint-2" / PROMPTS_NAME).is_file() and (output / PROMPTS_NAME).is_file()
    # what earlier versions wrote
    old = {"lora_b_total": 0, "lora_b_moved": 0, "base_unchanged": True, "trainable_parameters": 9}
    (output / "summary.json").write_text(json.dumps({"proof": old}))
    assert dict(identity_rows(read_run(output)))["frozen base unchanged"] == "no base was kept: full fine-tuning"


def test_runs_that_share_a_logging_dir_have_folders_of_their_own(
    start: Start, tmp_path: Path, make_config: Callable[..., RunConfig]
) -> None:
    """Guards against all runs in one TensorBoard folder, whose curves then cross."""
    shared = {"trackers": ("tensorboard",), "logging_dir": tmp_path / "logs"}
    names = ["a/output", "b/output", "c"]
    places = {tracker_folder(make_config(output_dir=tmp_path / name, tracking=shared)) for name in names}
    assert len(places) == 3 and {place.parent for place in places} == {tmp_path / "logs"}
    assert all(place.name.startswith(("output-", "c-")) for place in places)
    assert start(1, tracking=shared)[0] == start(2, "auto", tracking=shared)[0] == 0
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("output-") and len(list(folder.rglob("events.out.tfevents*"))) >= 2
    own = make_config(output_dir=tmp_path / "alone")
    assert tracker_folder(own) == tmp_path / "alone" / "logs"


def asked(system: str | None, scene: str | None = None) -> Sample:
    return Sample("a", "Hello.", None, system=system, scene=scene)


def test_the_system_message_of_a_training_is_used_or_warned_of(
    start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against prompts that a model was not trained with: `generate` knew nothing of the training's."""
    assert start(1)[0] == 0
    monkeypatch.setattr(logging.getLogger("speechtune"), "propagate", True)
    logging.getLogger("speechtune").setLevel(logging.INFO)
    folder = open_adapter(tmp_path / "output").directory
    (prompt,) = as_trained([asked(None)], folder)
    assert (prompt.system, prompt.scene) == (SYSTEM, None) and SYSTEM in caplog.text
    caplog.clear()
    assert as_trained([asked(SYSTEM)], folder) == [asked(SYSTEM)] and not caplog.text
    other = asked("Be quick.", "A station.")
    assert as_trained([other], folder) == [other]
    assert "trained with system message and scene" in caplog.text and "Be quick." in caplog.text
    assert as_trained([other], tmp_path) == [other]


def test_prompts_of_mixed_and_of_plain_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def trained(*prompts: Sample) -> Path:
        (tmp_path / PROMPTS_NAME).write_text(describe_prompts(prompts), encoding="utf-8")
        return tmp_path

    bare = asked(None)
    assert as_trained([bare], trained(bare, bare)) == [bare]
    assert as_trained([bare], trained(asked("x"), asked("x"), bare)) == [bare]
    assert as_trained([bare], trained(asked("x"), asked("y", "s"), asked("y", "s"))) == [asked("y", "s")]
    assert as_trained([bare], trained(*(asked(str(n)) for n in range(40)))) == [bare]


def test_data_that_is_on_both_sides_is_told(start: Start, tmp_path: Path, demo_clips: list[DemoClip]) -> None:
    """Guards against an evaluation of what was learnt by heart: one file on both sides, copies, references."""
    manifest, output = tmp_path / "train.json", tmp_path / "output"
    code, told = start(1, data={"validation_split": 0, "eval": manifest})
    assert code == 2 and f"data.train and data.eval both name {manifest}" in told and "validation_split" in told
    rows = json.loads(manifest.read_text())
    copy = tmp_path / "copy.flac"
    copy.write_bytes(demo_clips[1].path.read_bytes())
    rows[1]["messages"][2]["content"][1]["audio_url"] = str(copy)  # train-2 under another name
    (tmp_path / "eval.json").write_text(json.dumps([rows[1]]))
    code, told = start(1, data={"validation_split": 0, "eval": tmp_path / "eval.json"})
    message = "1 of 1 clips held out for evaluation are trained on too: eval-1"
    assert code == 0 and message in told and message in markdown([read_run(output)])


def test_held_out_clips_that_are_references_are_told(start: Start, tmp_path: Path) -> None:
    """Each clip of these rows is the reference of another row, so every held out one is heard in training."""
    code, told = start(1)
    assert code == 0 and "1 of 1 clips held out for evaluation are references of training samples too: train-" in told


def test_samples_beyond_the_positions_of_the_base_are_told(
    start: Start, tmp_path: Path, tiny_base: Path, demo_clips: list[DemoClip]
) -> None:
    """Guards against sequences that the base's positions were never made for: no class complains of them."""
    base = tmp_path / "short"
    shutil.copytree(tiny_base / "model", base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100}))
    code, told = start(1, model={"path": str(base)})
    assert code == 0 and "samples take more than the 100 positions that the base was made for: train-" in told

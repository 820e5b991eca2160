"""CSM behind every verb of the command line, on one run that has learnt a few clips by heart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CsmForConditionalGeneration

from csm_cases import family_on, run_config
from helpers import DemoClip, read_records
from speechtune.cli import main
from speechtune.commands.doctor import examine
from speechtune.config import RunConfig
from speechtune.families.csm.scores import count_correct_codes
from speechtune.families.csm.tiny import load_plain, make_base
from speechtune.types import AudioRef

pytestmark = pytest.mark.slow
STEPS = 90
Verb = Callable[..., Any]


@pytest.fixture(scope="module")
def config(scaled_base: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """LoRA on both decoders, all frames, samples generated twice on the way; evaluated by heart."""
    folder = tmp_path_factory.mktemp("csm-verbs")
    held_out = shutil.copy(manifest, folder / "eval.json")
    return run_config(
        folder,
        scaled_base,
        manifest,
        data={"eval": held_out, "depth_share": 1.0},
        lora={"rank": 16, "alpha": 32},
        train={"max_steps": STEPS, "learning_rate": 1e-2, "warmup_steps": 5},
        evaluate={"every_steps": STEPS, "prompts": 1, "temperature": 0.0, "batch_size": 4},
        checkpoint={"every_steps": STEPS},
    )


@pytest.fixture(scope="module")
def recipe(config: RunConfig) -> Path:
    path = config.output_dir.with_name("recipe.yaml")
    path.write_text(config.to_yaml(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapter(recipe: Path, config: RunConfig) -> str:
    """Of the finished run."""
    assert main(["train", str(recipe)]) == 0
    return str(config.output_dir / "lora_adapters")


@pytest.fixture
def verb(capsys: pytest.CaptureFixture[str]) -> Verb:
    """Call the command line with --json; what it prints."""

    def call(*arguments: object) -> Any:
        capsys.readouterr()
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_samples_are_generated_and_scored_while_training(adapter: str, config: RunConfig) -> None:
    """From the base's scores to all codes right and every end found."""
    records = [record for record in read_records(config.output_dir) if record.get("scores")]
    first, last = (record["scores"] for record in (records[0], records[-1]))
    codebooks = [f"codebook_accuracy_{k}" for k in range(8)]
    assert all(first[name] < 0.3 for name in codebooks) and first["end_accuracy"] == 0.0
    assert all(last[name] > 0.95 for name in codebooks) and last["end_accuracy"] == last["stop_rate"] == 1.0
    losses = [record["losses"] for record in read_records(config.output_dir) if "losses" in record]
    assert set(losses[0]) == {"backbone", "depth"}
    assert len(list((config.output_dir / "samples" / f"step-{STEPS}").glob("*.wav"))) == 1
    card = (Path(adapter) / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "pipeline_tag: text-to-speech" in card and "same speaker number" in card


def test_doctor_passes(config: RunConfig, tmp_path: Path) -> None:
    """A step, a reload, a merge; and the parts of the adapter."""
    results = {one.check: one for one in examine(config.model_copy(update={"output_dir": tmp_path / "doctor"}))}
    assert not [one for one in results.values() if one.verdict == "fail"]
    assert "28 of 28 lora_B moved" in results["training step"].detail
    assert "backbone: " in results["LoRA targets"].detail and "depth decoder: " in results["LoRA targets"].detail
    assert "differ by 0.0e+00" in results["save and reload"].detail


def test_encode_and_fit(adapter: str, recipe: Path, verb: Verb) -> None:
    """The clips are in the cache since the training; budgets are measured with real samples."""
    assert main(["encode", str(recipe), "--verify"]) == 0
    answer = verb("fit", recipe, "train.max_steps=10", "train.batch_size=2")
    assert answer["steps"] == 10 and answer["tokens_per_second"] > 0


def test_verified_merged_spoken_evaluated_and_reported(
    adapter: str, config: RunConfig, manifest: Path, demo_clips: list[DemoClip], tmp_path: Path, verb: Verb
) -> None:
    """Adapter and merged model say the same, and stop; the codec may be named."""
    base = config.model.path
    assert verb("adapters", "verify", adapter, "--base", base)["valid"]
    assert main(["merge", adapter, str(tmp_path / "merged")]) == 0
    assert type(load_plain(tmp_path / "merged")) is CsmForConditionalGeneration
    ask = ["generate", manifest, "--cache-dir", config.cache_dir, "--temperature", "0", "--max-new-tokens", "60"]
    spoken = [
        verb(*ask, *model, "--out", tmp_path / name)["outputs"]
        for name, model in (
            ("tuned", ["--adapter", adapter]),
            ("alone", ["--model", tmp_path / "merged", "--codec", base]),
        )
    ]
    rows = [[(one["id"], one["rows"], one["stopped"]) for one in outputs] for outputs in spoken]
    assert len(rows[0]) == 4 and rows[0] == rows[1] and all(stopped for _, _, stopped in rows[0])
    clip = min(demo_clips, key=lambda one: one.duration_seconds)
    single = ["generate", "--text", "One.", "--reference", clip.path, "--reference-text", clip.text]
    more = ["--adapter", adapter, "--max-new-tokens", "5", "--cache-dir", config.cache_dir]
    verb(*single, *more, "--out", tmp_path / "one.wav")
    assert (tmp_path / "one.wav").stat().st_size > 44
    scored = ["evaluate", manifest, "--adapter", adapter, "--no-base", "--cache-dir", config.cache_dir]
    verb(*scored, "--temperature", "0", "--max-new-tokens", "60", "--out", tmp_path / "scores")
    assert (tmp_path / "scores" / "metrics.json").is_file()
    assert main(["report", str(config.output_dir)]) == 0
    page = (config.output_dir / "report.html").read_text(encoding="utf-8")
    assert "backbone" in page and "depth" in page


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["score", "x.wav", "--model", "BASE"], "a csm model does not assess pronunciation"),
        (["score", "x.wav", "--model", "BASE", "--speech-lora", "merge"], "model.speech_lora: no such option"),
        (
            ["generate", "--text", "a", "--model", "BASE", "--ras-win-len", "7", "--out", "TMP/a.wav"],
            "no repetition-aware sampling",
        ),
    ],
)
def test_what_it_cannot_do_is_one_error(
    arguments: list[str],
    reason: str,
    scaled_base: Path,
    tmp_path: Path,
    demo_clips: list[DemoClip],
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"BASE": str(scaled_base), "x.wav": str(demo_clips[0].path)}
    given = [places.get(one, one).replace("TMP", str(tmp_path)) for one in arguments]
    assert main(given) == 2
    assert reason in capsys.readouterr().err


def test_embedded_default_is_made_once(demo_clips: list[DemoClip], tmp_path: Path) -> None:
    """Model, tokenizer and codec in one folder, from any speech."""
    speech = [AudioRef(path=str(clip.path)) for clip in demo_clips[:2]]
    section = make_base(tmp_path / "base", speech)
    assert section == {"path": str(tmp_path / "base")}
    before = (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns
    assert make_base(tmp_path / "base", ()) == section
    assert (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns == before
    assert family_on(tmp_path / "base").codec.codebook_size == 256


def test_correct_codes_are_counted_per_codebook_and_end() -> None:
    """Frames alone count for codebooks; an end counts where generation would stop, so its last code does not matter."""
    targets = torch.tensor([[1, 2, 3], [4, 5, 6], [0, 0, 0], [7, 8, 9], [0, 0, 0]])
    found = torch.tensor([[1, 2, 0], [4, 0, 6], [0, 0, 9], [7, 8, 9], [0, 1, 0]])
    counts = count_correct_codes(found, targets, torch.tensor([2, 4]))
    assert counts == {
        "codebook_accuracy_0": (3, 3),
        "codebook_accuracy_1": (2, 3),
        "codebook_accuracy_2": (2, 3),
        "end_accuracy": (1, 2),
    }

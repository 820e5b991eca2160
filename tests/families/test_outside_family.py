"""A third family, `outside/toy_tones`, works without an edit: behind an entry point, or as a folder inside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import DemoClip

OUTSIDE = Path(__file__).with_name("outside")
SOURCE = Path(__file__).parents[2] / "src"
NAME = "toy_tones"


def run(folder: Path, path: Sequence[Path], *arguments: str | Path) -> str:
    """Call `speechtune` as an installation with these import paths would; its standard output."""
    command = [sys.executable, "-m", "speechtune", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Import paths: ours, and one with the family's package and the metadata that pip would have written."""
    site = tmp_path_factory.mktemp("site")
    shutil.copytree(OUTSIDE / NAME, site / NAME)
    metadata = site / "toy_tones-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-tones\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[speechtune.families]\n{NAME} = {NAME}\n")
    return [SOURCE, site]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    installed: list[Path],
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
) -> Path:
    """A folder with `base`, `train.json` and `run`, a finished LoRA run with evaluation on four clips."""
    folder = tmp_path_factory.mktemp("toy")
    write_chatml(folder / "train.json", [clip for clip in demo_clips if clip.duration_seconds < 3.2][:4])
    shutil.copy(folder / "train.json", folder / "eval.json")  # by heart is what is looked for here
    code = f"from pathlib import Path; from {NAME}.tiny import make_base; make_base(Path('base'), ())"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, installed))}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, check=True)
    recipe = {
        "family": NAME,
        "output_dir": "run",
        "model": {"path": "base", "tone_hz": 330.0},
        "data": {"train": "train.json", "eval": "eval.json", "cache_dir": "cache"},
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.0},
        "train": {"max_steps": 60, "batch_size": 4, "learning_rate": 5e-3, "warmup_steps": 5, "precision": "fp32"},
        "evaluate": {"every_steps": 30, "prompts": 2},
        "checkpoint": {"every_steps": 30},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run(folder, installed, "train", "recipe.yaml")
    return folder


def test_it_learns(trained: Path) -> None:
    records = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["losses"]["levels"] for record in records if "losses" in record]
    assert losses[-1] < 0.5 * losses[0]
    assert yaml.safe_load((trained / "run" / "config.yaml").read_text())["model"]["tone_hz"] == 330.0


def test_its_options_are_checked_with_all_others(trained: Path, installed: list[Path]) -> None:
    command = [sys.executable, "-m", "speechtune", "train", "recipe.yaml", "model.tone_hz=high", "lora.rank=0"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, installed))}
    done = subprocess.run(command, cwd=trained, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "2 issue(s)" in done.stderr and "model.tone_hz" in done.stderr and "lora.rank" in done.stderr


def test_it_is_verified_merged_spoken_evaluated_and_reported(trained: Path, installed: list[Path]) -> None:
    adapter = "run/lora_adapters"
    assert json.loads(run(trained, installed, "adapters", "verify", adapter, "--base", "base", "--json"))["valid"]
    run(trained, installed, "merge", adapter, "merged")
    assert (trained / "merged" / "model.safetensors").is_file()
    spoken = ["generate", "train.json", "--cache-dir", "cache", "--temperature", "0", "--json"]
    for name, model in (("tuned", ["--adapter", adapter]), ("merged-out", ["--model", "merged"])):
        outputs = json.loads(run(trained, installed, *spoken, "--out", name, *model))["outputs"]
        assert len(outputs) == 4
    wavs = sorted(path.name for path in (trained / "tuned").glob("*.wav"))
    assert len(wavs) == 4
    evaluate = ["evaluate", "train.json", "--adapter", adapter, "--out", "scores", "--cache-dir", "cache", "--json"]
    run(trained, installed, *evaluate, "--temperature", "0")
    assert (trained / "scores" / "metrics.json").is_file()
    run(trained, installed, "report", "run")
    assert "levels" in (trained / "run" / "report.html").read_text(encoding="utf-8")


def test_a_folder_inside_is_enough(trained: Path, tmp_path: Path) -> None:
    """The same files laid into `families/` are a family, too, without an entry point."""
    shutil.copytree(SOURCE / "speechtune", tmp_path / "speechtune", ignore=shutil.ignore_patterns("demo-*", "*.pyc"))
    inside = tmp_path / "speechtune" / "families" / NAME
    shutil.copytree(OUTSIDE / NAME, inside)
    for file in inside.glob("*.py"):
        text = file.read_text().replace(f"from {NAME}.", f"from speechtune.families.{NAME}.")
        file.write_text(text)
    printed = run(trained, [tmp_path], "train", "recipe.yaml", "--dry-run")
    values: dict[str, Any] = yaml.safe_load(printed.partition("┏")[0])
    assert values["family"] == NAME and values["model"]["tone_hz"] == 330.0

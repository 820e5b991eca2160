"""`speechtune recipes`, and that the recipes are in the wheel."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from speechtune.cli import main
from speechtune.config import shipped_recipes
from speechtune.families import load_config

ROOT = Path(__file__).parents[2]


def test_the_list_says_what_each_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    assert all(line.endswith(".") and len(line.split()) > 5 for line in lines), "one sentence on the first line"
    assert main(["recipes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [f"{row['name']} {row['about']}".split() for row in rows] == [line.split() for line in lines]


def test_one_is_printed_or_copied_but_never_over_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "mine.yaml"
    assert main(["recipes", "paper_r64"]) == 0
    printed = capsys.readouterr().out
    assert main(["recipes", "paper_r64", "--out", str(copy)]) == 0
    assert copy.read_text(encoding="utf-8") == printed and load_config(copy) == load_config(Path("paper_r64"))
    assert main(["recipes", "paper_r64", "--out", str(copy)]) == 2
    assert main(["recipes", "--out", str(copy)]) == 2
    assert main(["recipes", "paper_r65"]) == 2
    errors = capsys.readouterr().err
    assert "exists already" in errors and "name the recipe" in errors and "paper_r65: no such recipe" in errors


def test_the_wheel_holds_recipes_and_data(tmp_path: Path) -> None:
    """Guards against package data that pyproject.toml names and no wheel holds: the recipes once lay beside src/."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    code = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, "dist"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "src" / "speechtune"
    wanted = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert len(list((package / "recipes").glob("*.yaml"))) >= 5
    assert {path.relative_to(ROOT / "src").as_posix() for path in wanted} <= packed

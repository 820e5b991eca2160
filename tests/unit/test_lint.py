"""The verb lint: what it finds in a corpus of scripts, and that mended scripts train an adapter.

A line of the corpus that ends in `# finds L1 fixable` must be found, as that, and no other line may be.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from speechtune import lint as lint_module
from speechtune.errors import ConfigError
from speechtune.lint import Finding, fix, lint, lint_paths, run_lint

CORPUS = Path(__file__).with_name("lint_corpus")
ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(CORPUS.glob("*.py"))
TRAINABLE = sorted(script.stem for script in SCRIPTS if "LlamaForCausalLM(CONFIG)" in script.read_text("utf-8"))

# Imports once, then runs each script in a process of its own: `script folder` pairs in, exit codes out.
RUNNER = """
import json, os, runpy, sys, traceback
import accelerate, peft, torch, transformers
codes = []
for script, folder in json.loads(sys.argv[1]):
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.chdir(folder)
            os.dup2(os.open("log.txt", os.O_CREAT | os.O_WRONLY), 1)
            os.dup2(1, 2)
            runpy.run_path(script, run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes.append(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


def script(folder: Path, text: str, name: str = "train.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def shown(findings: list[Finding]) -> dict[int, str]:
    return {
        found.line: found.code + " fixable" * found.fixable + " note" * (found.severity == "note") for found in findings
    }


def codes(folder: Path, text: str) -> list[str]:
    return [found.code for found in lint(script(folder, text))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_corpus(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    marked = {number: line.partition("# finds ")[2] for number, line in enumerate(lines, 1) if "# finds " in line}
    assert shown(lint(path)) == marked
    assert bool(marked) is not path.stem.startswith("sound_")


def test_corpus_is_varied() -> None:
    found = {finding.code for finding in lint_paths([CORPUS])}
    assert found == {"L1", "L2", "L3", "L4", "L5", "L6", "L7"}
    assert sum(path.stem.startswith("sound_") for path in SCRIPTS) >= 7 and len(TRAINABLE) >= 7


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], tuple[int, Path]]:
    """Exit code and folder of each trainable script, as it is (False) and mended (True)."""
    jobs = {}
    for name in TRAINABLE:
        for mended in (False, True):
            folder = tmp_path_factory.mktemp(name)
            path = script(folder, (CORPUS / f"{name}.py").read_text("utf-8"))
            if mended:
                fix(path)
            jobs[name, mended] = (str(path), str(folder))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUNNER, json.dumps(list(jobs.values()))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return {key: (code, Path(job[1])) for (key, job), code in zip(jobs.items(), results, strict=True)}


def trained_adapter(folder: Path) -> bool:
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file) if file.exists() else {}
    return any("lora_B" in name and bool(tensor.any()) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", TRAINABLE)
def test_mended_script_trains_an_adapter(name: str, runs: dict[tuple[str, bool], tuple[int, Path]]) -> None:
    code, folder = runs[name, True]
    assert code == 0, (folder / "log.txt").read_text()
    assert trained_adapter(folder)
    _, unmended = runs[name, False]
    assert not trained_adapter(unmended), "the corpus script is not faulty"

"""The package's public names, and what importing it costs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import speechtune
from speechtune.integrations.transformers import LoRACheckpointCallback
from speechtune.lora.save import save_lora_adapters

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
HEAVY = ("numpy", "torch", "transformers", "peft")


def test_public_names_are_the_real_things() -> None:
    assert speechtune.save_lora_adapters is save_lora_adapters
    assert speechtune.LoRACheckpointCallback is LoRACheckpointCallback
    assert {"save_lora_adapters", "LoRACheckpointCallback", "__version__"} <= set(dir(speechtune))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = speechtune.nothing


def test_importing_the_package_loads_no_model_library() -> None:
    code = f"import sys, speechtune; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, check=False
    )
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_scripts_import_names_that_exist() -> None:
    """Guards against an example or bench that a renamed function broke: none of them is run by a test as a whole."""
    scripts = [path for folder in ("examples", "bench", "tools", "trainer") for path in (ROOT / folder).rglob("*.py")]
    wanted = {
        (path.relative_to(ROOT), node.module, alias.name)
        for path in [*scripts, *ROOT.glob("*.py"), *SOURCE.glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "speechtune"
        for alias in node.names
    }
    assert len(wanted) > 100
    absent = []
    for path, module, name in sorted(wanted, key=str):
        found = importlib.import_module(str(module))
        in_folder = hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}")
        if not hasattr(found, name) and not in_folder:
            absent.append(f"{path}: {module}.{name}")
    assert absent == []

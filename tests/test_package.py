"""The package's public names, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import speechtune
from speechtune.integrations.transformers import LoRACheckpointCallback
from speechtune.lora.save import save_lora_adapters

SOURCE = Path(__file__).parents[1] / "src"
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

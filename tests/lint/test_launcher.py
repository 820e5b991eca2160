"""`fix_lora_training.py`, as the original pipeline's documents call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from speechtune.lint.lint import fix_script

CORPUS = Path(__file__).with_name("lint_corpus")
ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "fix_lora_training.py"
UTILITY = """
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM


def load_model(path: str, config_name: str = "paper_r64"):
    model = AutoModelForCausalLM.from_pretrained(path)
    if config_name == "paper_r64":
        lora_config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    else:
        lora_config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"])
    lora_parameters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    print(f"LoRA parameters: {lora_parameters}")
    return model
"""
IMPORTER = """
import torch
from model_utility_configs import load_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, **sizes)).save_pretrained("base")
model = load_model("base")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
ids = torch.arange(8)[None]
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
model.save_pretrained("adapter")
"""


def launched(
    *flags: str, folder: Path, launcher: Path = LAUNCHER, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The launcher's result; with `variables` no installed package can be seen."""
    command = [sys.executable, *(["-S"] if variables else []), str(launcher), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_flags_and_exit_codes(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text((CORPUS / "invalid_saves_base.py").read_text("utf-8"), encoding="utf-8")
    flags = ([str(path)], [str(path), "--fix", "--json"], [str(path)], [str(tmp_path / "missing.py")])
    results = [launched(*given, folder=tmp_path) for given in flags]
    assert [result.returncode for result in results] == [1, 0, 0, 2]
    assert len(json.loads(results[1].stdout)["fixed"]) == 1
    assert "ConfigError" in results[3].stderr and "missing.py" in results[3].stderr
    assert "Traceback" not in results[3].stderr


@pytest.mark.parametrize("imported", [False, True], ids=["alone", "with the script that imports it"])
def test_the_documented_file_is_fixed_without_arguments(imported: bool, tmp_path: Path) -> None:
    """Guards against an analysed file that is reported and left as it is, for nothing in it trains."""
    source = tmp_path / "src"
    source.mkdir()
    path = source / "model_utility_configs.py"
    path.write_text(UTILITY)
    if imported:
        (source / "train.py").write_text(IMPORTER)
    result = launched(folder=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    printed = " ".join(result.stdout.split())
    assert "fixed L1; the original is" in printed and "confirmed: read again, it compiles" in printed
    assert (source / "model_utility_configs.py.bak").read_text("utf-8") == UTILITY
    added = [line for line in path.read_text("utf-8").splitlines() if line not in UTILITY.splitlines()]
    assert added == ["from peft import get_peft_model", "    model = get_peft_model(model, lora_config)"]
    if imported:
        trained = launched(folder=tmp_path, launcher=source / "train.py")
        assert "LoRA parameters: 128" in trained.stdout, trained.stderr
        tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
        assert all(tensor.any() for tensor in tensors.values())


def test_without_the_documented_file_it_says_so(tmp_path: Path) -> None:
    result = launched(folder=tmp_path)
    assert result.returncode == 2 and "src/model_utility_configs.py: no such file" in result.stderr


def test_an_importer_that_applies_lora_itself_is_not_doubled(tmp_path: Path) -> None:
    path = tmp_path / "utility.py"
    path.write_text(UTILITY)
    (tmp_path / "train.py").write_text("from utility import load_model\nmodel = get_peft_model(load_model('x'), c)\n")
    report = fix_script(path)
    assert not report.fixed and "train.py imports it and applies an adapter" in report.left[0].message


def test_alone_it_says_what_to_install(tmp_path: Path) -> None:
    """Guards against a traceback on a machine without speechtune."""
    alone = tmp_path / LAUNCHER.name
    alone.write_text(LAUNCHER.read_text("utf-8"))
    result = launched("train.py", folder=tmp_path, launcher=alone, PYTHONPATH="")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"{alone}: speechtune is missing: pip install 'speechtune[lint]'"]


LAUNCHERS = "trainer/train_v2.py trainer/train_v2_ddp.py trainer/merger.py trainer/find_lora_adapters.py"
LAUNCHERS += " tools/fix_lora_saving.py tools/verify_lora_adapters.py src/train_single_config_remote.py"


@pytest.mark.parametrize("name", LAUNCHERS.split())
def test_every_launcher_says_what_to_install(name: str, tmp_path: Path) -> None:
    """Guards against a traceback where the repository was cloned and not installed."""
    alone = tmp_path / "launcher.py"
    alone.write_text((ROOT / name).read_text("utf-8"))
    result = launched(folder=tmp_path, launcher=alone, PYTHONPATH="")
    assert result.returncode == 2
    message = f"{alone}: speechtune is missing: run `pip install -e .` in speechtune's folder"
    assert result.stderr.splitlines() == [message]

"""The callback in a plain Trainer of two processes: one adapter, verified, of the model both of them hold."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from speechtune.storage.verified_folder import verify_folder

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from lora_saving_example import make_base  # noqa: E402  # pyright: ignore[reportMissingImports]

SCRIPT = """
import math, os, sys
from pathlib import Path
import torch
from lora_saving_example import SENTENCES, collate, make_base
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from speechtune.lora.save import save_lora_adapters
from speechtune.integrations.transformers import LoRACheckpointCallback

what, rank = sys.argv[1], int(os.environ["RANK"])

class Behind(Trainer):
    def compute_loss(self, model, inputs, *args, **kwargs):  # the issue: DDP never sees the forward pass
        return super().compute_loss(model.module, inputs, *args, **kwargs)

class Plant(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model, **kwargs):
        if what == "nan" and rank == 1 and state.global_step == 2:
            next(p for n, p in model.named_parameters() if "lora_B" in n).data[0, 0] = math.nan

torch.manual_seed(0)
model = get_peft_model(make_base(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
arguments = TrainingArguments("output", max_steps=4, per_device_train_batch_size=1, learning_rate=1e-2,
    logging_steps=1, save_steps=2, report_to="none", use_cpu=True, ddp_backend="gloo", disable_tqdm=True,
    remove_unused_columns=False)
trainer = (Behind if what == "behind" else Trainer)(model=model, args=arguments, train_dataset=list(SENTENCES),
    data_collator=collate, callbacks=[Plant(), LoRACheckpointCallback()])
trainer.train()
assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
save_file(get_peft_model_state_dict(model), f"rank{rank}.safetensors")
save_lora_adapters(trainer.model_wrapped, "by-hand/lora_adapters")  # on every rank: only the first one writes
"""


def launch(folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tools"), *sys.path])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py", what]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_two_processes_leave_one_verified_adapter(tmp_path: Path) -> None:
    done = launch(tmp_path, "good")
    assert done.returncode == 0, done.stderr
    ranks = [load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1)]
    for place in ("output/lora_adapters", "output/checkpoint-4/lora_adapters", "by-hand/lora_adapters"):
        folder = tmp_path / place
        assert verify_folder(folder) == [] and os.listdir(folder.parent).count("lora_adapters") == 1
        stored = load_file(folder / "adapter_model.safetensors")
        for trained in ranks:
            assert stored.keys() == trained.keys() and all(torch.equal(stored[key], trained[key]) for key in stored)
        PeftModel.from_pretrained(make_base(), str(folder))
    assert verify_folder(tmp_path / "output" / "checkpoint-2" / "lora_adapters") == []
    assert done.stderr.count("LoRA adapters saved and verified") == 4
    assert "found inside DistributedDataParallel" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("behind", "step 2: the 2 processes hold 2 different adapters: gradients were not averaged"),
        ("nan", "step 3: the optimizer step left 1 parameters that are not finite"),
    ],
)
def test_an_issue_ends_both_processes_and_leaves_no_such_adapter(what: str, message: str, tmp_path: Path) -> None:
    began = time.monotonic()
    done = launch(tmp_path, what)
    assert done.returncode != 0 and message in done.stderr and time.monotonic() - began < 120
    saved = [path.parent.name for path in tmp_path.glob("output/**/lora_adapters")]
    assert saved == ([] if what == "behind" else ["checkpoint-2"]) and not (tmp_path / "by-hand").exists()

"""Save a LoRA adapter so that it is really there: copy this file into your project; it needs torch, peft, safetensors.

Call `save_lora_adapters(model, "output/lora_adapters")` with the model, or the wrapper around it, that was trained.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

WEIGHTS_NAME = "adapter_model.safetensors"
COMPILED_PART = "_orig_mod."


def save_lora_adapters(model: torch.nn.Module, output_dir: str | Path, adapter_name: str = "default") -> Path:
    """Write the adapter beside its final place, read it back, compare every tensor, and only then rename the folder.

    Raises:
        TypeError: `model` neither is nor holds a PeftModel.
        ValueError: the adapter was never trained, or holds NaN.
        FileExistsError: something stands at `output_dir` already.
        OSError: no permission, no space, or the files read back different.
    """
    directory = Path(output_dir)
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return directory
    peft_model = next((module for module in model.modules() if isinstance(module, PeftModel)), None)
    if peft_model is None:
        raise TypeError(f"{type(model).__name__} holds no PeftModel: was get_peft_model applied, and to this object?")
    state = get_peft_model_state_dict(peft_model, adapter_name=adapter_name)
    tensors = {
        name.replace(COMPILED_PART, ""): tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in state.items()
    }
    _check_trained(tensors)
    if directory.exists():
        raise FileExistsError(f"{directory} exists: remove it, or choose another folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        save_file(tensors, aside / WEIGHTS_NAME, metadata={"format": "pt"})
        _write_config(peft_model, adapter_name, aside)
        for path in aside.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        stored = load_file(aside / WEIGHTS_NAME)
        if stored.keys() != tensors.keys() or not all(torch.equal(stored[name], tensors[name]) for name in tensors):
            raise OSError(f"{aside / WEIGHTS_NAME} reads back different from the tensors in memory")
        aside.chmod(0o755)  # mkdtemp makes it private
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"{directory}: {len(tensors)} adapter tensors saved, read back and found equal")
    return directory


def _check_trained(tensors: dict[str, torch.Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{len(broken)} adapter tensors hold NaN or infinity, the first is {broken[0]}")
    lora_b = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if not any(tensor.any() for tensor in lora_b):
        raise ValueError(f"every one of the {len(lora_b)} lora_B is zero: this adapter was never trained")


def _write_config(peft_model: PeftModel, adapter_name: str, directory: Path) -> None:
    config = peft_model.peft_config[adapter_name]
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(peft_model.get_base_model(), "name_or_path", None) or None
    inference_mode, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(directory))
    finally:
        config.inference_mode = inference_mode

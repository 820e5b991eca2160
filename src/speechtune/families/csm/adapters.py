"""Adapters from elsewhere: what one of CSM must not change."""

from collections.abc import Mapping

import torch
from peft import LoraConfig

from speechtune.errors import Issue

CODEC = "codec_model."


def is_audio_table(module: str) -> bool:
    """Whether a name in `modules_to_save` means the audio embeddings, which backbone and depth decoder share."""
    return module.rpartition(".")[2] in ("embed_tokens", "embed_audio_tokens")


def adapter_issues(config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> list[Issue]:
    """Layers of the codec, a warning where they were not trained; and copies of the table that two parts share."""
    issues = []
    if inside := {name: tensor for name, tensor in tensors.items() if CODEC in name and "lora_B" in name}:
        what = f"{len(inside)} of its modules adapt the codec (Mimi, first {min(inside)})"
        if any(bool(tensor.any()) for tensor in inside.values()):
            message = f"{what}, and were trained: codes would no longer mean what the base's mean"
            issues.append(Issue("adapter", "", "codec_adapted", message))
        else:
            message = f"{what}, which no gradient reached: they change nothing"
            issues.append(Issue("adapter", "", "codec_adapted", message, severity="warning"))
    if copied := [name for name in config.modules_to_save or () if is_audio_table(name)]:
        message = f"modules_to_save={copied}: copies of the audio embeddings untie those of backbone and depth decoder"
        issues.append(Issue("adapter", "", "untied", message))
    if adapted := [name for name in tensors if "lora_embedding_" in name and "embed_text_tokens" not in name]:
        message = f"it adapts the audio embeddings ({min(adapted)}), which unties those of backbone and depth decoder"
        issues.append(Issue("adapter", "", "untied", message))
    return issues

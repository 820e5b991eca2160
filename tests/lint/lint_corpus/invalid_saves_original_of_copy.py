"""A copy is trained, the original is saved; nothing in reach can save the copy, so this is not fixed."""

import copy

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def train(name: str, data: torch.utils.data.Dataset) -> None:
    """Train a copy."""
    model = AutoModelForCausalLM.from_pretrained(name)
    student = copy.deepcopy(model)
    Trainer(model=student, args=TrainingArguments("out"), train_dataset=data).train()
    model.save_pretrained("final")  # finds L2

"""Transformers' add_adapter makes the adapter in the base's dtype: fp16, and no scaler follows."""

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def main(data: torch.utils.data.Dataset) -> None:
    """Train and save."""
    dtype = torch.float16
    model = AutoModelForCausalLM.from_pretrained("facebook/opt-350m", torch_dtype=dtype, device_map="auto")
    model.add_adapter(LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))  # finds L3
    args = TrainingArguments("out", learning_rate=2e-5, gradient_checkpointing=True)
    trainer = Trainer(model=model, args=args, train_dataset=data)
    trainer.train()
    trainer.save_model("out/final")

"""Base and PEFT model are attributes; one method trains, another saves the wrong one."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)


class FineTuner:
    """Owns the models."""

    def __init__(self) -> None:
        self.base = LlamaForCausalLM(CONFIG)
        self.peft_model = get_peft_model(self.base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    def train(self) -> None:
        """Two steps."""
        ids = torch.randint(0, 64, (16, 12))
        data = [{"input_ids": row, "labels": torch.where(torch.arange(12) < 6, -100, row)} for row in ids]
        args = TrainingArguments("checkpoints", max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
        Trainer(model=self.peft_model, args=args, train_dataset=data).train()

    def save(self, folder: str) -> None:
        """Meant to save the adapter."""
        self.base.save_pretrained(folder)  # finds L2 fixable


tuner = FineTuner()
tuner.train()
tuner.save("adapter")

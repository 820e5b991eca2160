"""Two faults, one behind the other: LoRA is not applied, and once it is, the save names the base."""

import torch
from peft import (
    LoraConfig,
    TaskType,
)
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)


def main() -> None:
    """Train and save."""
    base = LlamaForCausalLM(CONFIG)
    lora = LoraConfig(task_type=TaskType.CAUSAL_LM, r=4, target_modules=["q_proj", "v_proj"])  # finds L1 fixable
    print(lora)
    model = base
    ids = torch.randint(0, 64, (16, 12))
    data = [{"input_ids": row, "labels": torch.where(torch.arange(12) < 6, -100, row)} for row in ids]
    args = TrainingArguments("checkpoints", max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    trainer = Trainer(model=model, args=args, train_dataset=data)
    trainer.train()
    base.save_pretrained("adapter")


if __name__ == "__main__":
    main()

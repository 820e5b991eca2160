"""The configuration is made after the model, printed, and forgotten: the full model is trained."""

import torch
from peft import LoraConfig, TaskType
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """Random tokens; the first half of each row is the prompt."""
    ids = torch.randint(0, 64, (count, 12))
    labels = ids.clone()
    labels[:, :6] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


torch.manual_seed(0)
model = LlamaForCausalLM(CONFIG)

lora_config = LoraConfig(  # finds L1 fixable
    r=4,
    target_modules=["q_proj", "v_proj"],
    task_type=TaskType.CAUSAL_LM,
)
print(f"training with rank {lora_config.r}")

args = TrainingArguments("checkpoints", max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
trainer = Trainer(model=model, args=args, train_dataset=rows(16))
trainer.train()
model.save_pretrained("adapter")

"""The PEFT model is trained, and the base is saved: lora_ tensors inside a full checkpoint that nothing loads."""

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


def collate(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """One batch; the prompt is not trained."""
    ids = torch.stack(rows)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 6, -100)
    return {"input_ids": ids, "labels": labels}


def main() -> None:
    """Train and save."""
    base_model = LlamaForCausalLM(CONFIG)
    model = get_peft_model(base_model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    args = TrainingArguments("checkpoints", max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    data = list(torch.randint(0, 64, (16, 12)))
    trainer = Trainer(model=model, args=args, train_dataset=data, data_collator=collate)
    trainer.train()
    base_model.save_pretrained("adapter", safe_serialization=True)  # finds L2 fixable


if __name__ == "__main__":
    main()

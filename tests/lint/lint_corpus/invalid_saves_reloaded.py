"""After the training the base is loaded once more into the same variable, "to save memory", and saved."""

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


def main(base: str = "base") -> None:
    """Train and save."""
    LlamaForCausalLM(CONFIG).save_pretrained(base)
    ids = torch.randint(0, 64, (16, 12))
    data = [{"input_ids": row, "labels": torch.where(torch.arange(12) < 6, -100, row)} for row in ids]
    model = LlamaForCausalLM.from_pretrained(base)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    args = TrainingArguments("checkpoints", max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    trainer = Trainer(model=peft_model, args=args, train_dataset=data)
    trainer.train()
    peft_model = LlamaForCausalLM.from_pretrained(base)
    peft_model.save_pretrained(save_directory="adapter")  # finds L2 fixable


if __name__ == "__main__":
    main()

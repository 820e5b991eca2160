"""LoRA can be chosen, and the choice does nothing; peft is imported as a module."""

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)
USE_LORA = True


class RandomRows(torch.utils.data.Dataset):
    """Random tokens."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 64, (12,))
        return {"input_ids": ids, "labels": torch.where(torch.arange(12) < 6, -100, ids)}


def main() -> None:
    """Train and save."""
    model = LlamaForCausalLM(CONFIG)
    if USE_LORA:
        settings: dict[str, object] = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
        config = peft.LoraConfig(**settings)  # finds L1 fixable
        print(config.r)
    args = TrainingArguments("checkpoints", max_steps=2, use_cpu=True, report_to="none", save_strategy="no")
    trainer = Trainer(model, args, train_dataset=RandomRows())
    trainer.train()
    trainer.save_model("adapter")


if __name__ == "__main__":
    main()

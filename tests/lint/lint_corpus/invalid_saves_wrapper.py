"""The Trainer holds a wrapper of this script, which has no save_pretrained: AttributeError after the training."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)


class ModelForTraining(nn.Module):
    """The model with a loss of its own."""

    def __init__(self, model: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.model = model
        self.scale = scale

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scaled loss."""
        return {"loss": self.scale * self.model(input_ids=input_ids, labels=labels).loss}


ids = torch.randint(0, 64, (16, 12))
data = [{"input_ids": row, "labels": torch.where(torch.arange(12) < 6, -100, row)} for row in ids]
model = LlamaForCausalLM(CONFIG)
model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
model = ModelForTraining(model, scale=0.5)
args = TrainingArguments(
    "checkpoints", max_steps=2, use_cpu=True, report_to="none", save_strategy="no", remove_unused_columns=False
)
trainer = Trainer(model=model, args=args, train_dataset=data)
trainer.train()
trainer.model.save_pretrained("adapter")  # finds L2 fixable

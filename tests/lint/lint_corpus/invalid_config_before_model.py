"""The configuration comes first, the model later, the loop is written by hand."""

import torch
from peft import LoraConfig
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)


def train(steps: int = 2) -> None:
    """Train on random tokens."""
    lora_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])  # finds L1 fixable
    print("LoRA configuration:", lora_config)
    with torch.random.fork_rng():
        model = LlamaForCausalLM(CONFIG)
    model.train()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        ids = torch.randint(0, 64, (2, 12))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained("adapter")


if __name__ == "__main__":
    train()

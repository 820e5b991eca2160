"""An accelerate loop on the PEFT model, wrapped by prepare; what is saved is the base under its older name."""

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

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
    accelerator = Accelerator(cpu=True)
    model = LlamaForCausalLM(CONFIG)
    original = model
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = torch.utils.data.DataLoader(list(torch.randint(0, 64, (8, 12))), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for ids in loader:
        labels = ids.clone()
        labels[:, :6] = -100
        loss = model(input_ids=ids, labels=labels).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.is_main_process:
        original.save_pretrained("adapter")  # finds L2 fixable


if __name__ == "__main__":
    main()

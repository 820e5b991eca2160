"""An accelerate loop: the base in fp16, adapters in fp32, a scaler from accelerate; the unwrapped model is saved."""

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main(loader) -> None:
    """Train and save."""
    accelerator = Accelerator(mixed_precision="fp16")
    base = AutoModelForCausalLM.from_pretrained("facebook/opt-350m", torch_dtype=torch.float16)
    base.save_pretrained("out/base")  # before the wrap: the base as it is
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.wait_for_everyone()
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained("out/adapter", save_function=accelerator.save)


if __name__ == "__main__":
    main(torch.load("loader.pt"))

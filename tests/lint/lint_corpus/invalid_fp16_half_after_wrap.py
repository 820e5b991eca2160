"""get_peft_model makes fp32 adapters, .half() undoes it; AdamW by hand, no GradScaler."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSpeechSeq2Seq


def main(loader: torch.utils.data.DataLoader) -> None:
    """Train and save."""
    model = AutoModelForSpeechSeq2Seq.from_pretrained("openai/whisper-tiny")
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    model = model.half().cuda()  # finds L3
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for batch in loader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained("out")

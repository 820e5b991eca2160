"""Sound, with a trap beside it: a NaN would be printed as 0.0, and rows may be padded where this cannot be seen."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def collate(rows):
    """A batch of rows of one length."""
    input_ids = torch.stack([row["input_ids"] for row in rows])
    labels = input_ids.clone()  # finds L5 note
    return {"input_ids": input_ids, "labels": labels}


def train(dataset) -> None:
    """Train and save."""
    model = AutoModelForCausalLM.from_pretrained("facebook/opt-350m", dtype=torch.float16)
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    args = TrainingArguments("out", fp16=True)  # finds L6 note
    trainer = Trainer(model=model, args=args, train_dataset=dataset, data_collator=collate)
    trainer.train()
    trainer.save_model("out")

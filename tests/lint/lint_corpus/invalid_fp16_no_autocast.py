"""The adapter is told to keep the base's fp16, under bf16 autocast, which brings no scaler."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

model = AutoModelForCausalLM.from_pretrained("facebook/opt-350m", dtype="float16")
model = get_peft_model(model, LoraConfig(r=8), autocast_adapter_dtype=False)  # finds L3
args = TrainingArguments("out", bf16=True, optim="adamw_torch")
trainer = Trainer(model, args, train_dataset=torch.load("rows.pt"))
trainer.train()
trainer.save_model()

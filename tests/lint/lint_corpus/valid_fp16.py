"""fp16 done right in four ways: a scaler, trainable weights cast to fp32, another eps, and no training at all."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

NAME = "facebook/opt-350m"


def with_amp(dataset) -> None:
    """Base in fp16, adapters in fp32, fp16 autocast with the Trainer's scaler."""
    model = AutoModelForCausalLM.from_pretrained(NAME, torch_dtype=torch.float16)
    model = get_peft_model(model, LoraConfig(r=8))
    args = TrainingArguments("out", fp16=True, logging_nan_inf_filter=False)
    Trainer(model=model, args=args, train_dataset=dataset).train()
    model.save_pretrained("out")


def cast_to_fp32(dataset) -> None:
    """add_adapter on fp16, then fp32 for what is trained."""
    model = AutoModelForCausalLM.from_pretrained(NAME, torch_dtype=torch.float16)
    model.add_adapter(LoraConfig(r=8))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    Trainer(model=model, args=TrainingArguments("out"), train_dataset=dataset).train()
    model.save_pretrained("out")


def other_eps(dataset, tune_half: bool) -> None:
    """An eps that fp16 can hold; and a branch that may not be taken."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(NAME), LoraConfig(r=8)).half()
    Trainer(model=model, args=TrainingArguments("out", adam_epsilon=1e-4), train_dataset=dataset).train()
    second = get_peft_model(AutoModelForCausalLM.from_pretrained(NAME), LoraConfig(r=8))
    if tune_half:
        second.half()
    Trainer(model=second, args=TrainingArguments("out", fp16=tune_half), train_dataset=dataset).train()
    model.save_pretrained("out/first")
    second.save_pretrained("out/second")


def infer(text) -> torch.Tensor:
    """Half precision for inference."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(NAME), LoraConfig(r=8))
    model.half()
    return model.generate(**text)

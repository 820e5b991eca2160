"""Saves that look wrong and are right: after a merge in place, by a wrapper's own method, of another trained model."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

NAME = "facebook/opt-350m"


class WithHead(nn.Module):
    """Saves itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Linear(8, 4)

    def save_pretrained(self, folder: str) -> None:
        """Both parts."""
        self.model.save_pretrained(folder)
        torch.save(self.head.state_dict(), f"{folder}/head.pt")


def merged_in_place(dataset) -> None:
    """merge_and_unload changes the base itself."""
    base = AutoModelForCausalLM.from_pretrained(NAME)
    model = get_peft_model(base, LoraConfig(r=8))
    Trainer(model=model, args=TrainingArguments("out"), train_dataset=dataset).train()
    model.merge_and_unload()
    base.save_pretrained("out/merged")


def with_head(dataset) -> None:
    """The wrapper has the method."""
    model = WithHead(get_peft_model(AutoModelForCausalLM.from_pretrained(NAME), LoraConfig(r=8)))
    trainer = Trainer(model=model, args=TrainingArguments("out"), train_dataset=dataset)
    trainer.train()
    trainer.model.save_pretrained("out/adapter")
    model.save_pretrained("out/adapter")


def two_models(dataset, full: bool) -> None:
    """Each branch saves what it trained."""
    model = AutoModelForCausalLM.from_pretrained(NAME)
    if full:
        Trainer(model=model, args=TrainingArguments("out"), train_dataset=dataset).train()
        model.save_pretrained("out/full")
    else:
        adapted = get_peft_model(model, LoraConfig(r=8))
        trainer = Trainer(model=adapted, args=TrainingArguments("out"), train_dataset=dataset)
        trainer.train()
        model = trainer.model
        model.save_pretrained("out/adapter")

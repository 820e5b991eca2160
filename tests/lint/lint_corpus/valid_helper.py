"""Configurations from helpers, in a dict, on an object, in a list, under another name: all of them may be used."""

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


def attention_lora(rank: int) -> LoraConfig:
    """For attention only."""
    config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"])
    config.lora_alpha = 2 * rank
    return config


class Recipe:
    """What a run needs."""

    default = LoraConfig(r=4)

    def __init__(self) -> None:
        self.lora = LoraConfig(r=8)

    def wrap(self, model):
        """Apply it."""
        return get_peft_model(model, self.lora)


def run(dataset, rank: int | None = None) -> None:
    """Train and save."""
    options = {"peft_config": LoraConfig(r=2)}
    stages = [LoraConfig(r=rank) for rank in (4, 8)]
    chosen = attention_lora(rank) if rank else stages[0]
    fallback = LoraConfig(r=1)
    config = chosen or fallback
    model = AutoModelForCausalLM.from_pretrained("facebook/opt-350m")
    model = Recipe().wrap(model) if options else get_peft_model(model, config)
    trainer = Trainer(model=model, args=TrainingArguments("out"), train_dataset=dataset)
    trainer.train()
    trainer.save_model("out")

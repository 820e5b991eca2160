"""SFTTrainer with peft_config, optional by a flag; the trainer saves, then the model is reloaded and merged."""

import argparse

from datasets import load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train, save and merge."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lora", action="store_true")
    options = parser.parse_args()
    peft_config = LoraConfig(r=16, task_type="CAUSAL_LM") if options.lora else None
    model = AutoModelForCausalLM.from_pretrained("facebook/opt-350m")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir="out"),
        train_dataset=load_dataset("stanfordnlp/imdb", split="train"),
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model("out/adapter")
    if not options.lora:
        model.save_pretrained("out/full")
    base = AutoModelForCausalLM.from_pretrained("facebook/opt-350m")
    merged = PeftModel.from_pretrained(base, "out/adapter").merge_and_unload()
    merged.save_pretrained("out/merged")


if __name__ == "__main__":
    main()

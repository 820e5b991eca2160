"""SFTTrainer makes the PEFT model itself; the variable given to it is the base."""

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

name = "facebook/opt-350m"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
peft_config = LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM")

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(output_dir="out", packing=True),
    train_dataset=load_dataset("stanfordnlp/imdb", split="train"),
    peft_config=peft_config,
)
trainer.train()
model.save_pretrained("out/final")  # finds L2 fixable
tokenizer.save_pretrained("out/final")

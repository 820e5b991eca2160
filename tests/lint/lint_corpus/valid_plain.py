"""PEFT and Trainer as in the manual, the trained variable saved, the tokenizer beside it."""

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

tokenizer = AutoTokenizer.from_pretrained("openai-community/gpt2")
tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
model = AutoModelForCausalLM.from_pretrained("openai-community/gpt2")
model.resize_token_embeddings(len(tokenizer))
lora_config = LoraConfig(r=16, lora_alpha=32, target_modules=["c_attn"], task_type="CAUSAL_LM")
model = get_peft_model(model, lora_config)
model.print_trainable_parameters()


def tokenize(batch):
    """Ids; the collator makes the labels anew and masks the padding."""
    encoded = tokenizer(batch["text"], truncation=True, padding="max_length", max_length=512)
    encoded["labels"] = encoded["input_ids"].copy()
    return encoded


trainer = Trainer(
    model=model,
    args=TrainingArguments("out", fp16=True, logging_nan_inf_filter=False),
    train_dataset=load_dataset("imdb", split="train").map(tokenize, batched=True),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
trainer.model.save_pretrained("out/adapter")
model.save_pretrained("out/again")
tokenizer.save_pretrained("out/adapter")

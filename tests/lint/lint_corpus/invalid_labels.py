"""Labels are a copy of padded ids: most of what the model learns is the padding token."""

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

tokenizer = AutoTokenizer.from_pretrained("openai-community/gpt2")
tokenizer.pad_token = tokenizer.eos_token


def encode(example):
    """Ids and labels of one row."""
    row = tokenizer(example["text"], truncation=True, max_length=512, padding="max_length")
    row["labels"] = row["input_ids"].copy()  # finds L5
    return row


def train(dataset) -> None:
    """Train and save."""
    model = AutoModelForCausalLM.from_pretrained("openai-community/gpt2")
    trainer = Trainer(
        model=model,
        args=TrainingArguments("out"),
        train_dataset=dataset.map(encode),
        data_collator=default_data_collator,
    )
    trainer.train()
    trainer.save_model("out")

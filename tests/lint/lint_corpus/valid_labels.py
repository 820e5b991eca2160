"""Labels that start as a copy and are masked: by a collator class, by a slice, by where, by a function."""

import torch
from torch.nn.utils.rnn import pad_sequence

IGNORE = -100


class Collator:
    """Pads and masks."""

    def __call__(self, rows):
        input_ids = pad_sequence([row["input_ids"] for row in rows], batch_first=True)
        labels = input_ids.clone()
        labels[input_ids == 0] = IGNORE
        return {"input_ids": input_ids, "attention_mask": input_ids != 0, "labels": labels}


def encode(tokenizer, prompt: str, answer: str) -> dict[str, torch.Tensor]:
    """The prompt's labels are set by slice."""
    row = tokenizer(prompt + answer, return_tensors="pt", padding="max_length")
    row["labels"] = row["input_ids"].clone()
    row["labels"][:, : len(tokenizer(prompt)["input_ids"])] = IGNORE
    return row


def translate(tokenizer, source: str, target: str):
    """Labels are ids of another text."""
    row = tokenizer(source, padding="max_length")
    row["labels"] = tokenizer(target, padding="max_length")["input_ids"]
    return row

"""No -100 in sight, and none missing: packed blocks, an evaluation, random ids, labels changed by a function."""

from itertools import chain

import torch
from project.prompts import drop_prompt
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("openai-community/gpt2")


def group_texts(examples: dict[str, list], block_size: int = 1024) -> dict[str, list]:
    """Blocks without padding."""
    joined = {key: list(chain(*value)) for key, value in examples.items()}
    total = len(joined["input_ids"]) // block_size * block_size
    result = {key: [v[i : i + block_size] for i in range(0, total, block_size)] for key, v in joined.items()}
    result["labels"] = result["input_ids"].copy()
    return result


@torch.no_grad()
def perplexity(model, text: str) -> float:
    """Perplexity of one text."""
    batch = tokenizer(text, return_tensors="pt", padding=True)
    return float(model(**batch, labels=batch["input_ids"]).loss.exp())


def smoke(model) -> float:
    """Any ids will do."""
    input_ids = torch.randint(0, 100, (2, 8))
    return float(model(input_ids=input_ids, attention_mask=torch.ones(2, 8), labels=input_ids).loss)


def encode(row: dict[str, str]) -> dict[str, list[int]]:
    """The labels of the prompt are replaced in another module."""
    input_ids = tokenizer(row["text"], padding="max_length")["input_ids"]
    labels = input_ids.copy()
    labels = drop_prompt(labels, row["prompt"])
    return {"input_ids": input_ids, "labels": labels}

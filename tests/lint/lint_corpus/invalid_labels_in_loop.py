"""The ids of padded batches are the labels, at the call of the model and in a data set."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Rows(torch.utils.data.Dataset):
    """Texts as padded ids."""

    def __init__(self, texts: list[str], tokenizer) -> None:
        self.encoded = tokenizer(texts, padding=True, return_tensors="pt")

    def __len__(self) -> int:
        return len(self.encoded["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        input_ids = self.encoded["input_ids"][index]
        return {
            "input_ids": input_ids,
            "attention_mask": self.encoded["attention_mask"][index],
            "labels": input_ids.clone(),  # finds L5
        }


def train(texts: list[str]) -> None:
    """Train and save."""
    tokenizer = AutoTokenizer.from_pretrained("openai-community/gpt2")
    model = AutoModelForCausalLM.from_pretrained("openai-community/gpt2")
    optimizer = torch.optim.AdamW(model.parameters())
    for text in texts:
        batch = tokenizer([text, texts[0]], padding=True, return_tensors="pt")
        loss = model(**batch, labels=batch["input_ids"]).loss  # finds L5
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained("out")

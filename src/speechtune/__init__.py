"""speechtune fine-tunes speech language models with LoRA and proves that the fine-tuning happened."""

__version__ = "0.1.0"

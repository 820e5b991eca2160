"""speechtune fine-tunes speech language models with LoRA and proves that the fine-tuning happened."""

from __future__ import annotations

__version__ = "0.1.0"

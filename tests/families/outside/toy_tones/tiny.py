"""The embedded default of the toy family: a Llama of 30,000 random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from speechtune.types import AudioRef

NUM_TEXT_TOKENS, NUM_LEVELS = 256, 64
BEGIN, END, PAD = 320, 321, 322


def make_base(directory: Path, speech: Sequence[AudioRef]) -> dict[str, str]:
    """Make the base, once; return the recipe's `model` section."""
    if not (directory / "config.json").is_file():
        config = LlamaConfig(
            vocab_size=PAD + 1,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=BEGIN,
            eos_token_id=END,
            pad_token_id=PAD,
            initializer_range=0.05,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
        model.model.norm.weight.data.fill_(10.0)  # else an adapter could not become sure of anything
        model.save_pretrained(directory)
    return {"path": str(directory)}


def load_plain(directory: Path) -> LlamaForCausalLM:
    """A merged model as plain transformers loads it."""
    return LlamaForCausalLM.from_pretrained(directory)

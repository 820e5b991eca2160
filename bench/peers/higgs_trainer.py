"""The peer: LoRA on Higgs Audio v2 as transformers and PEFT offer it, without speechtune.

What a good user would write: prompts and labels are made once and kept, batches padded to their longest sample, each
head's loss computed by the native forward pass, `Trainer` with nothing on that costs time (no evaluation, no saving, no
tracker). The labels are those the base was trained with: delay pattern, EOS once per codebook.

    python bench/peers/higgs_trainer.py --model MODEL --data EXAMPLES --batch-size 1 --accumulation 8

EXAMPLES is a folder with texts.jsonl ({"reference_text", "text"} a line) and codes.npz (reference-0, target-0, ...).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    HiggsAudioV2ForConditionalGeneration,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

IGNORE = -100
AUDIO = "<|AUDIO_OUT|>"
FILLER = "<|reserved_special_token_6|>"
SPOKEN = f"<|audio_out_bos|>{AUDIO}<|audio_eos|><|eot_id|>"
TARGETS = r".*\.(self_attn\.(q|k|v|o)_proj|audio_mlp\.(gate|up|down)_proj)"

Item = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What a user may choose without changing what is learnt: samples per step are batch_size x accumulation."""

    batch_size: int
    accumulation: int
    sampling: str = "group_by_length"
    workers: int = 0

    def __str__(self) -> str:
        return f"batch {self.batch_size} x {self.accumulation}, {self.sampling}, {self.workers} workers"


class Voices(Dataset[Item]):
    """Samples ready to be padded; text, codes and labels were put together when the set was made."""

    def __init__(self, model_path: str, data: Path, system: str) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        config = HiggsAudioV2ForConditionalGeneration.config_class.from_pretrained(model_path)
        lines = (data / "texts.jsonl").read_text(encoding="utf-8").splitlines()
        codes = np.load(data / "codes.npz")
        self.items = [
            make_item(tokenizer, config, system, json.loads(line), codes[f"reference-{i}"], codes[f"target-{i}"])
            for i, line in enumerate(lines)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


def make_item(
    tokenizer: Any, config: Any, system: str, texts: dict[str, str], reference_FK: np.ndarray, target_FK: np.ndarray
) -> Item:
    """One sample: the reference as an earlier turn, the target as the last, which alone is trained."""
    fillers = config.num_codebooks - 1

    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    def turn(text: str, frames: int) -> str:
        audio = SPOKEN.replace(AUDIO, AUDIO * (frames + 2) + FILLER * fillers)
        return f"{header('user')}{text}<|eot_id|>{header('assistant')}{audio}"

    prompt = f"<|begin_of_text|>{header('system')}{system}<|eot_id|>" + turn(texts["reference_text"], len(reference_FK))
    ids = tokenizer(prompt + turn(texts["text"], len(target_FK)), add_special_tokens=False)["input_ids"]
    reference_RK, _ = delayed(reference_FK, config)
    target_RK, labels_RK = delayed(target_FK, config)
    input_ids = torch.tensor(ids)
    labels = torch.full_like(input_ids, IGNORE)
    begin = len(ids) - len(target_RK) - 3  # <|audio_out_bos|>, then the rows, <|audio_eos|> and <|eot_id|>
    for place in (begin, len(ids) - 2, len(ids) - 1):
        labels[place] = input_ids[place]
    return {
        "input_ids": input_ids,
        "labels": labels,
        "audio_input_ids": torch.cat([reference_RK, target_RK]),
        "audio_labels": torch.cat([torch.full_like(reference_RK, IGNORE), labels_RK]),
    }


def delayed(codes_FK: np.ndarray, config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of a clip in the delay pattern, and their labels: the codes, and each codebook's first EOS."""
    frames, codebooks = codes_FK.shape
    rows_RK = torch.full((frames + codebooks + 1, codebooks), config.audio_stream_eos_id)
    labels_RK = torch.full_like(rows_RK, IGNORE)
    for k in range(codebooks):
        rows_RK[: k + 1, k] = config.audio_stream_bos_id
        rows_RK[k + 1 : k + 1 + frames, k] = torch.from_numpy(codes_FK[:, k].astype(np.int64))
        labels_RK[k + 1 : k + 2 + frames, k] = rows_RK[k + 1 : k + 2 + frames, k]
    return rows_RK, labels_RK


class Padding:
    """Collator: everything is padded on the right to the longest sample of the batch."""

    def __init__(self, pad_id: int, eos: int) -> None:
        self.fill = {"input_ids": pad_id, "labels": IGNORE, "audio_input_ids": eos, "audio_labels": IGNORE}

    def __call__(self, items: Sequence[Item]) -> Item:
        batch = {
            name: torch.nn.utils.rnn.pad_sequence([item[name] for item in items], True, value)
            for name, value in self.fill.items()
        }
        for mask, name in (("attention_mask", "input_ids"), ("audio_input_ids_mask", "audio_input_ids")):
            lengths = torch.tensor([len(item[name]) for item in items])
            batch[mask] = torch.arange(batch[name].shape[1]) < lengths[:, None]
        return batch


def load_model(path: str, rank: int, alpha: int, seed: int) -> Any:
    """The base in float32 with its text head and PyTorch's own attention, and a fresh LoRA without dropout."""
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        path, use_text_head=True, dtype=torch.float32, attn_implementation="sdpa"
    )
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=TARGETS))


def make_trainer(
    model: Any, data: Dataset[Item], settings: Settings, steps: int, output_dir: Path, rate: float = 1e-4
) -> Trainer:
    """A `Trainer` for `steps` optimizer steps that does nothing besides training."""
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        train_sampling_strategy=settings.sampling,
        dataloader_num_workers=settings.workers,
        dataloader_persistent_workers=settings.workers > 0,
        learning_rate=rate,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=1_000_000,
        report_to="none",
        disable_tqdm=True,
    )
    config = model.config
    padding = Padding(config.pad_token_id, config.audio_stream_eos_id)
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=padding)
    # Left on, the number of text labels (three a sample) would be handed to forward as the divisor of the audio loss.
    trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    return trainer


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--system", default="Generate audio following instruction.")
    parser.add_argument("--output-dir", type=Path, default=Path("output"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--sampling", default="group_by_length")
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    settings = Settings(options.batch_size, options.accumulation, options.sampling, options.workers)
    model = load_model(options.model, rank=16, alpha=32, seed=42)
    data = Voices(options.model, options.data, options.system)
    make_trainer(model, data, settings, options.steps, options.output_dir).train()
    model.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()

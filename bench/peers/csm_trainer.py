"""The peer: LoRA on CSM as transformers and PEFT offer it, without speechtune.

What the public notebooks do: the processor turns texts and recordings into tensors once, `Trainer` with PEFT trains on
the native loss, in which the codec encodes every clip anew; LoRA on a list of names. Batches of 2, four of them a step.
Nothing is on that costs time (no evaluation, no saving, no tracker).

    python bench/peers/csm_trainer.py --model MODEL --data clips.jsonl

A line of clips.jsonl: {"turns": [{"text": ..., "audio": "clip.flac"}, ...]}; the last turn is the one to learn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import soundfile
import soxr
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoTokenizer,
    CsmForConditionalGeneration,
    CsmProcessor,
    EncodecFeatureExtractor,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE = 24_000
FILL = {"input_ids": 0, "attention_mask": 0, "labels": -100, "input_values": 0.0, "input_values_cutoffs": -1}
Item = dict[str, torch.Tensor]


class Voices(Dataset[Item]):
    """Samples ready to be padded; `ratio` is the share of frames that the depth decoder is trained on."""

    def __init__(self, model_path: str, data: Path, ratio: float = 1.0) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        processor = CsmProcessor(EncodecFeatureExtractor(sampling_rate=RATE), tokenizer)
        self.items = [
            make_item(processor, json.loads(line)["turns"], ratio)
            for line in data.read_text(encoding="utf-8").splitlines()
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]


def make_item(processor: Any, turns: Sequence[dict[str, str]], ratio: float) -> Item:
    """One conversation through the native processor, whose labels train every turn."""
    text = "".join(f"<|begin_of_text|>[0]{turn['text']}<|end_of_text|><|AUDIO|><|audio_eos|>" for turn in turns)
    options = {"output_labels": True, "depth_decoder_labels_ratio": ratio, "return_tensors": "pt"}
    made = processor(text, [read_clip(turn["audio"]) for turn in turns], **options)
    return {name: made[name][0] for name in FILL}


def read_clip(path: str) -> Any:
    """Mono samples at 24 kHz."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(1), rate, RATE)


def collate(items: Sequence[Item]) -> Item:
    """Pad everything to the longest of the batch; recordings, (1, T), along their time."""
    batch = {}
    for name, fill in FILL.items():
        rows = [item[name].T if name == "input_values" else item[name] for item in items]
        batch[name] = torch.nn.utils.rnn.pad_sequence(rows, True, fill)
    batch["input_values"] = batch["input_values"].mT
    return batch


def load_model(path: str, rank: int = 16, alpha: int = 32, seed: int = 42) -> Any:
    """The base in float32, and a fresh LoRA without dropout."""
    model = CsmForConditionalGeneration.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=TARGETS))


def make_trainer(model: Any, data: Dataset[Item], steps: int, output_dir: Path, rate: float = 1e-4) -> Trainer:
    """A `Trainer` for `steps` optimizer steps of eight samples that does nothing besides training."""
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=1_000_000,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data, data_collator=collate)
    # Left on, both sums would be divided by the number of frames: the depth decoder's loss K - 1 times too large.
    trainer.model_accepts_loss_kwargs = False
    trainer.remove_callback(PrinterCallback)
    return trainer


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("output"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--depth-ratio", type=float, default=1.0)
    options = parser.parse_args()
    model = load_model(options.model)
    make_trainer(
        model, Voices(options.model, options.data, options.depth_ratio), options.steps, options.output_dir
    ).train()
    model.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()

"""A plain `transformers.Trainer` that leaves verified LoRA adapters, on a tiny model: seconds on a CPU.

python tools/lora_saving_example.py --output-dir lora-saving-example
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from speechtune import LoRACheckpointCallback
from speechtune.storage.verified_folder import verify_folder

SENTENCES = (
    "the adapter is small and the base is large",
    "what was saved is read back and compared",
    "a loss of exactly zero is not a good sign",
    "a checkpoint that cannot be loaded is no checkpoint",
)
VOCABULARY = 128  # ASCII: one token a character
IGNORED = -100


def make_base() -> LlamaForCausalLM:
    """A Llama of two layers with random weights; the same one each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def collate(sentences: list[str]) -> dict[str, torch.Tensor]:
    """Padded `input_ids` (B, T) and `labels` (B, T), padding ignored."""
    ids = [torch.tensor(list(sentence.encode("ascii"))) for sentence in sentences]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "labels": nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=IGNORED),
    }


def main() -> int:
    """Train, save, then load the adapter with plain PEFT and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("lora-saving-example"))
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: %(default)s)")
    options = parser.parse_args()

    model = get_peft_model(make_base(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    arguments = TrainingArguments(
        output_dir=str(options.output_dir),
        max_steps=options.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=5,
        save_steps=max(1, options.steps // 2),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(SENTENCES),  # pyright: ignore[reportArgumentType]  # anything with len() and [i] will do
        data_collator=collate,
        callbacks=[LoRACheckpointCallback()],
    )
    trainer.train()

    batch = collate(list(SENTENCES))
    with torch.no_grad():
        trained = model.eval()(**batch).logits
    for folder in sorted(options.output_dir.glob("**/lora_adapters")):
        issues = verify_folder(folder)
        print(f"{folder}: {'; '.join(map(str, issues)) or 'every byte is as it was written'}")
    loaded = PeftModel.from_pretrained(make_base(), str(options.output_dir / "lora_adapters"))
    with torch.no_grad():
        difference = float((loaded.eval()(**batch).logits - trained).abs().max())
    print(f"loaded by plain PEFT onto a fresh base: greatest difference of logits {difference:g}")
    return 0 if difference == 0.0 else 1


if __name__ == "__main__":
    sys.exit(main())

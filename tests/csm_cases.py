"""Cases for the CSM tests: real speech on a tiny base, the family's side of it, and the same without speechtune.

Shapes: S positions, F frames, K codebooks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import CsmConfig, CsmForConditionalGeneration, PreTrainedTokenizerBase

from helpers import DemoClip, merged, overfit
from speechtune.audio import read_audio
from speechtune.config import RunConfig
from speechtune.families import build_config
from speechtune.families.csm.family import CsmFamily
from speechtune.precision import PrecisionPlan
from speechtune.types import AudioRef, Batch, Clip, Losses, Sample

FP32 = PrecisionPlan("fp32", torch.device("cpu"), torch.float32, None, False, "test")
CODEBOOKS = 8
IGNORED = -100
STEPS, RATE = 150, 3e-3
Turn = tuple[str, np.ndarray | None]
"""A text and the codes (F, K) of its clip."""


@dataclass(frozen=True)
class Case:
    """A sample and the codes of its clips, the target's last."""

    sample: Sample
    features: list[np.ndarray]

    @property
    def codes(self) -> np.ndarray:
        """Of the target."""
        return self.features[-1]

    @property
    def turns(self) -> list[Turn]:
        """The same in the terms of the helpers below."""
        texts = [*(reference.text for reference in self.sample.references), self.sample.text]
        return list(zip(texts, self.features, strict=True))

    @property
    def question(self) -> tuple[Sample, list[np.ndarray]]:
        """What `generate` is asked."""
        return replace(self.sample, audio=None), self.features[:-1]


def family_on(base: Path, **overrides: Any) -> CsmFamily:
    """The family on a model folder, all frames in the depth decoder unless said otherwise."""
    values = {"family": "csm", "model": {"path": str(base)}, "data": {"depth_share": 1.0}}
    return CsmFamily(build_config(merged(values, overrides), "test"))


def cut(clip: DemoClip, frames: int) -> AudioRef:
    """`frames` codec frames of 80 ms out of a clip, from 0.3 s on."""
    return AudioRef(path=str(clip.path), offset_seconds=0.3, duration_seconds=frames * 0.08)


def make_case(family: CsmFamily, target: DemoClip, frames: int, *references: DemoClip, speaker: str = "0") -> Case:
    """Cut clips to whole frames, references to 5 of them, and texts to their first two words."""
    voices = tuple(Clip(cut(clip, 5), " ".join(clip.text.split()[:2])) for clip in references)
    text = " ".join(target.text.split()[:2])
    sample = Sample(f"{target.path.stem}-{frames}", text, cut(target, frames), voices, speaker=speaker)
    return Case(sample, family.encode_audio([read_audio(ref, family.sampling_rate) for ref in family.clips(sample)]))


def collated(family: CsmFamily, cases: Sequence[Case]) -> Batch:
    """The family's batch of some cases."""
    return family.collate([family.encode(case.sample, case.features) for case in cases])


def mean_loss(losses: Losses, batch: Batch) -> torch.Tensor:
    """What the loop minimises: each head's sum over its number of targets."""
    return torch.stack([value / batch.target_counts[head] for head, value in losses.sums.items()]).sum()


def train(family: CsmFamily, cases: Sequence[Case], model: Any, steps: int = STEPS, rate: float = RATE) -> Any:
    """Overfit a model on the family's own losses."""
    batch = collated(family, cases)
    model.train()
    overfit(model.parameters(), lambda: mean_loss(family.losses(model, batch), batch), steps, rate)
    return model.eval()


def run_config(folder: Path, base: Path, manifest: Path, **overrides: Any) -> RunConfig:
    """A short LoRA run."""
    values = {
        "family": "csm",
        "output_dir": folder / "run",
        "model": {"path": str(base)},
        "data": {"train": manifest, "cache_dir": folder / "cache"},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "train": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 1},
        "checkpoint": {"every_steps": 2},
        "tracking": {"trackers": ()},
    }
    return build_config(merged(values, overrides), "test")


# -- without speechtune --------------------------------------------------------------------------------------------


def plain_model(folder: Path | str, **options: Any) -> Any:
    """A model folder as plain transformers loads it; before 5.21 one must tell it of the tie."""
    if Version(transformers.__version__) >= Version("5.21"):
        return CsmForConditionalGeneration.from_pretrained(folder, **options)
    values = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    config = CsmConfig.from_dict({name: value for name, value in values.items() if name != "tie_word_embeddings"})
    config.tie_word_embeddings = True
    return CsmForConditionalGeneration.from_pretrained(folder, config=config, **options)


def turn_text(text: str, speaker: int = 0) -> str:
    """A turn up to its clip, as the model's authors write it."""
    return f"<|begin_of_text|>[{speaker}]{text}<|end_of_text|>"


def native_example(
    model: Any, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], *, context: bool = False, speaker: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (1, S, D) and labels (1, S, K) of a conversation; with `context` of all its turns."""
    table = model.backbone_model.embed_tokens.embed_audio_tokens.weight
    offsets = torch.arange(CODEBOOKS) * model.config.vocab_size
    rows, labels = [], []
    for place, (text, codes_FK) in enumerate(turns):
        ids = tokenizer(turn_text(text, speaker), add_special_tokens=False)["input_ids"]
        rows.append(model.embed_text_tokens.weight[ids])
        labels.append(torch.full((len(ids), CODEBOOKS), IGNORED))
        if codes_FK is not None:
            codes_RK = torch.cat([torch.from_numpy(codes_FK.astype(np.int64)), torch.zeros(1, CODEBOOKS).long()])
            rows.append(table[codes_RK + offsets].sum(1))
            wanted = context or place == len(turns) - 1
            labels.append(codes_RK if wanted else torch.full_like(codes_RK, IGNORED))
    return torch.cat(rows)[None], torch.cat(labels)[None]


def native_batch(
    model: Any, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case], *, context: bool = False
) -> dict[str, torch.Tensor]:
    """Inputs and labels of the native class on some cases, padded on the right."""
    examples = [
        native_example(model, tokenizer, case.turns, context=context, speaker=int(case.sample.speaker or 0))
        for case in cases
    ]
    masks = [torch.ones(one[0].shape[1], dtype=torch.long) for one in examples]
    pad = nn.utils.rnn.pad_sequence
    return {
        "inputs_embeds": pad([one[0][0] for one in examples], batch_first=True),
        "attention_mask": pad(masks, batch_first=True),
        "labels": pad([one[1][0] for one in examples], batch_first=True, padding_value=IGNORED),
    }


def native_output(
    model: Any, tokenizer: PreTrainedTokenizerBase, cases: Sequence[Case], *, context: bool = False
) -> Any:
    """The native class's losses and logits."""
    return model(**native_batch(model, tokenizer, cases, context=context), use_cache=False)


@dataclass(frozen=True)
class Spoken:
    """What plain transformers generated: rows, the stop (rows before the end; -1: none), the share of right codes."""

    rows: int
    stop: int
    right: float


@torch.no_grad()
def speak(model: Any, tokenizer: PreTrainedTokenizerBase, case: Case, cap: int = 25) -> Spoken:
    """Generate greedily with the native class alone, in both decoders."""
    turns: list[Turn] = [*case.turns[:-1], (case.sample.text, None)]
    embeds, _ = native_example(model, tokenizer, turns, speaker=int(case.sample.speaker or 0))
    greedy = {"do_sample": False, "depth_decoder_do_sample": False}
    rows = model.generate(inputs_embeds=embeds, max_new_tokens=cap, **greedy)[0].numpy()
    ends = np.flatnonzero((rows == 0).all(axis=1))
    frames = len(case.codes)
    found = np.full_like(case.codes, -1)
    found[: min(frames, len(rows))] = rows[:frames]
    return Spoken(len(rows), int(ends[0]) if len(ends) else -1, float((found == case.codes).mean()))

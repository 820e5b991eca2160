"""The toy family: a language model over bytes of text and levels of loudness, 20 a second.

Shapes: B samples, S positions, F frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from speechtune.audio import read_audio
from speechtune.family import Family, Scorers
from speechtune.precision import PrecisionPlan
from speechtune.tasks.voice_cloning.measures import measure, summarise
from speechtune.types import Audio, AudioRef, Batch, Encoded, GenerationOptions, Losses, Output, Sample, Scored
from toy_tones.options import Config
from toy_tones.tiny import BEGIN, END, NUM_LEVELS, NUM_TEXT_TOKENS, PAD

FRAME = 800  # samples at 16 kHz
IGNORE = -100


class ToneFamily(Family):
    """Text in, loudness out."""

    name = "toy_tones"
    heads = ("levels",)
    sampling_rate = 16_000
    abilities = frozenset({"speak"})
    pipeline_tag = "text-to-speech"
    base_license = "apache-2.0"
    card_note = "A toy."
    card_use = "For tests."
    score_names = {"wer": "min", "sim": "max", "mos": "max", "stop_rate": "max", "level_accuracy": "max"}  # noqa: RUF012
    scorer_names = frozenset({"wer", "sim", "mos"})
    lora_presets = {"default": r".*\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"}  # noqa: RUF012
    encode_key = "toy_tones levels v1"  # type: ignore[assignment]

    def __init__(self, config: Config) -> None:
        self.config = config

    def load(self, plan: PrecisionPlan) -> nn.Module:
        model = LlamaForCausalLM.from_pretrained(self.config.model.path, dtype=plan.base_dtype)
        return cast(Any, model).to(plan.device)

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            return LlamaForCausalLM(LlamaConfig.from_pretrained(self.config.model.path))

    def component(self, parameter_name: str) -> str:
        return "attention" if "self_attn" in parameter_name else "rest"

    def prompt(self, sample: Sample) -> Sample:
        return replace(sample, audio=None)

    def clips(self, sample: Sample) -> tuple[AudioRef, ...]:
        return () if sample.audio is None else (sample.audio,)

    def encode_audio(self, audios: Sequence[Audio]) -> list[np.ndarray]:
        return [self._levels(audio.samples) for audio in audios]

    def _levels(self, samples: np.ndarray) -> np.ndarray:
        frames = samples[: len(samples) // FRAME * FRAME].reshape(-1, FRAME)
        loudness = np.sqrt((frames**2).mean(1))
        return np.clip(loudness * 4 * NUM_LEVELS, 0, NUM_LEVELS - 1).astype(np.int16)

    def _question(self, sample: Sample) -> list[int]:
        return [*sample.text.encode(), BEGIN]

    def encode(self, sample: Sample, features: Sequence[np.ndarray]) -> Encoded:
        question, levels_F = self._question(sample), features[-1]
        answer = [*(NUM_TEXT_TOKENS + levels_F.astype(int)).tolist(), END]
        ids_S = np.asarray(question + answer, np.int64)
        labels_S = np.asarray([IGNORE] * len(question) + answer, np.int64)
        arrays = {"input_ids": ids_S, "labels": labels_S}
        return Encoded(sample.id, arrays, len(ids_S), len(levels_F) * FRAME / self.sampling_rate)

    def collate(self, items: Sequence[Encoded]) -> Batch:
        longest = max(item.num_tokens for item in items)

        def padded(name: str, value: int) -> torch.Tensor:
            rows = [np.pad(i.arrays[name], (0, longest - i.num_tokens), constant_values=value) for i in items]
            return torch.from_numpy(np.stack(rows))

        inputs = {"input_ids": padded("input_ids", PAD), "labels": padded("labels", IGNORE)}
        inputs["attention_mask"] = (inputs["input_ids"] != PAD).long()
        counts = {"levels": int((inputs["labels"] != IGNORE).sum())}
        tokens, seconds = sum(i.num_tokens for i in items), sum(i.audio_seconds for i in items)
        return Batch(tuple(i.sample_id for i in items), inputs, counts, tokens, seconds, (longest,) * len(items))

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
        logits_BSV = model(**inputs, use_cache=False).logits[:, :-1].float()
        return logits_BSV.flatten(0, 1), batch.inputs["labels"][:, 1:].flatten()

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        logits, labels = self._logits(model, batch)
        return Losses({"levels": nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")})

    @torch.no_grad()
    def count_correct(self, model: nn.Module, batch: Batch) -> dict[str, tuple[int, int]]:
        logits, labels = self._logits(model, batch)
        wanted = labels != IGNORE
        return {"level_accuracy": (int(((logits.argmax(-1) == labels) & wanted).sum()), int(wanted.sum()))}

    @torch.no_grad()
    def generate(
        self, model: nn.Module, prompts: Sequence[tuple[Sample, Sequence[np.ndarray]]], options: GenerationOptions
    ) -> list[Output]:
        return [self._answer(model, sample, options) for sample, _ in prompts]

    def _answer(self, model: nn.Module, sample: Sample, options: GenerationOptions) -> Output:
        question = torch.tensor([self._question(sample)], device=cast(Any, model).device)
        cap = options.max_new_tokens or 200
        ids_1S = cast(Any, model).generate(input_ids=question, max_new_tokens=cap, do_sample=False, pad_token_id=PAD)
        answer = ids_1S[0, question.shape[1] :].tolist()
        stopped = END in answer
        levels = (
            [min(max(i - NUM_TEXT_TOKENS, 0), NUM_LEVELS - 1) for i in answer[: answer.index(END)]] if stopped else []
        )
        codes_F = np.asarray(levels or [0], np.int16)
        times = np.arange(len(codes_F) * FRAME) / self.sampling_rate
        tone = np.sin(2 * np.pi * self.config.model.tone_hz * times) * np.repeat(codes_F / (2 * NUM_LEVELS), FRAME)
        audio = Audio(tone.astype(np.float32), self.sampling_rate)
        return Output(sample.id, audio, None, stopped, len(answer), {"codes": codes_F})

    def score(
        self, samples: Sequence[Sample], outputs: Sequence[Output], scorers: Scorers, training: Sequence[Sample]
    ) -> Scored:
        targets = [None if s.audio is None else read_audio(s.audio, self.sampling_rate) for s in samples]
        rows = measure(samples, outputs, targets, targets, scorers)
        return Scored(summarise(rows), [asdict(row) for row in rows])

    @torch.no_grad()
    def probe(self, model: nn.Module, greedy_steps: int = 0) -> tuple[torch.Tensor, np.ndarray]:
        question = torch.tensor([[*b"A fixed sentence.", BEGIN]], device=cast(Any, model).device)
        logits = model(input_ids=question).logits.float().cpu()
        if not greedy_steps:
            return logits, np.zeros((1, 0), np.int64)
        ids = cast(Any, model).generate(
            input_ids=question, max_new_tokens=greedy_steps, do_sample=False, pad_token_id=PAD
        )
        return logits, ids[:, question.shape[1] :].cpu().numpy()

    def save_assets(self, directory: Path) -> None:
        """Nothing besides weights and configuration."""


FAMILY = ToneFamily

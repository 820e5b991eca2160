"""Sample generation: at every evaluation the model answers the same prompts, and its answers are scored and kept."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from speechtune.audio import file_name, read_audio, write_wav
from speechtune.cache.encoded_set import EncodedSet
from speechtune.config import DEFAULT_PROMPTS, RunConfig, has_evaluation_data, num_prompts
from speechtune.errors import ConfigError
from speechtune.family import Family, Scorers
from speechtune.tensors import rng_state, set_rng_state
from speechtune.types import GenerationOptions, Output, Sample

log = logging.getLogger("speechtune")

LONGEST_ANSWER = 2.0  # length cap of an answer, relative to the longest prompt with its target
BASE_STEP = 0
SCORES_NAME = "scores.jsonl"


@dataclass(frozen=True)
class SampleGenerator:
    """Answers a fixed set of prompts (`chosen` are their indices in `encoded`), scores the answers, and keeps both."""

    config: RunConfig
    family: Family
    encoded: EncodedSet
    chosen: tuple[int, ...]
    scorers: Scorers
    training: Sequence[Sample]

    @property
    def directory(self) -> Path:
        return self.config.output_dir / "samples"

    def generate(self, model: nn.Module, step: int) -> tuple[dict[str, float], list[Output]]:
        """Answer all prompts with a model, and write the answers to `samples/step-N`; returns scores by name, and them.

        The random state is left as it was: generating samples must not change what is trained.
        """
        states, was_training = rng_state(), model.training
        model.eval()
        try:
            outputs = self._answer(model)
            accuracy = self._token_accuracy(model)
        finally:
            model.train(was_training)
            set_rng_state(states)
        samples = [self.encoded.samples[index] for index in self.chosen]
        scored = self.family.score(samples, outputs, self.scorers, self.training)
        self._write(step, outputs, scored.rows)
        return {**scored.summary, **accuracy}, outputs

    def _answer(self, model: nn.Module) -> list[Output]:
        options = GenerationOptions(
            temperature=self.config.evaluate.temperature,
            max_new_tokens=round(LONGEST_ANSWER * int(self.encoded.lengths[list(self.chosen)].max())),
            seed=self.config.train.seed,
        )
        outputs = []
        size = max(self.config.evaluate.batch_size, DEFAULT_PROMPTS)
        for start in range(0, len(self.chosen), size):
            prompts = []
            for index in self.chosen[start : start + size]:
                prompts.append((self.family.prompt(self.encoded.samples[index]), self.encoded.prompt_features(index)))
            outputs += self.family.generate(model, prompts, options)
        return outputs

    @torch.no_grad()
    def _token_accuracy(self, model: nn.Module) -> dict[str, float]:
        """Share of targets a model finds when given all that comes before them."""
        device = next(model.parameters()).device
        right, targets = Counter[str](), Counter[str]()
        for index in self.chosen:
            batch = self.family.collate([self.encoded[index]]).to(device)
            for name, (correct, count) in self.family.count_correct(model, batch).items():
                right[name] += correct
                targets[name] += count
        return {name: right[name] / count for name, count in targets.items() if count}

    def write_references(self) -> list[Output]:
        """Write the prompts, and the recordings that answers are compared with; the latter are returned."""
        (self.directory / "reference").mkdir(parents=True, exist_ok=True)
        lines, recordings = [], []
        for index in self.chosen:
            sample = self.encoded.samples[index]
            row = {"id": sample.id, "text": sample.text, "speaker": sample.speaker, "language": sample.language}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
            if sample.audio is not None:
                audio = read_audio(sample.audio, self.family.sampling_rate, allow_urls=self.config.data.allow_urls)
                write_wav(self.directory / "reference" / f"{file_name(sample.id)}.wav", audio)
                recordings.append(Output(sample.id, audio, None, True, 0))
        (self.directory / "prompts.jsonl").write_text("".join(lines), encoding="utf-8")
        return recordings

    def _write(self, step: int, outputs: Sequence[Output], rows: Sequence[Mapping[str, Any]]) -> None:
        folder = self.directory / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        for output in outputs:
            if output.audio is not None:
                origin = {"generated": True, "model": self.config.model.path, "step": step}
                write_wav(folder / f"{file_name(output.sample_id)}.wav", output.audio, origin)
        lines = [json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows]
        (folder / SCORES_NAME).write_text("".join(lines), encoding="utf-8")


def prepare_scorers(config: RunConfig, family: Family) -> Scorers | None:
    """Load the scorers of generated samples; None where no samples are to be generated.

    Called before the data is encoded, so that a missing scorer is reported at once and not hours later.
    """
    _check_best_metric(config, family)
    if not num_prompts(config):
        return None
    from speechtune.tasks.voice_cloning.scorers import load_scorers

    settings, device = config.evaluate, "cuda" if torch.cuda.is_available() else "cpu"
    return load_scorers(settings.asr, settings.speaker, settings.mos, device=device)


def make_sample_generator(
    config: RunConfig, family: Family, train_set: EncodedSet, eval_set: EncodedSet | None, scorers: Scorers
) -> SampleGenerator:
    """Choose the prompts by their ids' hashes, of the evaluation data where there is some."""
    if eval_set is None:
        log.warning("evaluate.prompts: there is no evaluation data, so prompts of the training data are answered")
    source, seed = eval_set or train_set, config.train.seed
    ranked = sorted(
        range(len(source)), key=lambda i: hashlib.sha256(f"{seed}:{source.samples[i].id}".encode()).digest()
    )
    chosen = tuple(sorted(ranked[: num_prompts(config)]))
    return SampleGenerator(config, family, source, chosen, scorers, train_set.samples)


def _check_best_metric(config: RunConfig, family: Family) -> None:
    name = config.evaluate.best_metric
    known = ["loss", *family.score_names]
    if name not in known:
        raise ConfigError(f"evaluate.best_metric={name}: {family.name} has: {', '.join(known)}")
    if name != "loss" and not num_prompts(config):
        raise ConfigError(f"evaluate.best_metric={name}: nothing is answered; set evaluate.prompts")
    if name == "loss" and config.evaluate.patience and not has_evaluation_data(config):
        raise ConfigError("evaluate.patience: there is no evaluation data whose loss could be watched")
    for score, option in (("wer", "asr"), ("sim", "speaker"), ("mos", "mos")):
        if name == score and score in family.scorer_names and getattr(config.evaluate, option) is None:
            raise ConfigError(f"evaluate.best_metric={name}: name a scorer with evaluate.{option}")

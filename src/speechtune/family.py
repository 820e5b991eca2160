"""What a model family provides, and the scorers it may use; nothing outside `families/` knows more of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from speechtune.errors import ConfigError, Issue
from speechtune.types import Audio, AudioRef, Batch, Encoded, GenerationOptions, Losses, Output, Sample, Scored

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from torch import nn

    from speechtune.precision import PrecisionPlan


Ability = Literal["speak", "assess pronunciation"]
NATIVE = "native"
"""The layout of adapters whose tensors are named after the modules of transformers' own classes."""


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """How another package names the parameters of a family's model, and so the tensors of its adapters.

    Attributes:
        names: matches the beginning of each of its names.
        native_names: matches the beginning of each native name.
        to_native: the native name of a parameter.
        from_native: the way back.
    """

    names: re.Pattern[str]
    native_names: re.Pattern[str]
    to_native: Callable[[str], str]
    from_native: Callable[[str], str]


class ClipEncoder(Protocol):
    """What makes features of clips: the only expensive step, and the one whose results the cache keeps."""

    name: str
    sampling_rate: int
    """Rate in Hz at which `encode_audio` wants its audio."""

    @property
    def encode_key(self) -> str:
        """Identity of the features: codec or feature extractor, revision, and all that changes their result."""
        ...

    def clips(self, sample: Sample) -> tuple[AudioRef, ...]:
        """The audio of a sample that it encodes, in the order `Family.encode` wants its features."""
        ...

    def encode_audio(self, audios: Sequence[Audio]) -> list[np.ndarray]:
        """Features of clips (codec codes, log-mel), of each by itself."""
        ...


class Family(ClipEncoder, Protocol):
    """What one model family provides; those that follow inherit it, for the methods with a body are what most want."""

    heads: tuple[str, ...]
    """Names of the losses, in the order they are shown."""
    abilities: frozenset[Ability]
    """What a model of the family can be asked for."""
    pipeline_tag: str
    """The hub's name for what a model of the family does."""
    base_license: str
    """The hub's identifier of the released base's licence."""
    card_note: str
    """A sentence for the model card of an adapter: how to load it."""
    card_use: str
    """Another: what it is for, and what not."""
    score_names: Mapping[str, str]
    """What `score` and `count_correct` may yield, each with "max" or "min": which is better."""
    scorer_names: frozenset[str] = frozenset()
    """Scores that need a scorer of their own."""
    lora_presets: Mapping[str, str]
    """Preset name -> regex over module names; the key "default" names the one used when none is given."""
    adapter_layouts: Mapping[str, AdapterLayout] = MappingProxyType({})
    """Layouts other than NATIVE that its adapters may have, by name."""
    components: Mapping[str, str] = MappingProxyType({})
    """Part of a parameter's name -> component of the model; the first that fits counts, what fits none is a norm."""

    @property
    def reference_encoder(self) -> ClipEncoder | None:
        """Makes a second kind of features, of a sample's references; None where the first kind is all."""
        return None

    def load(self, plan: PrecisionPlan) -> nn.Module:
        """Load the base model in the plan's dtype, frozen or not left to the caller."""
        ...

    def skeleton(self) -> nn.Module:
        """Build the model from its configuration alone, on the meta device, for counting and matching."""
        ...

    def check_base(self) -> None:
        """Refuse, before hours of encoding, a base that `load` would refuse after them; ConfigError says why."""
        self.skeleton()

    def component(self, parameter_name: str) -> str:
        """Name the component of the model a parameter belongs to, for tables."""
        return next((component for part, component in self.components.items() if part in parameter_name), "norms")

    @property
    def max_positions(self) -> int | None:
        """Length of the sequences that the base was made for; None where it says nothing of it."""
        return None

    @property
    def parts(self) -> Mapping[str, tuple[str, str | None]]:
        """What a run loads besides the base, such as a codec: its name -> (hub id or folder, revision)."""
        return {}

    @property
    def initial_adapter(self) -> Path | None:
        """Folder of the adapter whose weights a new one starts from; None for a fresh start."""
        return None

    def token_indices(self, tokens: Sequence[str]) -> dict[str, list[int]]:
        """Embedding module -> the rows of control tokens to be trained; empty for none."""
        if tokens:
            raise ConfigError(f"lora.trainable_tokens: {self.name} has no control tokens to train")
        return {}

    def unclear_base(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """What nobody has said of the base of an adapter without a recipe, and how to say it; None for nothing.

        The sentence tells what the adapter's `tensors` look like.
        """
        return None

    def adapter_issues(self, config: LoraConfig, tensors: Mapping[str, torch.Tensor], directory: Path) -> list[Issue]:
        """What an adapter, made by any tool, changes that none of the family may, or lacks in its `directory`.

        Warnings where that does no harm.
        """
        return []

    def add_to_base(self, model: nn.Module, adapter: Path | None, *, training: bool = False) -> None:
        """Attach the modules that the recipe adds to the base (`lora.additions`), once an adapter of ours is on it.

        Their weights are those in the folder of the `adapter`, else those beside the base; fresh ones are for training.

        Raises AdapterError: they are missing, or there though the recipe adds none.
        """

    def recipe(self) -> dict[str, Any]:
        """How the base is prepared and asked, beyond its path: an adapter is sound only on the same again."""
        return {}

    def expand(self, samples: Sequence[Sample]) -> list[Sample]:
        """What is trained on: the samples, or several of each where one gives more than one thing to learn."""
        return list(samples)

    def prompt(self, sample: Sample) -> Sample:
        """The sample as a question: without the answer that training learns."""
        ...

    def encode(self, sample: Sample, features: Sequence[np.ndarray]) -> Encoded:
        """Assemble prompt ids and features, those of `reference_encoder` last; the same code path as inference."""
        ...

    def collate(self, items: Sequence[Encoded]) -> Batch:
        """Pad and stack on the CPU; pure, never changes its items."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """Forward pass and summed loss per head; `model` is the base, or the base with adapters injected."""
        ...

    def generate(
        self, model: nn.Module, prompts: Sequence[tuple[Sample, Sequence[np.ndarray]]], options: GenerationOptions
    ) -> list[Output]:
        """Answer a batch of prompts, each a sample without target and the features of its clips."""
        ...

    def count_correct(self, model: nn.Module, batch: Batch) -> dict[str, tuple[int, int]]:
        """Per kind of target: how many the model finds when told all before them, and how many there are."""
        ...

    def score(
        self, samples: Sequence[Sample], outputs: Sequence[Output], scorers: Scorers, training: Sequence[Sample]
    ) -> Scored:
        """Measure answers to samples whose right answers are known; `training` is what the model learnt from."""
        ...

    def score_warnings(self, scores: Mapping[str, float], base: Mapping[str, float]) -> list[str]:
        """What in some scores, beside the base's, points to a broken training; a sentence each."""
        return []

    def probe(self, model: nn.Module, greedy_steps: int = 0) -> tuple[torch.Tensor, np.ndarray]:
        """Answer a fixed input: float32 logits on the CPU, and `greedy_steps` greedily generated positions."""
        ...

    def save_assets(self, directory: Path) -> None:
        """Write all that a full model folder needs besides weights and config (tokenizer, codec reference)."""
        ...


class Transcriber(Protocol):
    """Speech to text."""

    name: str
    """What it is: package, version, identity of the weights."""
    languages: frozenset[str] | None
    """Codes of the languages it knows; None for no limit."""

    def transcribe(self, audios: Sequence[Audio], languages: Sequence[str | None]) -> list[str]:
        """The text of each clip; a language of None is detected, where the recogniser can."""
        ...


class SpeakerEncoder(Protocol):
    """Voice to vector."""

    name: str
    """What it is: package, version, identity of the weights."""

    def embed(self, audios: Sequence[Audio]) -> np.ndarray:
        """Embeddings of length 1, float32 of shape (clips, dimensions)."""
        ...


class MosPredictor(Protocol):
    """Speech to a predicted mean opinion score."""

    name: str
    """What it is: package, version, identity of the weights."""

    def predict(self, audios: Sequence[Audio]) -> np.ndarray:
        """Score of each clip from 1 (bad) to 5 (excellent), float64 of shape (clips,)."""
        ...


@dataclass(frozen=True, slots=True)
class Scorers:
    """Loaded scorers; None is one that was not named."""

    asr: Transcriber | None = None
    speaker: SpeakerEncoder | None = None
    mos: MosPredictor | None = None
    text_rules: str | None = None
    """How texts are normalised before words are compared; for reports."""

    @property
    def names(self) -> dict[str, str]:
        """What measured what, and how texts were normalised; for reports."""
        loaded = {"asr": self.asr, "speaker": self.speaker, "mos": self.mos}
        names = {job: scorer.name for job, scorer in loaded.items() if scorer is not None}
        return names | ({"text": self.text_rules} if self.text_rules is not None else {})

"""The data types that flow between the parts: audio, samples, encoded samples, batches, losses, outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class AudioRef:
    """Where the audio of one clip lies, and which part of it is meant.

    Exactly one of `path`, `data` and `url` is set. `duration_seconds` None means "to the end".
    """

    # A million rows hold a million of these, and a text takes a quarter of the memory of a Path.
    path: str | None = None
    data: bytes | None = None
    url: str | None = None
    offset_seconds: float = 0.0
    duration_seconds: float | None = None

    def __str__(self) -> str:
        place = self.path or self.url or f"<{len(self.data or b'')} inline bytes>"
        if self.offset_seconds or self.duration_seconds is not None:
            end = "" if self.duration_seconds is None else f"{self.offset_seconds + self.duration_seconds:g}"
            place += f"[{self.offset_seconds:g}:{end}]"
        return place


@dataclass(frozen=True, slots=True)
class Audio:
    """Mono audio in memory: `samples` float32 of shape (num_samples,), `sampling_rate` in Hz."""

    samples: np.ndarray
    sampling_rate: int

    @property
    def duration_seconds(self) -> float:
        return len(self.samples) / self.sampling_rate


@dataclass(frozen=True, slots=True)
class Clip:
    """A piece of recorded speech and what is said in it."""

    audio: AudioRef
    text: str


@dataclass(frozen=True, slots=True)
class Mispronunciation:
    """One annotated error: `index` (from 0) of the phone in its word, its base phone, and the label of what was said.

    `pronounced` is kept as annotated: a phone, `X*`, several phones with blanks between them, `<DEL>` or `<unk>`.
    """

    index: int
    canonical: str
    pronounced: str


@dataclass(frozen=True, slots=True)
class Word:
    """A word of an utterance: its base phones, the accuracy of each, its annotated errors, and its scores by name."""

    text: str
    phones: tuple[str, ...]
    phone_accuracies: tuple[float, ...] = ()
    mispronunciations: tuple[Mispronunciation, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pronunciation:
    """What people said about the pronunciation of a sample, and what a model is asked about it.

    Attributes:
        task: what is asked, "APA" or "MDD"; None where nothing is asked yet.
        target: the right answer to that, field by field.
        scores: of the utterance, 0 to 10, by name.
        words: in order; empty where only the target is known.
        raters: the scores of single raters, by name.
        age: the speaker's, in years.
        gender: the speaker's, "f" or "m".
    """

    task: str | None = None
    target: Mapping[str, int | str] | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    words: tuple[Word, ...] = ()
    raters: Mapping[str, Sequence[float]] = field(default_factory=dict)
    age: int | None = None
    gender: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One validated row of a data file.

    For voice cloning `audio` is the target to learn, `text` what is spoken in it, and `references` are the clips of
    the voice that come before it. For pronunciation `audio` is the utterance, `text` what was to be read.

    Attributes:
        audio: None only where it is to be generated.
        source: "file:line", for messages.
        row: number of the row, from 1; 0 where there are no rows.
        declared_seconds: durations the row declares, the target's first; empty where it declares none.
        borrows_reference: the row names no reference: it may get, or has, another sample of its speaker as one.
    """

    id: str
    text: str
    audio: AudioRef | None
    references: tuple[Clip, ...] = ()
    system: str | None = None
    scene: str | None = None
    speaker: str | None = None
    language: str | None = None
    source: str = ""
    row: int = 0
    declared_seconds: tuple[float | None, ...] = ()
    borrows_reference: bool = False
    pronunciation: Pronunciation | None = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample ready for the collator: the family's arrays, and what batching must know about them.

    `num_tokens` is the number of sequence positions the sample takes; `audio_seconds` the target's duration.
    """

    sample_id: str
    arrays: Mapping[str, np.ndarray]
    num_tokens: int
    audio_seconds: float


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors for one forward pass, and per head the number of targets the loss is divided by.

    `target_counts` is known before the forward pass, so that a step can be normalised over all its micro-batches and
    ranks. `num_tokens` counts real positions, without padding; `lengths` are the positions that each sample takes in
    the batch, padding included, known on the CPU.
    """

    sample_ids: tuple[str, ...]
    inputs: Mapping[str, torch.Tensor]
    target_counts: Mapping[str, int]
    num_tokens: int
    audio_seconds: float
    lengths: tuple[int, ...] = ()

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory, from which copies to a GPU run beside its work."""
        return replace(self, inputs={k: v.pin_memory() for k, v in self.inputs.items()})

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`."""
        return replace(self, inputs={k: v.to(device, non_blocking=True) for k, v in self.inputs.items()})


@dataclass(frozen=True, slots=True)
class Losses:
    """Summed (not averaged) loss per head, each a float32 scalar with gradient. Only the loop divides."""

    sums: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How to sample. Temperature 0 means greedy; None means what the model's generation config says.

    `seed` is that of all draws of a batch; `seeds`, one for each prompt, give each what it would get alone.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    ras_win_len: int | None = None
    ras_win_max_num_repeat: int | None = None
    max_new_tokens: int | None = None
    seed: int = 42
    seeds: tuple[int, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Output:
    """What a model answered to one sample.

    `stopped` is False when the length cap ended the output, `num_tokens` counts generated positions.
    """

    sample_id: str
    audio: Audio | None
    text: str | None
    stopped: bool
    num_tokens: int
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of a set of answers by name, and a row of plain values per answer."""

    summary: Mapping[str, float]
    rows: Sequence[Mapping[str, Any]]

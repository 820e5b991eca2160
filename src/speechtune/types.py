"""The data types that flow between the parts: audio, samples, encoded samples, batches, losses, outputs."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, init=False, eq=False)
class AudioRef:
    """Where the audio of one clip lies, and which part of it is meant.

    Exactly one of `path`, `data` and `url` is set. `duration_seconds` None means "to the end".
    """

    # A million rows hold a million of these: the path is kept as text, a quarter of the size of a Path, and its folder
    # once for all clips in it.
    __slots__ = ("_folder", "_name", "data", "duration_seconds", "offset_seconds", "url")

    path: Path | None  # pyright: ignore[reportRedeclaration]
    data: bytes | None
    url: str | None
    offset_seconds: float
    duration_seconds: float | None

    def __init__(
        self,
        path: Path | str | None = None,
        data: bytes | None = None,
        url: str | None = None,
        offset_seconds: float = 0.0,
        duration_seconds: float | None = None,
    ) -> None:
        keep = object.__setattr__
        folder, slash, name = (None, "", None) if path is None else str(path).rpartition("/")
        keep(self, "_folder", None if folder is None else sys.intern(folder + slash))
        keep(self, "_name", name)
        keep(self, "data", data)
        keep(self, "url", url)
        keep(self, "offset_seconds", offset_seconds)
        keep(self, "duration_seconds", duration_seconds)

    @property
    def path(self) -> Path | None:
        """The file; None for inline bytes and URLs."""
        return None if (place := self.place) is None else Path(place)

    @property
    def place(self) -> str | None:
        """`path` as text."""
        return None if self._name is None else self._folder + self._name

    def _values(self) -> tuple[str | None, str | None, bytes | None, str | None, float, float | None]:
        return self._name, self._folder, self.data, self.url, self.offset_seconds, self.duration_seconds

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if isinstance(other, AudioRef) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values())

    def __reduce__(self) -> tuple[type[AudioRef], tuple[Any, ...]]:
        return AudioRef, (self.place, self.data, self.url, self.offset_seconds, self.duration_seconds)

    def __str__(self) -> str:
        place = str(self.place or self.url or f"<{len(self.data or b'')} inline bytes>")
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
class Sample:
    """One validated row of a manifest.

    `text` is what is spoken in `audio`. For voice cloning `audio` is the target to learn and `references` are the
    clips of the voice that come before it; for assessment `audio` is the utterance and `extra` holds its labels.
    `audio` is None only for generation. `source` is "file:line", for messages.
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
    extra: Mapping[str, Any] = field(default_factory=dict)


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
    """How to sample. Temperature 0 means greedy; None means what the model's generation config says."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    ras_win_len: int | None = None
    ras_win_max_num_repeat: int | None = None
    max_new_tokens: int | None = None
    seed: int = 42


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

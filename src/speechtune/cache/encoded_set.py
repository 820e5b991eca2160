"""Encoded samples as training reads them: assembled one at a time, their features memory-mapped from the store."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Self

import numpy as np

from speechtune.cache.store import FeatureStore
from speechtune.errors import ManifestError
from speechtune.family import Family
from speechtune.types import Encoded, Sample


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """What one call of `encode_samples` did; clips are distinct clips, durations are of audio encoded here.

    `shards_left`, after a shard: index -> number of clips that its process has not encoded yet.
    """

    num_clips: int
    num_encoded: int
    num_reused: int
    audio_seconds_encoded: float
    seconds: float
    shards_left: Mapping[int, int] = field(default_factory=dict)

    def plus(self, other: Self) -> Self:
        """Both together, for two kinds of features of the same clips."""
        left = Counter(self.shards_left) + Counter(other.shards_left)
        sums = {name: getattr(self, name) + getattr(other, name) for name in asdict(self) if name != "shards_left"}
        return replace(self, **sums, shards_left=dict(left))


@dataclass(frozen=True, slots=True)
class ReferenceFeatures:
    """The second kind of features of a set: of each sample's references (`Family.reference_encoder`)."""

    store: FeatureStore
    keys: Sequence[tuple[str, ...]]


@dataclass(frozen=True, eq=False, repr=False)
class EncodedSet(Sequence[Encoded]):
    """Samples with their features, in the order of the samples; assembled on access, picklable for workers."""

    family: Family
    samples: Sequence[Sample]
    store: FeatureStore
    keys: Sequence[tuple[str, ...]]
    report: EncodeReport
    references: ReferenceFeatures | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Encoded:  # type: ignore[override]
        return self.family.encode(self.samples[index], self.features(index))

    def features(self, index: int) -> list[np.ndarray]:
        """The features of a sample's clips, read-only, in the order of `family.clips`; then the second kind.

        `ManifestError` if one is not encoded (another rank's share), `AudioError` if it is damaged.
        """
        return self._features(index, None)

    def prompt_features(self, index: int) -> list[np.ndarray]:
        """The same without those of the answer's clip."""
        return self._features(index, len(self.family.clips(self.family.prompt(self.samples[index]))))

    def _features(self, index: int, num_clips: int | None) -> list[np.ndarray]:
        wanted = [(self.store, self.keys[index][:num_clips])]
        if self.references:
            wanted.append((self.references.store, self.references.keys[index]))
        found = []
        for store, keys in wanted:
            try:
                found += [store.get(key) for key in keys]
            except KeyError as error:
                raise ManifestError(
                    f"sample {self.samples[index].id}: clip {error.args[0]} is not in {store.folder}; "
                    "encode the set again, and let every rank finish its share before training"
                ) from None
        return found

    @property
    def lengths(self) -> np.ndarray:
        """Sequence positions of all samples, int64 of shape (num_samples,)."""
        return self._sizes[0]

    @property
    def audio_seconds(self) -> float:
        """Duration of all targets."""
        return float(self._sizes[1].sum())

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that the set is made of; a resumed run compares it to refuse a changed dataset."""
        digest = hashlib.sha256(self.store.encode_key.encode())
        digest.update(self.references.store.encode_key.encode() if self.references else b"")
        for sample, keys in zip(self.samples, self.keys, strict=True):
            references = [clip.text for clip in sample.references]
            prompt = [sample.system, sample.scene, sample.speaker, sample.language]
            labels = asdict(sample.pronunciation) if sample.pronunciation else None
            row = [sample.id, sample.text, references, keys, prompt, labels]
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @cached_property
    def _sizes(self) -> tuple[np.ndarray, np.ndarray]:
        tokens, seconds = np.zeros(len(self), np.int64), np.zeros(len(self), np.float64)
        for index, item in enumerate(self):
            tokens[index], seconds[index] = item.num_tokens, item.audio_seconds
        return tokens, seconds

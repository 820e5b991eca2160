"""Encoded samples as training reads them: assembled one at a time, their features memory-mapped from the store."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

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


@dataclass(frozen=True, eq=False, repr=False)
class EncodedSet(Sequence[Encoded]):
    """Samples with their features, in the order of the samples; assembled on access, picklable for workers."""

    family: Family
    samples: Sequence[Sample]
    store: FeatureStore
    keys: Sequence[tuple[str, ...]]
    report: EncodeReport

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Encoded:  # type: ignore[override]
        return self.family.encode(self.samples[index], self.features(index))

    def features(self, index: int) -> list[np.ndarray]:
        """The features of a sample's clips, read-only, in the order of `family.clips`.

        `ManifestError` if one is not encoded (another rank's share), `AudioError` if it is damaged.
        """
        try:
            return [self.store.get(key) for key in self.keys[index]]
        except KeyError as error:
            raise ManifestError(
                f"sample {self.samples[index].id}: clip {error.args[0]} is not in {self.store.folder}; "
                "encode the set again, and let every rank finish its share before training"
            ) from None

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
        digest = hashlib.sha256(self.family.encode_key.encode())
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

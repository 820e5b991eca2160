"""From samples to an encoded set: every distinct clip is encoded once, and never again.

A clip is known by the content of its audio, so text, file name and order of the samples may change freely.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from speechtune.audio import content_hash, read_audio
from speechtune.errors import AudioError, ManifestError
from speechtune.families.base import Audio, AudioRef, Encoded, Family, Sample
from speechtune.feature_store import FeatureStore, read_json_lines

__all__ = ["ClipFault", "ClipHasher", "EncodeReport", "EncodedSet", "FeatureStore", "encode_samples"]

SETTLE_SECONDS = 2.0  # coarsest modification time in use (FAT): a younger file may change and keep its stamp
LOG_SECONDS = 10.0
READERS = 2

logger = logging.getLogger("speechtune")


@dataclass(frozen=True, slots=True)
class ClipFault:
    """A clip that could not be read or encoded, and the samples that need it (`sources` are "file:line")."""

    clip: str
    sample_ids: tuple[str, ...]
    sources: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        users = ", ".join(
            f"{name} ({where})" if where else name for name, where in zip(self.sample_ids, self.sources, strict=True)
        )
        return f"{self.clip}: {self.reason} [needed by {users}]"


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """What one call of `encode_samples` did; clips are distinct clips, durations are of audio encoded here."""

    num_clips: int
    num_encoded: int
    num_reused: int
    audio_seconds_encoded: float
    seconds: float


class ClipHasher:
    """Content hash of clips, remembered on disk by path, size and times so that a start need not read all files.

    Args:
        root: cache folder; holds `hashes.jsonl`.
        allow_urls: fetch clips given as URL.
    """

    def __init__(self, root: Path, *, allow_urls: bool = False) -> None:
        self._path = Path(root) / "hashes.jsonl"
        self._allow_urls = allow_urls
        self._known: dict[tuple, str] = {}
        if self._path.exists():
            rows, _ = read_json_lines(self._path)
            self._known = {tuple(row["file"]): row["hash"] for row in rows if "file" in row and "hash" in row}

    def __call__(self, ref: AudioRef) -> str:
        """Return the content hash of `ref` (64 hex digits).

        Raises:
            AudioError: the clip cannot be read.
        """
        now = time.time()
        try:
            stat = ref.path.stat() if ref.path is not None else None
        except OSError:
            stat = None  # content_hash reports it
        if stat is None:
            return content_hash(ref, allow_urls=self._allow_urls)
        # The change time is kept as well: tools like rsync and cp -p set the modification time of a new file back.
        times = (stat.st_mtime_ns, stat.st_ctime_ns)
        file = (os.path.abspath(str(ref.path)), stat.st_size, *times, ref.offset_seconds, ref.duration_seconds)
        if file not in self._known:
            digest = content_hash(ref, allow_urls=self._allow_urls)
            if now - stat.st_mtime < SETTLE_SECONDS:
                return digest
            self._known[file] = digest
            self._remember({"file": file, "hash": digest})
        return self._known[file]

    def _remember(self, row: dict) -> None:
        # The line begins with a newline, so that one torn by a kill spoils no other. Failure costs only time.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                file.write(b"\n" + json.dumps(row).encode() + b"\n")


class EncodedSet(Sequence[Encoded]):
    """Samples with their features, in the order of the samples; assembled on access, picklable for workers.

    Attributes:
        report: what encoding them took.
    """

    def __init__(
        self,
        family: Family,
        samples: Sequence[Sample],
        store: FeatureStore,
        keys: Sequence[tuple[str, ...]],
        report: EncodeReport,
    ) -> None:
        self.family = family
        self.samples = tuple(samples)
        self.store = store
        self.keys = tuple(keys)
        self.report = report

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Encoded:  # type: ignore[override]
        """Assemble one sample.

        Raises:
            ManifestError: a clip is not encoded (yet): another rank's share, or a folder deleted since.
            AudioError: a clip is damaged on disk.
        """
        sample, features = self.samples[index], self.features(index)
        return self.family.encode(sample, features)

    def features(self, index: int) -> list[np.ndarray]:
        """The features of a sample's clips, read-only, in the order of `family.clips`."""
        try:
            return [self.store.get(key) for key in self.keys[index]]
        except KeyError as error:
            raise ManifestError(
                f"sample {self.samples[index].id}: clip {error.args[0]} is not in {self.store.folder}; "
                "encode the set again, and let every rank finish its share before training"
            ) from None

    def num_tokens(self, index: int) -> int:
        """Sequence positions of a sample."""
        return int(self._sizes[0][index])

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
            prompt = [sample.system, sample.scene, sample.speaker, sample.language, dict(sample.extra)]
            row = [sample.id, sample.text, references, keys, prompt]
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @cached_property
    def _sizes(self) -> tuple[np.ndarray, np.ndarray]:
        sizes = [(item.num_tokens, item.audio_seconds) for item in self]
        return np.array([n for n, _ in sizes], np.int64), np.array([seconds for _, seconds in sizes], np.float64)


@dataclass(slots=True)
class _Clip:
    """One distinct clip; `ref` is the first place its audio was seen at."""

    key: str
    ref: AudioRef
    samples: list[Sample] = field(default_factory=list)
    reason: str = ""

    def fault(self, reason: str) -> ClipFault:
        users = {sample.id: sample.source for sample in self.samples}
        return ClipFault(str(self.ref), tuple(users), tuple(users.values()), reason)


def encode_samples(
    family: Family,
    samples: Sequence[Sample],
    root: Path,
    *,
    allow_urls: bool = False,
    group_size: int = 8,
    shard: tuple[int, int] | None = None,
    verify: bool = False,
    quiet: bool = False,
) -> EncodedSet:
    """Encode every distinct clip of `samples` that the cache under `root` lacks, and return the set.

    Args:
        family: its `encode_audio` must not let one clip of a group change the features of another.
        samples: validated samples; targets and references are taken alike.
        root: cache folder.
        allow_urls: fetch clips given as URL.
        group_size: clips per call of `encode_audio`.
        shard: (i, n): encode only this process's share of the clips; the set is complete when all n are done.
        verify: read all that is cached first, and encode anew what is damaged.
        quiet: a log line every 10 seconds instead of a progress bar.

    Raises:
        ManifestError: clips that could not be read or encoded, all of them; the others are encoded and kept.
        ConfigError: the cache cannot be written.
    """
    started = time.monotonic()
    with FeatureStore(root, family.encode_key) as store:
        if verify:
            store.discard(store.verify())
        clips, keys, faults = _distinct_clips(family, samples, ClipHasher(root, allow_urls=allow_urls))
        missing = [clip for clip in clips if clip.key not in store]
        share = [clip for clip in missing if shard is None or int(clip.key[:8], 16) % shard[1] == shard[0]]
        # Longest first: a group that does not fit in memory fails at once, not in the last minute.
        share.sort(key=lambda clip: _size_hint(clip.ref), reverse=True)
        groups = [share[i : i + group_size] for i in range(0, len(share), group_size)]
        seconds = 0.0
        with _Meter(len(share), quiet) as meter:
            for group, audios in _read_ahead(groups, family.sampling_rate, allow_urls):
                found, encoded_seconds = _encode_group(family, store, group, audios)
                faults += found
                seconds += encoded_seconds
                meter.add(len(group), encoded_seconds)
    if faults:
        lines = "\n".join(f"  {fault}" for fault in faults)
        raise ManifestError(f"{len(faults)} clip(s) cannot be encoded; repair or remove them:\n{lines}", tuple(faults))
    report = EncodeReport(len(clips), len(share), len(clips) - len(missing), seconds, time.monotonic() - started)
    return EncodedSet(family, samples, store, keys, report)


def _distinct_clips(
    family: Family, samples: Sequence[Sample], hasher: ClipHasher
) -> tuple[list[_Clip], list[tuple[str, ...]], list[ClipFault]]:
    """The distinct clips of all samples, the keys of each sample's clips, and the clips that cannot be read."""
    by_ref: dict[AudioRef, _Clip] = {}
    by_key: dict[str, _Clip] = {}

    def find(ref: AudioRef) -> _Clip:
        try:
            key = hasher(ref)
        except AudioError as error:
            return _Clip("", ref, reason=_reason(error, ref))
        return by_key.setdefault(key, _Clip(key, ref))

    keys: list[tuple[str, ...]] = []
    for sample in samples:
        refs = family.clips(sample)
        for ref in refs:
            clip = by_ref[ref] if ref in by_ref else by_ref.setdefault(ref, find(ref))
            clip.samples.append(sample)
        keys.append(tuple(by_ref[ref].key for ref in refs))
    faults = [clip.fault(clip.reason) for clip in by_ref.values() if clip.reason]
    return list(by_key.values()), keys, faults


def _size_hint(ref: AudioRef) -> float:
    """Roughly the duration in seconds, without opening the file: 16-bit samples at 16 kHz where it is not stated."""
    if ref.duration_seconds is not None:
        return ref.duration_seconds
    size = len(ref.data) if ref.data is not None else 0
    with contextlib.suppress(OSError):
        size = ref.path.stat().st_size if ref.path is not None else size
    return size / 32_000


def _read_ahead(
    groups: Sequence[list[_Clip]], sampling_rate: int, allow_urls: bool
) -> Iterator[tuple[list[_Clip], list[Audio | str]]]:
    """Groups with their audio, or the reason why there is none; the next two groups are read meanwhile."""

    def read(clip: _Clip) -> Audio | str:
        try:
            return read_audio(clip.ref, sampling_rate, allow_urls=allow_urls)
        except AudioError as error:
            return _reason(error, clip.ref)

    waiting: deque[tuple[list[_Clip], list[Future[Audio | str]]]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for group in groups:
            waiting.append((group, [pool.submit(read, clip) for clip in group]))
            if len(waiting) > 2:
                first, audios = waiting.popleft()
                yield first, [audio.result() for audio in audios]
        for first, audios in waiting:
            yield first, [audio.result() for audio in audios]


def _encode_group(
    family: Family, store: FeatureStore, group: Sequence[_Clip], audios: Sequence[Audio | str]
) -> tuple[list[ClipFault], float]:
    """Encode and store one group; return its faults and the seconds of audio encoded."""
    faults = [clip.fault(audio) for clip, audio in zip(group, audios, strict=True) if isinstance(audio, str)]
    readable = [(clip, audio) for clip, audio in zip(group, audios, strict=True) if isinstance(audio, Audio)]
    seconds = 0.0
    results = _features(family, [audio for _, audio in readable])
    for (clip, audio), result in zip(readable, results, strict=True):
        if isinstance(result, str):
            faults.append(clip.fault(result))
        else:
            store.put(clip.key, result)
            seconds += audio.duration_seconds
    return faults, seconds


def _features(family: Family, audios: Sequence[Audio]) -> list[np.ndarray | str]:
    """Features of each clip, or the reason why there are none; a group that fails is tried clip by clip."""
    if not audios:
        return []
    try:
        arrays = family.encode_audio(audios)
    except (AudioError, ValueError, RuntimeError) as error:  # torch raises RuntimeError for audio it cannot take
        if len(audios) > 1:
            return [result for audio in audios for result in _features(family, [audio])]
        if "out of memory" in str(error).lower():
            raise  # a fault of the machine, not of the clip
        return [f"cannot be encoded: {error}"]
    assert len(arrays) == len(audios), f"{family.name}: {len(arrays)} features for {len(audios)} clips"
    return [_fault_of(array) or array for array in arrays]


def _reason(error: AudioError, ref: AudioRef) -> str:
    return str(error).removeprefix(f"{ref}: ")


def _fault_of(array: np.ndarray) -> str:
    if array.size == 0:
        return f"encodes to nothing (shape {array.shape}): too short"
    return "" if np.isfinite(array).all() else "encodes to NaN or infinity"


class _Meter:
    """Progress of encoding: a bar on a terminal, else a log line every 10 seconds."""

    def __init__(self, num_clips: int, quiet: bool) -> None:
        console = Console(stderr=True)
        self._bar = not quiet and console.is_terminal and num_clips > 0
        columns = (TextColumn("encode"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not self._bar)
        self._task = self._progress.add_task("encode", total=num_clips, rate="")
        self._num_clips, self._done, self._seconds = num_clips, 0, 0.0
        self._started = self._logged = time.monotonic()

    def __enter__(self) -> _Meter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def add(self, num_clips: int, audio_seconds: float) -> None:
        """Count a finished group."""
        now = time.monotonic()
        self._done += num_clips
        self._seconds += audio_seconds
        rate = self._seconds / max(now - self._started, 1e-9)
        self._progress.update(self._task, advance=num_clips, rate=f"{rate:.1f}x real time")
        finished = self._done == self._num_clips
        if not self._bar and (finished or now - self._logged >= LOG_SECONDS):
            left = (self._num_clips - self._done) * (now - self._started) / self._done
            logger.info(
                "encoded %d of %d clips, %.1f seconds of audio per second, %.0f s left",
                *(self._done, self._num_clips, rate, left),
            )
            self._logged = now

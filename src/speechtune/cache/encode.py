"""Encode every distinct clip of some samples once, into the cache.

A clip is known by the content of its audio, so text, file names and order of the samples may change freely.
"""

import contextlib
import json
import logging
import os
import time
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from speechtune.audio import content_hash, read_audio
from speechtune.cache.encoded_set import EncodedSet, EncodeReport, ReferenceFeatures
from speechtune.cache.packed_map import CLIP_KEY_BYTES, ClipKeys, PackedMap, short_key
from speechtune.cache.store import FeatureStore, read_json_lines
from speechtune.errors import AudioError, Issue, ManifestError, some
from speechtune.family import ClipEncoder, Family
from speechtune.types import Audio, AudioRef, Sample

LOG_SECONDS = 10.0
SETTLE_SECONDS = 2.0  # coarsest modification time in use (FAT): a younger file may change and keep its stamp
READERS = 2  # decoding a clip takes a fraction of the time that encoding it takes

logger = logging.getLogger("speechtune")


class ClipHasher:
    """Content hash of a clip; that of a file is remembered in the cache folder by path, size and times."""

    def __init__(self, root: Path, *, allow_urls: bool = False) -> None:
        self._path = Path(root) / "hashes.jsonl"
        self._allow_urls = allow_urls

    def __call__(self, ref: AudioRef) -> str:
        """The content hash of `ref`, 64 hex digits."""
        now = time.time()
        try:
            stat = os.stat(ref.path) if ref.path is not None else None
        except OSError:
            stat = None  # content_hash reports it
        if stat is None:
            return content_hash(ref, allow_urls=self._allow_urls)
        # With the change time, because rsync and cp -p give a new file the modification time of the old one.
        times = (stat.st_mtime_ns, stat.st_ctime_ns)
        file = (os.path.abspath(ref.path or ""), stat.st_size, *times, ref.offset_seconds, ref.duration_seconds)
        place = self._known.place(key := _short(file))
        if place is not None:
            return self._known.values[place].tobytes().hex()
        digest = content_hash(ref, allow_urls=self._allow_urls)
        if now - stat.st_mtime >= SETTLE_SECONDS:
            self._known[key] = bytes.fromhex(digest)
            self._remember({"file": file, "hash": digest})
        return digest

    @cached_property
    def _known(self) -> PackedMap:
        """The remembered hashes, read at the first use: collecting the clips before that takes memory, too."""
        known = PackedMap(f"V{CLIP_KEY_BYTES}")
        if self._path.exists():
            for row, _ in read_json_lines(self._path):
                with contextlib.suppress(KeyError, TypeError, ValueError):
                    if len(digest := bytes.fromhex(row["hash"])) == CLIP_KEY_BYTES:
                        known[_short(row["file"])] = digest
        return known

    def _remember(self, row: dict[str, object]) -> None:
        # The line begins with a newline, so that a line torn by a kill does not swallow it. Failure costs only time.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                file.write(b"\n" + json.dumps(row).encode() + b"\n")


def _short(file: Sequence[Any]) -> bytes:
    """Key of a file's path, size, times and segment."""
    return short_key(json.dumps(file))


class _Clip(NamedTuple):
    """One distinct clip; `ref` is the first place its audio was seen at, `key` is empty where it cannot be read."""

    key: str
    ref: AudioRef


class _Clips(NamedTuple):
    """The distinct references to audio of all samples, by number, and why some cannot be read.

    Several references may hold the same audio, and have the same key then.
    """

    refs: list[AudioRef]
    keys: ClipKeys
    reasons: dict[_Clip, str]

    def clip(self, number: int) -> _Clip:
        return _Clip(self.keys.key(number), self.refs[number])


def encode_samples(
    family: Family,
    samples: Sequence[Sample],
    root: Path,
    *,
    allow_urls: bool = False,
    group_size: int = 32,
    shard: tuple[int, int] | None = None,
    verify: bool = False,
    quiet: bool = False,
) -> EncodedSet:
    """Encode every distinct clip of `samples` that is not in the cache under `root` yet, and return the set.

    Args:
        family: its `encode_audio` must not let one clip of a group change the features of another. What it has besides
            for references (`reference_encoder`) is encoded after its own features, and kept apart from them.
        samples: validated samples; targets and references are taken alike.
        root: cache folder.
        allow_urls: fetch clips given as URL.
        group_size: clips per call of `encode_audio`.
        shard: (i, n): encode only this process's share of the clips; the set is complete when all n are done.
        verify: read all that is cached first, and encode anew what is damaged.
        quiet: a log line every 10 seconds instead of a progress bar.

    Raises ManifestError: clips that could not be read or encoded, all of them; the others are encoded and kept;
    ConfigError: the cache cannot be written.
    """
    encode = partial(_encode, samples, root, allow_urls, group_size, shard, verify, quiet)
    store, keys, report = encode(family)
    if (encoder := family.reference_encoder) is None:
        return EncodedSet(family, tuple(samples), store, keys, report)
    heard, heard_keys, more = encode(encoder)
    return EncodedSet(family, tuple(samples), store, keys, report.plus(more), ReferenceFeatures(heard, heard_keys))


def _encode(
    samples: Sequence[Sample],
    root: Path,
    allow_urls: bool,
    group_size: int,
    shard: tuple[int, int] | None,
    verify: bool,
    quiet: bool,
    family: ClipEncoder,
) -> tuple[FeatureStore, ClipKeys, EncodeReport]:
    """`encode_samples` for one kind of features."""
    started = time.monotonic()
    with FeatureStore(root, family.encode_key) as store:
        if verify:
            store.discard(store.verify())
        clips = _find_clips(family, samples, ClipHasher(root, allow_urls=allow_urls))
        keys, reasons = clips.keys, dict(clips.reasons)
        distinct = keys.distinct()
        missing = [number for number in distinct if keys.key(number) not in store]
        share = [number for number in missing if shard is None or _shard_of(keys.key(number), shard[1]) == shard[0]]
        # Longest first: a group that does not fit in memory fails at once, not in the last minute.
        share.sort(key=lambda number: _size_hint(clips.refs[number]), reverse=True)
        groups = ([clips.clip(n) for n in share[i : i + group_size]] for i in range(0, len(share), group_size))
        seconds = 0.0
        with _Meter(len(share), quiet) as meter:
            for group, audios in _read_ahead(groups, family.sampling_rate, allow_urls):
                failed, encoded_seconds = _encode_group(family, store, group, audios)
                reasons |= failed
                seconds += encoded_seconds
                meter.add(len(group), encoded_seconds)
        store.refresh()
        left = Counter(_shard_of(key, shard[1]) for key in map(keys.key, missing) if key not in store) if shard else {}
    if reasons:
        issues = _issues(family, samples, keys, reasons)
        lines = "\n".join(f"  {issue}" for issue in issues)
        raise ManifestError(f"{len(issues)} clip(s) cannot be encoded; repair or remove them:\n{lines}", issues)
    elapsed = time.monotonic() - started
    report = EncodeReport(len(distinct), len(share), len(distinct) - len(missing), seconds, elapsed, dict(left))
    return store, keys, report


def _shard_of(key: str, num_shards: int) -> int:
    """The shard of a clip; by content, so that all machines agree whatever the files are called there."""
    return int(key[:8], 16) % num_shards


def _find_clips(family: ClipEncoder, samples: Sequence[Sample], hasher: ClipHasher) -> _Clips:
    """The clips of all samples, each hashed once."""
    numbers: dict[AudioRef, int] = {}
    uses, ends = array("i"), array("i")  # 4 bytes a use, where a list takes 36
    for sample in samples:
        uses.extend(numbers.setdefault(ref, len(numbers)) for ref in family.clips(sample))
        ends.append(len(uses))
    refs, digests = list(numbers), bytearray()
    del numbers  # hashing needs the memory of its table
    reasons: dict[_Clip, str] = {}
    for ref in refs:
        try:
            digests += bytes.fromhex(hasher(ref))
        except AudioError as error:
            reasons[_Clip("", ref)] = str(error)
            digests += bytes(CLIP_KEY_BYTES)
    return _Clips(refs, ClipKeys(digests, uses, ends), reasons)


def _issues(
    family: ClipEncoder, samples: Sequence[Sample], keys: Sequence[tuple[str, ...]], reasons: Mapping[_Clip, str]
) -> tuple[Issue, ...]:
    """One issue for each clip that failed, with the samples that need it."""
    users: dict[str | AudioRef, dict[str, str]] = {clip.key or clip.ref: {} for clip in reasons}
    for sample, sample_keys in zip(samples, keys, strict=True):
        for key, ref in zip(sample_keys, family.clips(sample), strict=True):
            if (key or ref) in users:
                users[key or ref][sample.id] = f"{sample.id} ({sample.source})" if sample.source else sample.id
    issues = []
    for clip, reason in reasons.items():
        reason, needed_by = reason.removeprefix(f"{clip.ref}: "), some(list(users[clip.key or clip.ref].values()))
        issues.append(Issue(str(clip.ref), "", "clip_not_encoded", f"{reason}; needed by {needed_by}"))
    return tuple(issues)


def _size_hint(ref: AudioRef) -> float:
    """Roughly the duration in seconds, without opening the file: 16-bit samples at 16 kHz where it is not stated."""
    if ref.duration_seconds is not None:
        return ref.duration_seconds
    size = len(ref.data) if ref.data is not None else 0
    with contextlib.suppress(OSError):
        size = os.stat(ref.path).st_size if ref.path is not None else size
    return size / 32_000


def _read_ahead(
    groups: Iterable[list[_Clip]], sampling_rate: int, allow_urls: bool
) -> Iterator[tuple[list[_Clip], list[Audio | str]]]:
    """Groups with their audio, or the reason why there is none; the next two groups are read meanwhile."""

    def read(clip: _Clip) -> Audio | str:
        try:
            return read_audio(clip.ref, sampling_rate, allow_urls=allow_urls)
        except AudioError as error:
            return str(error)

    waiting: deque[tuple[list[_Clip], Iterator[Audio | str]]] = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for group in chain(groups, [[], []]):  # two empty ones push out the last
            waiting.append((group, pool.map(read, group)))
            if len(waiting) > 2:
                first, audios = waiting.popleft()
                yield first, list(audios)


def _encode_group(
    family: ClipEncoder, store: FeatureStore, group: Sequence[_Clip], audios: Sequence[Audio | str]
) -> tuple[dict[_Clip, str], float]:
    """Encode and store one group; return why some of its clips cannot be, and the seconds of audio encoded."""
    reasons = {clip: audio for clip, audio in zip(group, audios, strict=True) if isinstance(audio, str)}
    readable = [(clip, audio) for clip, audio in zip(group, audios, strict=True) if isinstance(audio, Audio)]
    seconds = 0.0
    results = _features(family, [audio for _, audio in readable])
    for (clip, audio), result in zip(readable, results, strict=True):
        if isinstance(result, str):
            reasons[clip] = result
        else:
            store.put(clip.key, result)
            seconds += audio.duration_seconds
    return reasons, seconds


def _features(family: ClipEncoder, audios: Sequence[Audio]) -> list[np.ndarray | str]:
    """Features of each clip, or the reason why there are none; a group that fails is tried clip by clip."""
    if not audios:
        return []
    try:
        arrays = family.encode_audio(audios)
    except (AudioError, ValueError, RuntimeError) as error:  # torch raises RuntimeError for audio it cannot take
        if len(audios) > 1:
            return [result for audio in audios for result in _features(family, [audio])]
        if "out of memory" in str(error).lower():
            raise  # the clip is not to blame
        return [f"cannot be encoded: {error}"]
    assert len(arrays) == len(audios), f"{family.name}: {len(arrays)} features for {len(audios)} clips"
    return [_defect(array) or array for array in arrays]


def _defect(array: np.ndarray) -> str:
    if array.size == 0:
        return f"encodes to nothing (shape {array.shape}): too short"
    return "" if np.isfinite(array).all() else "encodes to NaN or infinity"


class _Meter(Progress):
    """Progress of encoding: a bar on a terminal, else a log line every 10 seconds."""

    def __init__(self, num_clips: int, quiet: bool) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("encode"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        hidden = quiet or not console.is_terminal or num_clips == 0
        super().__init__(*columns, TimeRemainingColumn(), console=console, disable=hidden)
        self._clips = self.add_task("encode", total=num_clips, rate="")
        self._num_clips, self._done, self._seconds = num_clips, 0, 0.0
        self._started = self._logged = time.monotonic()

    def add(self, num_clips: int, audio_seconds: float) -> None:
        """Count a finished group."""
        now = time.monotonic()
        self._done += num_clips
        self._seconds += audio_seconds
        rate = self._seconds / max(now - self._started, 1e-9)
        self.update(self._clips, advance=num_clips, rate=f"{rate:.1f}x real time")
        finished = self._done == self._num_clips
        if self.disable and (finished or now - self._logged >= LOG_SECONDS):
            left = (self._num_clips - self._done) * (now - self._started) / self._done
            message = "encoded %d of %d clips, %.1f seconds of audio per second, %.0f s left"
            logger.info(message, self._done, self._num_clips, rate, left)
            self._logged = now

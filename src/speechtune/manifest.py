"""Manifests: files -> validated samples; every fault is collected, and raised once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from speechtune.audio import (
    DURATION_TOLERANCE_SECONDS,
    AudioFault,
    AudioInfo,
    audio_info,
    find_defects,
    read_audio,
    segment_frames,
)
from speechtune.config import DataConfig
from speechtune.errors import ManifestError
from speechtune.families.base import AudioRef, Clip, Sample
from speechtune.readers import Context, read_row
from speechtune.rows import UNREADABLE_REST, Fault, Row, Shared, iterate_rows, printable

__all__ = ["AudioCheck", "Fault", "ReadResult", "check_audio", "load_samples", "read_samples", "split_samples"]

Progress = Callable[[int, int], None]
"""Called with (clips done, clips in all)."""

_FAULTS_SHOWN = 20
_CLIPS_PER_TASK = 64  # one future per clip would cost more than reading a header
_THREADS = 4
_HEADERS_KEPT = 4096  # of files that rows cut many segments out of

logger = logging.getLogger("speechtune")


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What a manifest holds: sound samples, the faults of the other rows, notes for the reader."""

    samples: list[Sample]
    faults: list[Fault]
    notes: list[str]
    num_rows: int


@dataclass(frozen=True, slots=True)
class AudioCheck:
    """Faults of the clips of some samples, and the duration in seconds of every clip that was read."""

    faults: list[Fault]
    durations: dict[AudioRef, float]


@dataclass(slots=True)
class _Finding:
    duration_seconds: float | None = None
    file_seconds: float | None = None
    digest: bytes = b""
    faults: tuple[tuple[str, str], ...] = ()


def read_samples(path: Path, config: DataConfig) -> ReadResult:
    """Read a manifest without touching its audio; rows with faults give no sample.

    Samples without a named reference in folder layouts borrow one of the same speaker, see `borrow_references`.
    `Sample.extra` holds `row` (from 1) and `layout`; where they apply, `declared_seconds` (target first) and
    `reference_from` (id of the lender).

    Raises:
        ManifestError: there is no such file, or it is of no known layout.
    """
    folder = path if path.is_dir() else path.parent
    stem = path.resolve().name if path.is_dir() else path.stem
    samples: list[Sample] = []
    faults: list[Fault] = []
    notes: Counter[str] = Counter()
    first_row: dict[str, int] = {}
    num_rows, shared = 0, Shared()
    for row in iterate_rows(path):
        num_rows += 1
        context = Context(row, row_id(row, stem), folder, config, shared)
        sample = read_row(context)
        first = first_row.setdefault(context.sample_id, row.number)
        if first != row.number:
            context.fault("duplicate_id", f"the id is already taken by row {first}")
        faults += context.faults
        notes.update(context.notes)
        if sample is not None and not context.faults:
            samples.append(sample)
    if num_rows == 0:
        faults.append(Fault(f"{path}:1", "-", "empty_manifest", "holds no rows"))
    texts = [f"{text} ({count} rows)" for text, count in notes.items()]
    if any(map(_may_borrow, samples)):
        samples = borrow_references(samples)
        alone = [sample.id for sample in samples if _may_borrow(sample) and not sample.references]
        if alone:
            some = ", ".join(alone[:5]) + (", ..." if len(alone) > 5 else "")
            texts.append(f"{len(alone)} sample(s) without reference, their speaker has no other utterance: {some}")
    return ReadResult(samples, faults, texts, num_rows)


def borrow_references(samples: Sequence[Sample]) -> list[Sample]:
    """Give each sample of a folder layout without own reference the next utterance of its speaker, cyclic by order.

    A speaker's only utterance stays without reference; samples that name a reference are returned as they are.
    """
    if not any(map(_may_borrow, samples)):
        return list(samples)
    by_speaker: defaultdict[str | None, list[Sample]] = defaultdict(list)
    position: dict[str, int] = {}
    for sample in samples:
        position[sample.id] = len(by_speaker[sample.speaker])
        by_speaker[sample.speaker].append(sample)
    result: list[Sample] = []
    for sample in samples:
        if not _may_borrow(sample):
            result.append(sample)
            continue
        others = by_speaker[sample.speaker] if sample.speaker is not None else []
        start = position[sample.id] + 1
        lenders = (others[(start + step) % len(others)] for step in range(len(others) - 1))
        lender = next((other for other in lenders if other.audio != sample.audio), None)
        extra = {key: value for key, value in sample.extra.items() if key != "reference_from"}
        if lender is None or lender.audio is None:
            result.append(replace(sample, references=(), extra=extra))
        else:
            extra["reference_from"] = lender.id
            result.append(replace(sample, references=(Clip(lender.audio, lender.text),), extra=extra))
    return result


def check_audio(
    samples: Sequence[Sample], config: DataConfig, deep: bool = False, progress: Progress | None = None
) -> AudioCheck:
    """Check each distinct clip once: its header, or with `deep` every decoded sample.

    Headers show missing, unreadable and non-audio files, durations out of bounds or other than declared, and segments
    outside the file. Deep also shows truncation, silence, clipping, NaN, and targets that sound like their reference.
    Clips given as URL are fetched only by a deep check.
    """
    refs = list(dict.fromkeys(ref for sample in samples for ref in _own_clips(sample)))
    # Of a million sound clips nothing is kept but their durations.
    durations: dict[AudioRef, float] = {}
    special: dict[AudioRef, _Finding] = {}
    num_done = 0
    header = lru_cache(_HEADERS_KEPT)(lambda place: audio_info(AudioRef(place)))
    tasks = [refs[start : start + _CLIPS_PER_TASK] for start in range(0, len(refs), _CLIPS_PER_TASK)]

    def inspect(task: list[AudioRef]) -> list[_Finding]:
        return [_inspect(ref, config, deep, header) for ref in task]

    with ThreadPoolExecutor(_THREADS) as pool:
        for task, found in zip(tasks, pool.map(inspect, tasks), strict=True):
            for ref, finding in zip(task, found, strict=True):
                if finding.duration_seconds is not None:
                    durations[ref] = finding.duration_seconds
                if finding.faults or finding.digest:
                    special[ref] = finding
            num_done += len(task)
            if progress is not None:
                progress(num_done, len(refs))
    faults: list[Fault] = []
    for sample in samples:
        declared = sample.extra.get("declared_seconds") or ()
        own = _own_clips(sample)
        for index, ref in enumerate(own):
            seconds = declared[index] if index < len(declared) else None
            finding = special.get(ref)
            if finding is None and seconds is not None:
                finding = _Finding(durations.get(ref), durations.get(ref))
            for code, reason in _clip_faults(finding, seconds) if finding else ():
                role = "target" if index == 0 else f"reference {index}"
                faults.append(_fault(sample, code, f"{role} {ref}: {reason}"))
        digests = [special[ref].digest for ref in own if ref in special]
        if len(digests) == len(own) > 1 and digests[0] and digests[0] in digests[1:]:
            reason = "the target's audio is identical to its reference's: the model would copy it"
            faults.append(_fault(sample, "target_is_reference", reason))
    return AudioCheck(faults, durations)


def load_samples(path: Path, config: DataConfig, quarantine_dir: Path | None = None) -> list[Sample]:
    """Samples of a manifest ready for encoding, with the headers of their audio checked.

    With `config.on_error` "quarantine", faulty rows are appended to `quarantine-<stem>.jsonl` in `quarantine_dir`
    (None: beside the manifest) and the other samples are returned.

    Raises:
        ManifestError: the manifest has faults, or quarantine would set aside more than `config.quarantine_limit`.
    """
    result = read_samples(path, config)
    deep = config.on_error == "quarantine"  # else a clip that does not decode stops the encoding
    faults = check_audio(result.samples, config, deep=deep).faults
    return borrow_references(keep_sound(path, result, faults, config, quarantine_dir, iterate_rows(path)))


def keep_sound(
    path: Path,
    result: ReadResult,
    audio_faults: Sequence[Fault],
    config: DataConfig,
    quarantine_dir: Path | None,
    rows: Iterable[Row],
) -> list[Sample]:
    """The samples without faults: all of them, or with `config.on_error` "quarantine" what is left of them.

    The quarantine file gets the contents of the faulty ones among `rows`, which are read only when there are any;
    a fault of no row is looked up by its source.

    Raises:
        ManifestError: as `load_samples`.
    """
    faults = sorted([*result.faults, *audio_faults], key=lambda fault: fault.row)
    for note in result.notes:
        logger.warning("%s: %s", path, note)
    if not faults:
        return result.samples
    bad_rows = {fault.row for fault in faults if fault.row}
    kept = [sample for sample in result.samples if sample.extra["row"] not in bad_rows]
    num_bad = result.num_rows - len(kept)
    head = f"{path}: {len(faults)} fault(s) in {num_bad} of {result.num_rows} rows"
    if config.on_error == "fail":
        raise _error(f"{head}; mend them, or set data.on_error=quarantine", faults)
    folder = quarantine_dir or (path if path.is_dir() else path.parent)
    target = folder / f"quarantine-{path.resolve().stem}.jsonl"
    try:
        _write_quarantine(target, rows, faults)
    except OSError as error:
        raise _error(f"{head}; the quarantine file {target} cannot be written: {error.strerror}", faults) from None
    if any(fault.code == UNREADABLE_REST for fault in faults):
        raise _error(f"{head}; the file breaks off, so the number of rows is unknown", faults)
    share = num_bad / max(result.num_rows, 1)
    if share > config.quarantine_limit:
        limit = f"{share:.1%} exceeds data.quarantine_limit ({config.quarantine_limit:.1%})"
        raise _error(f"{head}; {limit}; see {target}", faults)
    if not kept:
        raise _error(f"{head}; no sample is left; see {target}", faults)
    logger.warning("QUARANTINE: %s; %d samples are left; see %s", head, len(kept), target)
    return kept


def split_samples(samples: Sequence[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(train, held out): a share of whole samples chosen by seed and id, in the order given.

    At least one sample is held out when `fraction` > 0, and at least one is left. The choice does not depend on order.

    Raises:
        ManifestError: fewer than two samples to split.
    """
    if fraction <= 0:
        return list(samples), []
    if len(samples) < 2:
        raise ManifestError(f"cannot hold out {fraction:g} of {len(samples)} sample(s): at least 2 are needed")
    count = min(max(1, round(len(samples) * fraction)), len(samples) - 1)
    ranked = sorted(samples, key=lambda sample: hashlib.sha256(f"{seed}:{sample.id}".encode()).digest())
    held = {sample.id for sample in ranked[:count]}
    return [sample for sample in samples if sample.id not in held], [s for s in samples if s.id in held]


def row_id(row: Row, stem: str) -> str:
    """The id a row gives itself, else the stem of its file and its number."""
    value = row.value if isinstance(row.value, dict) else {}
    misc = value.get("misc")
    for given in (value.get("id"), misc.get("id") if isinstance(misc, dict) else None):
        if (isinstance(given, str) and given.strip()) or (isinstance(given, int) and not isinstance(given, bool)):
            return printable(str(given))
    return f"{printable(stem)}-{row.number}"


def _may_borrow(sample: Sample) -> bool:
    return sample.extra.get("layout") == "folder" and (not sample.references or "reference_from" in sample.extra)


def _own_clips(sample: Sample) -> list[AudioRef]:
    # a borrowed reference is the lender's target: its faults are counted there, once
    references = () if "reference_from" in sample.extra else sample.references
    target = [] if sample.audio is None else [sample.audio]
    return target + [clip.audio for clip in references]


def _inspect(ref: AudioRef, config: DataConfig, deep: bool, header: Callable[[str], AudioInfo]) -> _Finding:
    finding = _Finding()
    if ref.url is not None and not deep:
        return finding
    try:
        info = audio_info(ref, allow_urls=config.allow_urls) if ref.place is None else header(ref.place)
        finding.file_seconds = info.duration_seconds
        finding.duration_seconds = segment_frames(ref, info)[1] / info.sampling_rate
        _check_length(finding, finding.duration_seconds, config)
        if deep and not finding.faults:
            audio = read_audio(ref, allow_urls=config.allow_urls)
            finding.digest = hashlib.sha256(audio.samples.tobytes()).digest()
            finding.faults += tuple(find_defects(audio))
    except AudioFault as error:
        finding.faults += ((error.code, error.reason),)
    return finding


def _check_length(finding: _Finding, seconds: float, config: DataConfig) -> None:
    if seconds < config.min_seconds:
        reason = f"{seconds:.3f} s is shorter than data.min_seconds ({config.min_seconds:g} s)"
        finding.faults += (("too_short", reason),)
    elif seconds > config.max_seconds:
        reason = f"{seconds:.1f} s is longer than data.max_seconds ({config.max_seconds:g} s)"
        finding.faults += (("too_long", reason),)


def _clip_faults(finding: _Finding, declared: float | None) -> Iterable[tuple[str, str]]:
    yield from finding.faults
    actual = finding.file_seconds
    if declared is not None and actual is not None and abs(declared - actual) > DURATION_TOLERANCE_SECONDS:
        yield "duration_mismatch", f"declared as {declared:.2f} s, but the file is {actual:.2f} s long"


def _fault(sample: Sample, code: str, message: str) -> Fault:
    return Fault(sample.source, sample.id, code, printable(message), sample.extra.get("row", 0))


def _error(head: str, faults: list[Fault]) -> ManifestError:
    lines = [f"  {fault}" for fault in faults[:_FAULTS_SHOWN]]
    if len(faults) > _FAULTS_SHOWN:
        lines.append(f"  ... and {len(faults) - _FAULTS_SHOWN} more; `speechtune validate` lists all of them")
    return ManifestError("\n".join([head, *lines]), tuple(faults))


def _write_quarantine(target: Path, rows: Iterable[Row], faults: list[Fault]) -> None:
    """Append the faulty rows as they stand in the manifest; a rerun adds only what is new."""
    by_row: defaultdict[int | str, list[Fault]] = defaultdict(list)
    for fault in faults:
        by_row[fault.row or fault.source].append(fault)
    target.parent.mkdir(parents=True, exist_ok=True)
    known = set(target.read_text(encoding="utf-8").splitlines()) if target.exists() else set()
    lines: list[str] = []
    for row in rows:
        found = by_row.get(row.number or row.source)
        if not found:
            continue
        record: dict[str, Any] = {"source": row.source, "row": row.number, "id": found[0].sample_id}
        record["faults"] = [{"code": fault.code, "message": fault.message} for fault in found]
        record["content"] = row.raw if row.value is None else row.value
        if (line := json.dumps(record)) not in known:  # ASCII: lone surrogates must survive
            lines.append(line + "\n")
    with target.open("a", encoding="utf-8") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())

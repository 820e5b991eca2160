"""Checks of the audio that samples name: each file is opened once, however many samples share it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

from speechtune.audio import (
    DURATION_TOLERANCE_SECONDS,
    AudioInfo,
    InvalidAudioError,
    audio_info,
    find_defects,
    read_audio,
    segment_frames,
)
from speechtune.config import DataConfig
from speechtune.errors import Issue, printable
from speechtune.types import AudioRef, Sample

Progress = Callable[[int, int], None]
"""Called with (clips done, clips in all)."""


_CLIPS_PER_TASK = 64  # one future per clip would cost more than reading a header
_THREADS = 4
_HEADERS_KEPT = 4096  # of files that rows cut many segments out of


@dataclass(frozen=True, slots=True)
class AudioCheck:
    """Issues of the clips of some samples, and the duration in seconds of every clip that was read."""

    issues: list[Issue]
    durations: dict[AudioRef, float]


@dataclass(slots=True)
class _Finding:
    duration_seconds: float | None = None
    file_seconds: float | None = None
    digest: bytes = b""
    issues: tuple[tuple[str, str], ...] = ()


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
    header = lru_cache(_HEADERS_KEPT)(lambda path: audio_info(AudioRef(path)))
    tasks = [refs[start : start + _CLIPS_PER_TASK] for start in range(0, len(refs), _CLIPS_PER_TASK)]

    def inspect(task: list[AudioRef]) -> list[_Finding]:
        return [_inspect(ref, config, deep, header) for ref in task]

    with ThreadPoolExecutor(_THREADS) as pool:
        for task, found in zip(tasks, pool.map(inspect, tasks), strict=True):
            for ref, finding in zip(task, found, strict=True):
                if finding.duration_seconds is not None:
                    durations[ref] = finding.duration_seconds
                if finding.issues or finding.digest:
                    special[ref] = finding
            num_done += len(task)
            if progress is not None:
                progress(num_done, len(refs))
    issues: list[Issue] = []
    for sample in samples:
        declared = sample.declared_seconds
        own = _own_clips(sample)
        for index, ref in enumerate(own):
            seconds = declared[index] if index < len(declared) else None
            finding = special.get(ref)
            if finding is None and seconds is not None:
                finding = _Finding(durations.get(ref), durations.get(ref))
            for code, reason in _clip_issues(finding, seconds) if finding else ():
                role = "target" if index == 0 else f"reference {index}"
                issues.append(_issue(sample, code, f"{role} {ref}: {reason}"))
        digests = [special[ref].digest for ref in own if ref in special]
        if len(digests) == len(own) > 1 and digests[0] and digests[0] in digests[1:]:
            reason = "the target's audio is identical to its reference's: the model would copy it"
            issues.append(_issue(sample, "target_is_reference", reason))
    return AudioCheck(issues, durations)


def _own_clips(sample: Sample) -> list[AudioRef]:
    # a borrowed reference is the lender's target: its issues are counted there, once
    references = () if sample.borrows_reference else sample.references
    target = [] if sample.audio is None else [sample.audio]
    return target + [clip.audio for clip in references]


def _inspect(ref: AudioRef, config: DataConfig, deep: bool, header: Callable[[str], AudioInfo]) -> _Finding:
    finding = _Finding()
    if ref.url is not None and not deep:
        return finding
    try:
        info = audio_info(ref, allow_urls=config.allow_urls) if ref.path is None else header(ref.path)
        finding.file_seconds = info.duration_seconds
        finding.duration_seconds = segment_frames(ref, info)[1] / info.sampling_rate
        _check_length(finding, finding.duration_seconds, config)
        if deep and not finding.issues:
            audio = read_audio(ref, allow_urls=config.allow_urls)
            finding.digest = hashlib.sha256(audio.samples.tobytes()).digest()
            finding.issues += tuple(find_defects(audio))
    except InvalidAudioError as error:
        finding.issues += ((error.code, error.reason),)
    return finding


def _check_length(finding: _Finding, seconds: float, config: DataConfig) -> None:
    if seconds < config.min_seconds:
        reason = f"{seconds:.3f} s is shorter than data.min_seconds ({config.min_seconds:g} s)"
        finding.issues += (("too_short", reason),)
    elif seconds > config.max_seconds:
        reason = f"{seconds:.1f} s is longer than data.max_seconds ({config.max_seconds:g} s)"
        finding.issues += (("too_long", reason),)


def _clip_issues(finding: _Finding, declared: float | None) -> Iterable[tuple[str, str]]:
    yield from finding.issues
    actual = finding.file_seconds
    if declared is not None and actual is not None and abs(declared - actual) > DURATION_TOLERANCE_SECONDS:
        yield "duration_mismatch", f"declared as {declared:.2f} s, but the file is {actual:.2f} s long"


def _issue(sample: Sample, code: str, message: str) -> Issue:
    return Issue(sample.source, sample.id, code, printable(message), sample.row)


MAX_CLIP_SECONDS = 40.0
"""Longest clip: a padded batch with a longer one crashes in the speech encoder that hears these clips."""


def find_long_clips(samples: Sequence[Sample], durations: Mapping[AudioRef, float], config: DataConfig) -> list[Issue]:
    """Issues of clips over `MAX_CLIP_SECONDS` that `config.max_seconds` lets pass; `durations` from `check_audio`."""
    issues: list[Issue] = []
    for sample in samples:
        seconds = durations.get(sample.audio, 0.0) if sample.audio is not None else 0.0
        if MAX_CLIP_SECONDS < seconds <= config.max_seconds:
            reason = f"{sample.audio}: {seconds:.1f} s is longer than {MAX_CLIP_SECONDS:g} s; cut it"
            issues.append(Issue(sample.source, sample.id, "too_long", printable(reason), sample.row))
    return issues

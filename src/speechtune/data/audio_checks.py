"""Checks of the audio that samples name: each file is opened once, however many samples share it."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
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
from speechtune.data.text_checks import check_texts
from speechtune.errors import Issue, printable
from speechtune.types import AudioRef, Sample

Progress = Callable[[int, int], None]
"""Called with (clips done, clips in all)."""

_CLIPS_PER_TASK = 64  # one future per clip would cost more than reading a header
_THREADS = 4
_HEADERS_KEPT = 4096  # of files that rows cut many segments out of


@dataclass(frozen=True, slots=True)
class AudioCheck:
    """Issues of the clips of some samples and their texts, the seconds of every clip that was read, notes on others.

    `num_not_fetched` clips were given as URL, and not looked at.
    """

    issues: list[Issue]
    durations: dict[AudioRef, float]
    num_not_fetched: int
    notes: list[str]


@dataclass(slots=True)
class _ClipCheck:
    duration_seconds: float | None = None
    file_seconds: float | None = None
    digest: bytes = b""
    issues: tuple[tuple[str, str], ...] = ()


def check_audio(
    samples: Sequence[Sample],
    config: DataConfig,
    deep: bool = False,
    progress: Progress | None = None,
    max_seconds: float = math.inf,
) -> AudioCheck:
    """Check each distinct clip once: its header, or with `deep` every decoded sample.

    Clips last at most `max_seconds`, and at most `config.max_seconds`.

    Headers show missing, unreadable and non-audio files, durations out of bounds or other than declared, and segments
    outside the file; with the texts, see `text_checks`. Deep also shows truncation, silence, clipping, NaN, and targets
    equal to their reference.
    Clips given as URL are fetched only by a deep check.
    """
    refs = list(dict.fromkeys(ref for sample in samples for ref in _own_clips(sample)))
    # Of a million clips without issues nothing is kept but their durations.
    durations: dict[AudioRef, float] = {}
    special: dict[AudioRef, _ClipCheck] = {}
    num_done = 0
    header = lru_cache(_HEADERS_KEPT)(lambda path: audio_info(AudioRef(path)))
    tasks = [refs[start : start + _CLIPS_PER_TASK] for start in range(0, len(refs), _CLIPS_PER_TASK)]

    def inspect(task: list[AudioRef]) -> list[_ClipCheck]:
        return [_inspect(ref, config, deep, max_seconds, header) for ref in task]

    with ThreadPoolExecutor(_THREADS) as pool:
        for task, checks in zip(tasks, pool.map(inspect, tasks), strict=True):
            for ref, check in zip(task, checks, strict=True):
                if check.duration_seconds is not None:
                    durations[ref] = check.duration_seconds
                if check.issues or check.digest:
                    special[ref] = check
            num_done += len(task)
            if progress is not None:
                progress(num_done, len(refs))
    issues: list[Issue] = []
    for sample in samples:
        own = _own_clips(sample)
        for index, ref in enumerate(own):
            declared = sample.declared_seconds[index] if index < len(sample.declared_seconds) else None
            check = special.get(ref)
            if check is None and declared is not None:
                check = _ClipCheck(durations.get(ref), durations.get(ref))
            for code, reason in _clip_issues(check, declared) if check else ():
                number = index + (sample.audio is None)
                role = f"reference {number}" if number else "target"
                issues.append(_issue(sample, code, f"{role} {ref}: {reason}"))
        digests = [special[ref].digest if ref in special else b"" for ref in own]
        if (sample.audio and own[0] in own[1:]) or (digests and digests[0] and digests[0] in digests[1:]):
            reason = f"the target is its own reference, an identical clip ({own[0]}): the model would copy it"
            issues.append(_issue(sample, "target_is_reference", reason))
    digests = {ref: check.digest for ref, check in special.items() if not check.issues}
    if copies := {issue.sample_id for issue in issues if issue.code == "target_is_reference"}:
        samples = [sample for sample in samples if sample.id not in copies]  # one of its texts is wrong anyway
    text_issues, notes = check_texts(samples, durations, digests)
    num_not_fetched = 0 if deep else sum(ref.url is not None for ref in refs)
    return AudioCheck([*issues, *text_issues], durations, num_not_fetched, notes)


def _own_clips(sample: Sample) -> list[AudioRef]:
    # a borrowed reference is the lender's target: its issues are counted there, once
    references = () if sample.borrows_reference else sample.references
    target = [] if sample.audio is None else [sample.audio]
    return target + [clip.audio for clip in references]


def _inspect(
    ref: AudioRef, config: DataConfig, deep: bool, max_seconds: float, header: Callable[[str], AudioInfo]
) -> _ClipCheck:
    check = _ClipCheck()
    if ref.url is not None and not deep:
        return check
    try:
        info = audio_info(ref, allow_urls=config.allow_urls) if ref.path is None else header(ref.path)
        check.file_seconds = info.duration_seconds
        check.duration_seconds = seconds = segment_frames(ref, info)[1] / info.sampling_rate
        if seconds < config.min_seconds:
            reason = f"{seconds:.3f} s is shorter than data.min_seconds ({config.min_seconds:g} s)"
            check.issues = (("too_short", reason),)
        elif seconds > config.max_seconds:
            reason = f"{seconds:.1f} s is longer than data.max_seconds ({config.max_seconds:g} s)"
            check.issues = (("too_long", reason),)
        elif seconds > max_seconds:
            check.issues = (("too_long", f"{seconds:.1f} s is longer than {max_seconds:g} s; cut it"),)
        elif deep:
            audio = read_audio(ref, allow_urls=config.allow_urls)
            check.digest = hashlib.sha256(audio.samples.tobytes()).digest()
            check.issues = tuple(find_defects(audio))
    except InvalidAudioError as error:
        check.issues = ((error.code, error.reason),)
    return check


def _clip_issues(check: _ClipCheck, declared: float | None) -> Iterable[tuple[str, str]]:
    yield from check.issues
    actual = check.file_seconds
    if declared is not None and actual is not None and abs(declared - actual) > DURATION_TOLERANCE_SECONDS:
        yield "duration_mismatch", f"declared as {declared:.2f} s, but the file is {actual:.2f} s long"


def _issue(sample: Sample, code: str, message: str) -> Issue:
    return Issue(sample.source, sample.id, code, printable(message), sample.row)

"""Checks of texts against the clips that they belong to: one clip has one text, and one that can be spoken in it."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher

import numpy as np

from speechtune.errors import Issue, printable, some
from speechtune.types import AudioRef, Sample

ALIKE = 0.5  # of 1: so near are "$20" and "twenty dollars" in a sentence; sentences of different words stay below it
COMPARED = 400  # characters of each
FASTEST = 40.0  # characters a second that nobody can speak; auctioneers reach 30
FAST = 25.0  # what quick readers reach
OUTLYING, SLOW, FEWEST = 2.5, 0.2, 20  # rates beside the median that stand out, and how many clips make a median
SLACK_SECONDS = 0.3  # of a clip, for the ends that a tight cut takes
WIDE = 3  # letters that an ideograph, a kana or a syllable of Hangul takes the time of


def check_texts(
    samples: Sequence[Sample], durations: Mapping[AudioRef, float], digests: Mapping[AudioRef, bytes]
) -> tuple[list[Issue], list[str]]:
    """Issues of texts, and notes; `durations` in seconds, `digests` of what was decoded: equal ones are one clip."""
    issues, near = _different_texts(samples, digests)
    # What learners were to read they may have read in part. A million rows must not keep a list of objects here.
    rates = np.fromiter((speech_rate(text, durations[ref]) for _, ref, text in _read(samples, durations)), np.float32)
    median = float(np.median(rates)) if len(rates) >= FEWEST else 0.0
    limit = min(FASTEST, max(FAST, OUTLYING * median)) if median else FASTEST
    drawn_out: list[str] = []
    if len(rates) and (rates.max() > limit or rates.min() < SLOW * median):
        for (sample, ref, text), rate in zip(_read(samples, durations), rates, strict=True):
            if rate > limit:
                said = f"{len(text)} characters in {durations[ref]:.2f} s cannot be spoken"
                reason = f"{ref}: {said}: the text is that of another clip, or the clip is cut"
                issues.append(_issue(sample, "text_too_long", reason))
            elif rate < SLOW * median:
                drawn_out.append(sample.id)
    found = {
        "five times as long as their texts take (is a part of the text missing?)": drawn_out,
        "whose text is spelled otherwise elsewhere": near,
    }
    return issues, [f"{len(ids)} clip(s) {what}: {some(ids)}" for what, ids in found.items() if ids]


def alike(one: str, other: str) -> bool:
    """Whether two texts may be two spellings of one thing said; case, marks and blanks do not count."""
    one, other = plain(one)[:COMPARED], plain(other)[:COMPARED]
    pairs = ((one, other), (other, one))  # the measure depends on the order
    return one == other or max(SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in pairs) >= ALIKE


def plain(text: str) -> str:
    """The letters and digits of a text, case folded."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))


def _spoken(samples: Sequence[Sample]) -> Iterator[tuple[Sample, AudioRef, str]]:
    """Each clip with its text; a borrowed reference is the lender's target."""
    for sample in samples:
        if sample.audio is not None and sample.text:
            yield sample, sample.audio, sample.text
        for clip in () if sample.borrows_reference else sample.references:
            if clip.text:
                yield sample, clip.audio, clip.text


def _read(samples: Sequence[Sample], durations: Mapping[AudioRef, float]) -> Iterator[tuple[Sample, AudioRef, str]]:
    return (one for one in _spoken(samples) if one[0].pronunciation is None and durations.get(one[1]))


def speech_rate(text: str, seconds: float) -> float:
    """Characters a second, where an ideograph counts as `WIDE` letters."""
    wide = 0 if text.isascii() else sum(unicodedata.east_asian_width(c) in "WF" and c.isalnum() for c in text)
    return (len(text) + (WIDE - 1) * wide) / (seconds + SLACK_SECONDS)


def _different_texts(samples: Sequence[Sample], digests: Mapping[AudioRef, bytes]) -> tuple[list[Issue], list[str]]:
    """An issue for each text of a clip that says something else than its first one; samples with another spelling."""

    def key(ref: AudioRef) -> bytes | AudioRef:
        return digests.get(ref) or ref

    hashes = np.fromiter((hash(part) for _, ref, text in _spoken(samples) for part in (key(ref), text)), np.int64)
    clips, texts = hashes.reshape(-1, 2)[np.lexsort((hashes[1::2], hashes[::2]))].T
    suspects = set(clips[1:][(clips[1:] == clips[:-1]) & (texts[1:] != texts[:-1])].tolist())
    first: dict[bytes | AudioRef, tuple[Sample, str]] = {}
    issues, near = list[Issue](), list[str]()
    for sample, ref, text in _spoken(samples) if suspects else ():
        if hash(clip := key(ref)) not in suspects:
            continue
        known, other = first.setdefault(clip, (sample, text))
        if not alike(text, other):
            where = known.source or known.id
            reason = f"{ref}: its text is {text!r:.60} here and {other!r:.60} in {where}: one of them is not spoken"
            issues.append(_issue(sample, "different_texts", reason))
        elif plain(text) != plain(other):
            near.append(sample.id)
    return issues, near


def _issue(sample: Sample, code: str, message: str) -> Issue:
    return Issue(sample.source, sample.id, code, printable(message), sample.row)

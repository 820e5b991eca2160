"""Align pieces with a script: its exact text wins over the recogniser's; what does not match is listed, not guessed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechtune.errors import ConfigError
from speechtune.tasks.statistics import edit_counts
from speechtune.tasks.voice_cloning.word_errors import normalise

EDGE_WORDS = 2  # at an end of a line that the recogniser missed, and that still belong to the piece beside them
_WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True)
class ScriptWord:
    """A word as it is written, `line` from 0 and its place in that line; and as it is compared, "" for a mere mark."""

    line: int
    start: int
    end: int
    compared: str


@dataclass(frozen=True, slots=True)
class Match:
    """The script's text for a piece, the share of its words that differ, and the lines it comes from (from 0)."""

    text: str
    errors: float
    lines: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Aligned:
    """What the script says of each piece by its key, and the lines (from 0) that no piece says, wholly or in part."""

    matches: Mapping[str, Match]
    missing: tuple[int, ...]


def read_script(path: Path) -> list[str]:
    """The lines of a script that hold words; ConfigError where it cannot be read or holds none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise ConfigError(f"--script {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--script {path}: is no UTF-8 text: {error}") from None
    lines = [line for line in lines if any(map(str.isalnum, line))]
    if not lines:
        raise ConfigError(f"--script {path}: holds no words")
    return lines


def align_script(
    lines: Sequence[str], transcripts: Mapping[str, str], language: str | None, max_errors: float
) -> Aligned:
    """Find each transcript (in the order it was said) in the script.

    A transcript may be a line, a part of one, or several. Where the script says something twice, the first place after
    the piece before is taken. A line is missing where more than `EDGE_WORDS` of its words are in no piece that matches.
    """
    compared_as = {word: _plain(word, language) for word in {word for line in lines for word in line.split()}}
    words = [
        ScriptWord(number, found.start(), found.end(), compared_as[found[0]])
        for number, line in enumerate(lines)
        for found in _WORD.finditer(line)
    ]
    ids: dict[str, int] = {}
    compared = [(place, part) for place, word in enumerate(words) for part in word.compared.split()]
    script = np.array([ids.setdefault(part, len(ids)) for _, part in compared], np.int32)
    owner = [place for place, _ in compared]
    spans: dict[str, tuple[int, int]] = {}
    claimed: set[int] = set()
    after = 0
    for key, transcript in transcripts.items():
        heard = np.array([ids.get(part, -1) for part in _plain(transcript, language).split()], np.int32)
        if not len(heard) or not len(script):
            continue
        first, last, edits = _best_span(script, heard, after)
        if last > first:
            spans[key] = owner[first], owner[last - 1] + 1
            if edits <= max_errors * len(heard):
                claimed.update(range(*spans[key]))
                after = last
    matches: dict[str, Match] = {}
    covered: set[int] = set()
    for key, span in spans.items():
        first, last = _to_line_ends(words, span, claimed)
        text = _text(lines, words[first:last])
        matches[key] = Match(
            text, _error_rate(text, transcripts[key], language), tuple(sorted({w.line for w in words[first:last]}))
        )
        if matches[key].errors <= max_errors:
            covered.update(range(first, last))
    left = [0] * len(lines)
    for place, word in enumerate(words):
        left[word.line] += place not in covered
    sizes = [sum(word.line == number for word in words) for number in range(len(lines))]
    missing = tuple(n for n, count in enumerate(left) if count > EDGE_WORDS or count == sizes[n])
    return Aligned(matches, missing)


def _plain(text: str, language: str | None) -> str:
    """A text as it is compared; the English rules leave marks such as "..." as words."""
    return " ".join(word for word in normalise(text, language).split() if any(map(str.isalnum, word)))


def _error_rate(text: str, transcript: str, language: str | None) -> float:
    """Word errors of a transcript per word of the text."""
    *edits, words = edit_counts([_plain(text, language)], [_plain(transcript, language)])
    return sum(edits) / max(words, 1)


def _best_span(script: np.ndarray, heard: np.ndarray, after: int) -> tuple[int, int, int]:
    """First and last (exclusive) word of the part of the script with the fewest edits to what was heard; the edits.

    Sellers' algorithm (1980): edit distance with free ends in the script. Of equal parts the first behind `after`.
    """
    columns = np.arange(len(script) + 1)
    rows = [np.zeros(len(script) + 1, np.int64)]
    for word in heard:
        above = rows[-1]
        best = np.concatenate([[above[0] + 1], np.minimum(above[:-1] + (script != word), above[1:] + 1)])
        rows.append(np.minimum.accumulate(best - columns) + columns)
    ends = np.flatnonzero(rows[-1] == rows[-1].min())
    last = int(next((end for end in ends if end > after), ends[0]))
    row, column = len(heard), last
    while row:
        cost = rows[row][column]
        if column and cost == rows[row - 1][column - 1] + (script[column - 1] != heard[row - 1]):
            row, column = row - 1, column - 1
        elif cost == rows[row - 1][column] + 1:
            row -= 1
        else:
            column -= 1
    return column, last, int(rows[-1].min())


def _to_line_ends(words: Sequence[ScriptWord], span: tuple[int, int], claimed: set[int]) -> tuple[int, int]:
    """The span with the few words at the ends of its lines that no piece has."""
    first, last = span
    start, end = first, last
    while start and words[start - 1].line == words[first].line and start - 1 not in claimed:
        start -= 1
    while end < len(words) and words[end].line == words[last - 1].line and end not in claimed:
        end += 1
    short = [sum(bool(word.compared) for word in part) <= EDGE_WORDS for part in (words[start:first], words[last:end])]
    return start if short[0] else first, end if short[1] else last


def _text(lines: Sequence[str], words: Sequence[ScriptWord]) -> str:
    """The script's own characters from the first to the last word; lines are joined by a blank."""
    by_line: dict[int, list[ScriptWord]] = {}
    for word in words:
        by_line.setdefault(word.line, []).append(word)
    return " ".join(lines[number][own[0].start : own[-1].end] for number, own in by_line.items())

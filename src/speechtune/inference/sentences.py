"""A text of any length in pieces that a model speaks one at a time: sentences, and parts of those that are too long."""

import re

MAX_CHARACTERS = 200
"""Longest piece: some 13 seconds of speech."""
ABBREVIATION = re.compile(
    r"mrs?|ms|dr|prof|st|[sj]r|vs|etc|e\.g|i\.e|cf|al|figs?|vol|pp|approx|dept|est|inc|ltd|co|corp|gen|col|lt|sgt|capt|rev|"
    r"hon|gov|sen|rep|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|[ap]\.m|u\.[skn]|ph\.d|[a-hj-z]",
    re.IGNORECASE,
)
ENDS = re.compile(
    r"""[.!?\u2026]+["'\u201d\u2019\u00bb)\]]*(?=\s)|[\u3002\uff01\uff1f]["'\u201d\u300d\u300f]*|\n\s*\n"""
)
"""Where a sentence may end: before blanks, in Chinese and Japanese anywhere, and at an empty line."""
PAUSES = re.compile(r"[;:,\u2013\u2014)](?=\s)|[\uff0c\u3001\uff1b\uff1a]|\s(?=[(\u2013\u2014])")


def cut_text(text: str, max_characters: int = MAX_CHARACTERS) -> list[str]:
    """Sentences of a text in order, with nothing left out but blanks; longer ones in parts of `max_characters`.

    Parts end at pauses, else between words. What has no letter or digit stays with what is before it.
    """
    pieces: list[str] = []
    for sentence in _sentences(text):
        for part in _parts(sentence, max_characters):
            if not any(character.isalnum() for character in part) and pieces:
                pieces[-1] += f" {part}"
            else:
                pieces.append(part)
    return pieces


def _sentences(text: str) -> list[str]:
    sentences, start = [], 0
    for end in ENDS.finditer(text):
        if not _goes_on(text[start : end.start()], end.group(), text[end.end() :].lstrip()[:1]):
            sentences.append(text[start : end.end()])
            start = end.end()
    return [" ".join(sentence.split()) for sentence in (*sentences, text[start:]) if sentence.strip()]


def _goes_on(before: str, mark: str, following: str) -> bool:
    """Whether a mark is no end: that of an abbreviation, an initial or a number, or before a small letter."""
    if not mark.startswith((".", "\u2026")):
        return False
    word = before.split()[-1].lstrip("(\"'\u201c\u2018[") if before.split() else ""
    number = word.lower() in ("no", "nos") and following.isdigit()
    return following.islower() or number or (mark == "." and bool(ABBREVIATION.fullmatch(word)))


def _parts(sentence: str, most: int) -> list[str]:
    parts = []
    while len(sentence) > most:
        pauses = [match.end() for match in PAUSES.finditer(sentence, most // 3, most)]
        cut = pauses[-1] if pauses else sentence.rfind(" ", 0, most) + 1
        cut = cut if cut > 0 else most
        parts.append(sentence[:cut].strip())
        sentence = sentence[cut:].strip()
    return [part for part in (*parts, sentence) if part]

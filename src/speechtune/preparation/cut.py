"""Speech -> pieces of a length to train on, cut in pauses alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from speechtune.preparation.settings import CutSettings

Region = tuple[float, float]
"""Start and end of a stretch of speech in seconds."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a recording, in seconds: from `start` to `end` with its margins; speech takes `speech_seconds`."""

    id: str
    key: str
    source: str
    start: float
    end: float
    speech_seconds: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


def cut_speech(speech: Sequence[Region], seconds: float, settings: CutSettings) -> list[tuple[float, float, float]]:
    """(start, end, seconds of speech) of the pieces of a recording of `seconds`; none overlaps another.

    Some may be too short or too long: nothing is near enough to join them to, or they have no pause to be cut at.
    """
    groups: list[list[Region]] = []
    for region in speech:
        if groups and region[0] - groups[-1][-1][1] < settings.pause_seconds:
            groups[-1].append(region)
        else:
            groups.append([region])
    groups = [part for group in groups for part in _divide(group, settings)]
    chains: list[list[list[Region]]] = []  # only within one can groups be joined, and it is short
    for group in groups:
        if chains and group[0][0] - chains[-1][-1][-1][1] <= settings.join_seconds:
            chains[-1].append(group)
        else:
            chains.append([group])
    groups = [group for chain in chains for group in _join_short(chain, settings)]
    pieces = []
    last = math.floor(1e4 * seconds) / 1e4  # by rounding no piece may end behind the recording
    for number, group in enumerate(groups):
        before = groups[number - 1][-1][1] if number else 0.0
        after = groups[number + 1][0][0] if number + 1 < len(groups) else seconds
        start = group[0][0] - min(settings.margin_seconds, max(0.0, group[0][0] - before) / (2 if number else 1))
        end = group[-1][1] + min(settings.margin_seconds, (after - group[-1][1]) / (2 if after < seconds else 1))
        pieces.append((round(start, 4), min(round(end, 4), last), sum(b - a for a, b in group)))
    return pieces


def _length(group: Sequence[Region], settings: CutSettings) -> float:
    return group[-1][1] - group[0][0] + 2 * settings.margin_seconds


def _divide(group: list[Region], settings: CutSettings) -> list[list[Region]]:
    """A group that is too long, cut at its longest pause that leaves both sides long enough, again and again."""
    if _length(group, settings) <= settings.max_seconds:
        return [group]
    places = [
        place
        for place in range(1, len(group))
        if min(_length(group[:place], settings), _length(group[place:], settings)) >= settings.min_seconds
    ]
    if not places:
        return [group]
    place = max(places, key=lambda place: group[place][0] - group[place - 1][1])
    return [*_divide(group[:place], settings), *_divide(group[place:], settings)]


def _join_short(groups: list[list[Region]], settings: CutSettings) -> list[list[Region]]:
    """Groups that are too short joined to a neighbour, over the shortest pauses first."""
    while True:
        pauses = [
            (right[0][0] - left[-1][1], place)
            for place, (left, right) in enumerate(pairwise(groups))
            if min(_length(left, settings), _length(right, settings)) < settings.min_seconds
            and _length([*left, *right], settings) <= settings.max_seconds
        ]
        if not pauses:
            return groups
        _, place = min(pauses)
        groups[place : place + 2] = [[*groups[place], *groups[place + 1]]]

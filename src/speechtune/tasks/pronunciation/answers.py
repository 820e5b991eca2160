"""What a model answered, read with tolerance: an object nearly in the form of `targets`, or parts of it.

Read are: text and code fences around the object, single quotes, other spellings of the keys, numbers as texts or
"8/10", phones as a list, and answers cut off. Not read, and so missing, are a score that is no number from 0 to 10 and
a score or word transcript that was cut off. Of a cut-off phone transcript all but the last phone is kept, for that one
may be half a phone. The reader scans once from left to right and neither evaluates nor nests, so its time grows with
the length of the text alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from speechtune.errors import ManifestError
from speechtune.tasks.pronunciation.phones import ACCENT_MARK, DELETED, UNKNOWN, base_phone
from speechtune.tasks.pronunciation.targets import SCORE_FIELDS, Task

MAX_TOKENS = 2000
"""Words or phones kept of one transcript; a minute of speech has fewer, and a model that loops says no more after."""
MAX_CHARACTERS = 200_000
"""Read of one answer; what comes after is as if it had been cut off."""
MAX_SCORE = 10.0

_KEYS = {
    "APA": r"(?P<name>accuracy|fluency|prosodic|prosody|total)(?:[ _-]?score)?",
    "MDD": r"(?P<name>word[ _-]?transcript(?:ion)?|words|phon(?:e|eme|etic)[ _-]?transcript(?:ion)?|phon(?:em)?es?)",
}
_AFTER_KEY = r"[\"'`*]{0,3}\s{0,20}[:=]"
_STEPS = {
    task: re.compile(rf"(?P<end>\}})|(?<!\w){key}{_AFTER_KEY}[\s*]*", re.IGNORECASE) for task, key in _KEYS.items()
}
_NEXT_KEY = rf"[\"'`*]{{0,3}}{_KEYS['MDD'].replace('?P<name>', '?:')}{_AFTER_KEY}"
_CLOSING = rf"(?=\s*+(?:[}}\]]|$|{_NEXT_KEY}|,\s*+(?:[\"'}}\]]|$|{_NEXT_KEY})))"
_STRICT_END = {mark: re.compile(mark + _CLOSING, re.IGNORECASE) for mark in "\"'"}
_LOOSE_END = {'"': re.compile('"'), "'": re.compile(r"(?<!\w)'|'(?!\w)")}
_BARE_END = re.compile(r"[\n}]")
_SCORE = re.compile(
    r"[\"']?\s{0,20}([0-9]{1,3}(?:\.[0-9]{0,17})?)(?:\s?(?:/|out of)\s?10(?:\.0)?)?"
    r"(?!\w|[-.,][0-9]|\s{0,3}(?:[/%]|out of))"
)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": " ", "f": " "}
_FENCE = re.compile(r"```\w{0,20}")
_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"})
_PHONE = re.compile(r"<\w{1,20}>|[^\s,;|/()\[\]\"'`-]+")
_MAX_KEYS = 16  # of transcripts in one object: each may search all of the rest for the end of its value
_NOTHING = frozenset({"", "null", "none", "n/a", "nan"})


@dataclass(slots=True)
class Answer:
    """An answer as far as it could be read.

    Attributes:
        values: APA: score per field; MDD: `word_transcript` and `phones`, upper case without stress digits. A label
            outside the inventory stays as it is, so it is wrong wherever it stands; as `<unk>` it would be right where
            a speaker made a sound that is no phone. `<DEL>` is left out, "T*" is T.
        truncated: the object or its last value does not end.
        raw_phones: the labels with case and stress digits as the model wrote them; None where there is no transcript.
        unknown_labels: how many of `phones` are outside the inventory.
    """

    values: dict[str, Any] = field(default_factory=dict)
    truncated: bool = False
    raw_phones: list[str] | None = None
    unknown_labels: int = 0


def parse_answer(task: Task, text: str | None) -> dict[str, Any] | None:
    """The values of an answer, those that cannot be read left out; None where nothing can.

    Returns:
        APA: field -> score from 0 to 10. MDD: `word_transcript` (text) and `phones` (list); see `Answer.values`.
    """
    answer = read_answer(task, text)
    return (answer.values or None) if answer is not None else None


def read_answer(task: Task, text: str | None) -> Answer | None:
    """As `parse_answer`, with what else is known of the answer, also where no value could be read; None without text.

    Of several objects the one with the most values counts, of equals the first, and text without braces only where no
    object holds as much. Of a key given twice the last value counts, as in JSON.
    """
    if not text:
        return None
    before, *objects = _FENCE.sub("", text[:MAX_CHARACTERS]).translate(_QUOTES).split("{")
    best = Answer()
    for index, part in enumerate(objects):
        found = _read_object(task, part, last=index == len(objects) - 1)
        if len(found.values) > len(best.values) or not best.values:
            best = found
    if len(best.values) < _most(task):
        found = _read_object(task, before, last=False)
        found.truncated = found.truncated and not objects
        best = found if len(found.values) > len(best.values) else best
    return best


def _most(task: Task) -> int:
    return len(SCORE_FIELDS) if task == "APA" else 2


def _read_object(task: Task, part: str, last: bool) -> Answer:
    """Key after key up to the closing brace; `last`: the answer ends with this part, inside an object."""
    answer = Answer()
    place, closed, keys = 0, not last, 0
    while keys < _MAX_KEYS and (step := _STEPS[task].search(part, place)):
        if step["end"]:
            closed = True
            break
        name, place = step["name"].lower(), step.end()
        if task == "APA":
            place = _read_score(answer, "prosodic" if name == "prosody" else name, part, place, last)
        else:
            place, keys = _read_transcript(answer, name, part, place), keys + 1
    answer.truncated = answer.truncated or not closed
    return answer


def _read_score(answer: Answer, name: str, part: str, place: int, last: bool) -> int:
    found = _SCORE.match(part, place)
    if not found:
        return place
    cut_off = last and not part[found.end() :].strip()  # a 1 may be the beginning of 10
    if not cut_off and float(found[1]) <= MAX_SCORE:
        answer.values[name] = float(found[1])
    return found.end()


def _read_transcript(answer: Answer, name: str, part: str, place: int) -> int:
    """Read the value at `place` into the answer; where it ends."""
    if part[place : place + 1] == "[":
        value, whole, end = _list_at(part, place + 1)
    elif part[place : place + 1] in _STRICT_END:
        value, whole, end = _string_at(part, place + 1, part[place])
    else:
        value, whole, end = _bare_at(part, place)
        if value.strip(" ,").lower() in _NOTHING:
            return end
    answer.truncated = answer.truncated or not whole
    if name.startswith("w"):
        if whole:
            if part.startswith("[", place):
                value = re.sub(r"[\"']\s*,\s*[\"']", " ", value).strip("\"' ,\n")
            answer.values["word_transcript"] = " ".join(value.strip(" ,\n").split()[:MAX_TOKENS])
        return end
    _keep_phones(answer, value, whole)
    return end


def _keep_phones(answer: Answer, value: str, whole: bool) -> None:
    labels = _PHONE.findall(value)
    if not whole and re.search(r"[^\s,;|/()\[\]\"'`>-]$", value):
        labels = labels[:-1]
    if not labels and not whole:
        return
    phones = [phone for label in labels[:MAX_TOKENS] if (phone := _phone(label)) != DELETED]
    answer.values["phones"] = phones
    answer.raw_phones = labels[:MAX_TOKENS]
    answer.unknown_labels = sum(not _is_known(phone) for phone in phones)


def _phone(label: str) -> str:
    upper = label.upper().removesuffix(ACCENT_MARK)
    if upper.strip("<>") == "UNK":
        return UNKNOWN
    try:
        return base_phone(upper)
    except ManifestError:
        return upper[:20]


def _is_known(phone: str) -> bool:
    try:
        return phone == UNKNOWN or bool(base_phone(phone))
    except ManifestError:
        return False


def _string_at(part: str, place: int, mark: str) -> tuple[str, bool, int]:
    """(content, whether it ends, where to go on) of a quoted text.

    A quotation mark ends it only where a comma, a bracket, a key or nothing follows: "don't" in single quotes goes on.
    """
    for pattern in (_STRICT_END[mark], _LOOSE_END[mark]):
        for found in pattern.finditer(part, place):
            if not _is_escaped(part, found.start(), place):
                return _unescape(part[place : found.start()]), True, found.end()
    return _unescape(part[place:]), False, len(part)


def _is_escaped(part: str, place: int, start: int) -> bool:
    backslashes = 0
    while place - backslashes > start and part[place - backslashes - 1] == "\\" and backslashes < MAX_TOKENS:
        backslashes += 1
    return backslashes % 2 == 1


def _unescape(value: str) -> str:
    def character(found: re.Match[str]) -> str:
        code = found[1]
        if len(code) == 1:
            return _ESCAPED.get(code, code)
        one = chr(int(code[1:], 16))
        return "\N{REPLACEMENT CHARACTER}" if "\ud800" <= one <= "\udfff" else one

    return _ESCAPE.sub(character, value)


def _list_at(part: str, place: int) -> tuple[str, bool, int]:
    """The inside of a list, which ends at the next key or brace; brackets within are separators."""
    found = _STEPS["MDD"].search(part, place)
    end = found.start() if found else len(part)
    inside = part[place:end].rstrip("\"' ,\n`*") if found else part[place:end]
    closed = found is not None or "]" in inside
    if closed and "]" in inside:
        inside = inside[: inside.rindex("]")]
    return inside.replace("[", " ").replace("]", " "), closed, end


def _bare_at(part: str, place: int) -> tuple[str, bool, int]:
    """A text without quotation marks: to the end of its line, the brace or the next key."""
    ends = [found.start() for pattern in (_BARE_END, _STEPS["MDD"]) if (found := pattern.search(part, place))]
    end = min(ends, default=len(part))
    return part[place:end].rstrip("\"'` ,*") if ends else part[place:], True, end

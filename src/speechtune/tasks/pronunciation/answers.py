"""Read a model's answer: an object nearly in the form of `targets`, or parts of one.

A valid JSON object anywhere in the answer is read as JSON. Elsewhere the text between one key and the next is a value:
that covers single quotes, other spellings of the keys, missing quotes and braces, lists of keys without an object, and
answers that were cut off. A score that is no number from 0 to 10, and a score or word transcript that was cut off,
counts as missing. Of a cut-off phone transcript all but the last phone is kept, which may be half a phone.
"""

# Why not json-repair: it guesses, and a guess here is a score that the model did not give. Of 4,743 damaged answers
# its version 0.64.6 gave 301 wrong values (8 % -> 8, 4 / 5 -> 4, 'don't ca -> "don"; this reader 15), and it does not
# say what was cut off.

import json
import re
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from speechtune.errors import ManifestError
from speechtune.tasks.pronunciation.phones import ACCENT_MARK, DELETED, UNKNOWN, base_phone
from speechtune.tasks.pronunciation.targets import FIELDS, MAX_SCORE, Task

MAX_TOKENS = 2000
"""Words or phones kept of one transcript; a minute of speech has fewer, and a model that loops says no more after."""
MAX_CHARACTERS = 200_000
"""Read of one answer; what comes after is as if it had been cut off."""
MAX_OBJECTS = 16
"""Braces at which valid JSON is looked for: each may open an object that ends only with the answer."""

_NAMES = {
    "APA": r"(accuracy|fluency|prosodic|prosody|total)(?:[ _-]?score)?",
    "MDD": r"(word[ _-]?transcript(?:ion)?|words|phon(?:e|eme|etic)[ _-]?transcript(?:ion)?|phon(?:em)?es?)",
}
_NAME = {task: re.compile(name, re.IGNORECASE) for task, name in _NAMES.items()}
_KEY = {
    task: re.compile(rf"(?<!\w){name}[\"'`*]{{0,3}}\s{{0,20}}[:=][\s*]*", re.IGNORECASE)
    for task, name in _NAMES.items()
}
_SCORE = re.compile(
    r"[\"']?\s{0,20}([0-9]{1,3}(?:\.[0-9]{0,17})?)(?:\s?(?:/|out of)\s?10(?:\.0)?)?"
    r"(?!\w|[-.,][0-9]|\s{0,3}(?:[/%]|out of))"  # 7/100, 80 % and 3-4 are no scores from 0 to 10
)
# a quotation mark ends a text only before another key or at the end: "don't" in single quotes goes on
_STRING_END = {mark: re.compile(rf"(?<!\\){mark}\s*+(?:,\s*+[\"'\]]|,?\s*+$|,?\s*+\]|\n)") for mark in "\"'"}
_FENCE = re.compile(r"```\w{0,20}")
_CURLY_QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'"})
_PHONE = re.compile(r"<\w{1,20}>|[^\s,;|/()\[\]\"'`-]+")
_PHONE_END = re.compile(r"[\s,;|/()\[\]\"'`>-]$")
_AROUND = " \t\r\n,*`{[]\"'"
_NO_VALUE = frozenset({"", "null", "none", "n/a", "nan"})
_DECODER = json.JSONDecoder(strict=False)  # line breaks in strings are accepted


@dataclass(slots=True)
class Answer:
    """An answer as far as it could be read.

    Attributes:
        values: APA: score per field; MDD: `word_transcript` and `phones`, upper case without stress digits. A label
            outside the inventory stays as it is, and so is wrong anywhere; as `<unk>` it would be correct where a
            speaker made a sound that is no phone. `<DEL>` is left out, "T*" is T.
        truncated: the object or its last value does not end.
        raw_phones: the labels with case and stress digits as the model wrote them; None without a transcript.
        unknown_labels: how many of `phones` are outside the inventory.
    """

    values: dict[str, Any] = field(default_factory=dict)
    truncated: bool = False
    raw_phones: list[str] | None = None
    unknown_labels: int = 0

    def add_words(self, words: str) -> None:
        """Keep the word transcript."""
        self.values["word_transcript"] = " ".join(_without_surrogates(words).split()[:MAX_TOKENS])

    def add_phones(self, text: str, complete: bool = True) -> None:
        """Keep the phone transcript, of an incomplete one what is certain."""
        labels = _PHONE.findall(text)
        if not complete and not _PHONE_END.search(text):
            labels = labels[:-1]
        if not labels and not complete:
            return
        self.raw_phones = labels[:MAX_TOKENS]
        read = [_phone(label) for label in self.raw_phones]
        self.values["phones"] = [phone for phone, _ in read if phone != DELETED]
        self.unknown_labels = sum(not known for phone, known in read if phone != DELETED)


def read_answer(task: Task, text: str | None) -> Answer:
    """Read an answer, as far as it can be read.

    Of several objects the one with the most values counts, of equals the first, and text without braces only where no
    object is complete. Of a key given twice the last value counts, as in JSON.
    """
    text = _FENCE.sub("", (text or "")[:MAX_CHARACTERS]).translate(_CURLY_QUOTES)
    before, *objects = text.split("{")
    best, start = Answer(), len(before)
    for number, part in enumerate(objects):
        answer = _read_json(task, text, start) if number < MAX_OBJECTS else None
        answer = answer or _read_damaged(task, part, in_object=number == len(objects) - 1)
        if len(answer.values) > len(best.values) or not best.values:
            best = answer
        start += 1 + len(part)
    if len(best.values) < len(FIELDS[task]):
        answer = _read_damaged(task, before, in_object=False)
        answer.truncated = answer.truncated and not objects
        best = answer if len(answer.values) > len(best.values) else best
    return best


def _read_json(task: Task, text: str, start: int) -> Answer | None:
    """The valid JSON object at a brace; None where there is none, or none with a value."""
    try:
        content, _ = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    answer = Answer()
    for key, value in content.items():
        match = _NAME[task].fullmatch(key)
        if match is None:
            continue
        if task == "APA":
            if score := _SCORE.match(str(value)):
                _add_score(answer, match[1], score)
        elif (transcript := _joined(value)) is not None:
            answer.add_words(transcript) if match[1][0] in "wW" else answer.add_phones(transcript)
    return answer if answer.values else None


def _joined(value: object) -> str | None:
    """A transcript given as text or as lists of texts, as one text."""
    if isinstance(value, list):
        return " ".join(filter(None, map(_joined, value)))
    return value if isinstance(value, str) else None


def _read_damaged(task: Task, part: str, in_object: bool) -> Answer:
    """Read what stands between one key and the next, up to a brace; `in_object`: the answer ends inside an object."""
    part, brace, _ = part.partition("}")
    in_object = in_object and not brace
    answer = Answer(truncated=in_object)
    keys = list(_KEY[task].finditer(part))
    for key, following in zip_longest(keys, keys[1:]):
        value = part[key.end() : following.start() if following else len(part)]
        if task == "MDD":
            _add_transcript(answer, key[1], value, bool(following or brace), in_object)
        elif score := _SCORE.match(value):
            cut_off = in_object and not following and not value[score.end() :].strip()  # a 1 may be half of a 10
            if not cut_off:
                _add_score(answer, key[1], score)
    return answer


def _add_score(answer: Answer, name: str, score: re.Match[str]) -> None:
    if float(score[1]) <= MAX_SCORE:
        answer.values[{"prosody": "prosodic"}.get(name.lower(), name.lower())] = float(score[1])


def _add_transcript(answer: Answer, name: str, value: str, ended: bool, in_object: bool) -> None:
    """Read a transcript; `ended`: a key or a brace follows it, so that it is complete whatever its quotation marks."""
    opening = value[:1]
    if opening in _STRING_END:
        end = _STRING_END[opening].search(value, 1)
        complete = ended or end is not None
        value = value[1 : end.start()] if end else value[1:]
    elif opening == "[":
        complete = ended or "]" in value
        value = value[: value.rindex("]")] if "]" in value else value
        value = re.sub(r"[\"']\s*,\s*[\"']", " ", value)
    else:
        complete = ended or not in_object
        value = value.partition("\n")[0]
        if value.strip(_AROUND).lower() in _NO_VALUE:
            return
    answer.truncated = answer.truncated or not complete
    if name[0] not in "wW":
        answer.add_phones(value, complete)
    elif complete:
        answer.add_words(_unescaped(value.strip(_AROUND)))


def _unescaped(value: str) -> str:
    try:
        return json.loads('"' + value.replace("\\'", "'") + '"', strict=False)
    except ValueError:
        return value.replace("\\", "")


def _without_surrogates(text: str) -> str:
    """Text whose halves of surrogate pairs, which no file can hold, are replacement characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _phone(label: str) -> tuple[str, bool]:
    """A label as a base phone, `<DEL>`, or as it is, and whether it is known."""
    upper = label.upper().removesuffix(ACCENT_MARK)
    if upper.strip("<>") == "UNK":
        return UNKNOWN, True
    try:
        return base_phone(upper), True
    except ManifestError:
        return upper[:20], False

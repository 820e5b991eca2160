"""The labels of one Speechocean762 utterance, checked alike from `scores.json` and from the copy on the hub."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speechtune.data.row_parser import Context
from speechtune.data.rows import Split
from speechtune.tasks.pronunciation.phones import (
    PhoneError,
    base_phone,
    read_mispronunciation,
    realised_phones,
    split_phones,
)
from speechtune.tasks.pronunciation.targets import MAX_SCORE, SCORE_FIELDS
from speechtune.types import AudioRef, Mispronunciation, Pronunciation, Sample, Word

WORD_SCORE_FIELDS = ("accuracy", "stress", "total")
"""Scores a word may have."""
MAX_PHONE_ACCURACY = 2.0
"""Best accuracy of a phone; 1 is a heavy accent, 0 wrong or missed."""
MISPRONOUNCED_BELOW = 0.5
"""Accuracy under which the corpus names what was said instead of the phone."""
OLD_LABELS = "labels of before July 2024 look so: take resource/scores.json of github.com/jimbozhang/speechocean762"
"""What is said of labels outside the inventory, such as AR and TR, and of absent mispronunciations."""
_AGE = re.compile("[0-9]{1,3}")


def check_score(context: Context, label: str, value: object, best: float = MAX_SCORE) -> float | None:
    """A score from 0 to `best`; None, with an issue that calls it `label`, for anything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        context.issue("bad_score", f"{label} is not a number but {value!r:.40}")
        return None
    if not 0 <= value <= best:  # NaN is not, either
        context.issue("bad_score", f"{label} is {value!r:.40}, outside 0 to {best:g}")
        return None
    return value


def utterance(
    context: Context, text: str, audio: AudioRef | None, speaker: str | None, labels: Pronunciation
) -> Sample:
    """The sample of a recording with labels; all such data is English."""
    where = {"source": context.row.source, "row": context.row.number}
    return Sample(context.sample_id, text, audio, speaker=speaker, language="en", pronunciation=labels, **where)


def read_person(context: Context, values: Mapping[str, Any], who: str = "") -> dict[str, Any]:
    """Age in years and gender, as far as they are given; messages begin with `who`."""
    person: dict[str, Any] = {}
    age, gender = values.get("age"), values.get("gender")
    if age not in (None, "") and age == age:
        text = str(int(age)) if isinstance(age, float) and age.is_integer() else str(age)
        if _AGE.fullmatch(text):
            person["age"] = int(text)
        else:
            context.issue("bad_field", f"{who}age {age!r:.40} is not a number of years")
    if gender not in (None, ""):
        if isinstance(gender, str) and gender.lower() in ("f", "m"):
            person["gender"] = gender.lower()
        else:
            context.issue("bad_field", f"{who}gender {gender!r:.40} is not m or f")
    return person


def read_raters(context: Context, split: Split, entry: object, text: str) -> dict[str, list[float]]:
    """The scores single raters gave the utterance of `text`, by field; what is missing or damaged becomes a note."""
    if not isinstance(entry, dict):
        context.notes.append(f"{split}: utterances without scores of single raters")
        return {}
    own = entry.get("text", text)
    if not isinstance(own, str) or own.casefold().split() != text.casefold().split():
        context.notes.append(f"{split}: utterances whose single raters scored another text")
        return {}
    raters: dict[str, list[float]] = {}
    for name in SCORE_FIELDS:
        values = entry.get(name)
        if isinstance(values, list) and values and all(map(_is_score, values)):
            raters[name] = [float(value) for value in values]
        else:
            context.notes.append(f"{split}: utterances without valid {name!r} scores of single raters")
    return raters


def _is_score(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MAX_SCORE


@dataclass(slots=True)
class LabelReader:
    """Checks the labels of one utterance; issues and notes go to the context, messages call the source `origin`."""

    context: Context
    split: Split
    origin: str

    def read(self, entry: object, text: str) -> Pronunciation | None:
        """The labels of the utterance of `text`; None where there are none; after an issue they are not complete."""
        issue = self.context.issue
        if not isinstance(entry, dict):
            issue("missing_scores", f"{self.origin} holds no object for this utterance")
            return None
        values = {name: self._score(entry, name, "", required=True) for name in SCORE_FIELDS}
        values["completeness"] = self._score(entry, "completeness", "", required=False)
        words = entry.get("words")
        if not isinstance(words, list) or not words:
            issue("missing_words", f"{self.origin} gives no list of words")
            return None
        read = [self._word(word, f"word {number}") for number, word in enumerate(words, 1)]
        if not self.context.issues:
            own = text if entry.get("text") is None else str(entry["text"])
            spoken = " ".join(word.text for word in read)
            for other, what in ((own, f"'text' in {self.origin}"), (spoken, f"the words of {self.origin}")):
                if other.casefold().split() != text.casefold().split():
                    issue("text_mismatch", f"the text {text!r:.60} differs from {what}, {other!r:.60}")
                    break
        scores = {name: value for name, value in values.items() if value is not None}
        return Pronunciation(scores=scores, words=tuple(read))

    def _score(
        self, values: Mapping[str, Any], name: str, where: str, required: bool, best: float = MAX_SCORE
    ) -> float | None:
        label = f"{where}: {name!r}" if where else repr(name)
        value = values.get(name)
        if value is None:
            if required:
                self.context.issue("missing_score", f"{label} is missing")
            else:
                what = "words" if where else "utterances"
                self.context.notes.append(f"{self.split}: {what} without {name!r}")
            return None
        return check_score(self.context, label, value, best)

    def _word(self, word: Any, where: str) -> Word:
        issue = self.context.issue
        if not isinstance(word, dict):
            issue("missing_words", f"{where} is not an object but {word!r:.60}")
            return Word("", ())
        text = word.get("text")
        if not isinstance(text, str) or not text.strip():
            issue("missing_words", f"{where} has no text")
        where = f"{where} ({text})" if isinstance(text, str) else where
        scores = {name: self._score(word, name, where, required=False) for name in WORD_SCORE_FIELDS}
        try:
            phones = tuple(map(base_phone, split_phones(word.get("phones"))))
        except PhoneError as error:
            issue(error.code, f"{where}: {error}")
            return Word("", ())
        accuracies = self._accuracies(word, where, len(phones))
        errors = self._mispronunciations(word, where, phones, accuracies)
        given = {name: score for name, score in scores.items() if score is not None}
        known = tuple(value for value in accuracies if value is not None)
        return Word(str(text), phones, known, errors, given)

    def _accuracies(self, word: Mapping[str, Any], where: str, count: int) -> list[float | None]:
        values = word.get("phones-accuracy")
        if not isinstance(values, list):
            self.context.issue("missing_score", f"{where}: no list 'phones-accuracy'")
            return []
        if len(values) != count:
            reason = f"{where}: {count} phone(s), but {len(values)} value(s) in 'phones-accuracy'"
            self.context.issue("count_mismatch", reason)
        named = {f"phones-accuracy[{index}]": value for index, value in enumerate(values)}
        return [self._score(named, name, where, required=True, best=MAX_PHONE_ACCURACY) for name in named]

    def _mispronunciations(
        self, word: Mapping[str, Any], where: str, phones: Sequence[str], accuracies: Sequence[float | None]
    ) -> tuple[Mispronunciation, ...]:
        """The annotated errors of a word; after an issue none."""
        wrong = {index for index, value in enumerate(accuracies) if value is not None and value < MISPRONOUNCED_BELOW}
        values = word.get("mispronunciations")
        if values is None and not wrong:
            values = []  # the corpus lists them for phones scored below 0.5 only
        if not isinstance(values, list):
            reason = f"{where}: no list 'mispronunciations', though a phone is scored below {MISPRONOUNCED_BELOW:g}"
            self.context.issue("missing_mispronunciations", f"{reason}; {OLD_LABELS}")
            return ()
        errors, issues = [], len(self.context.issues)
        for value in values:
            try:
                errors.append(read_mispronunciation(value, phones))
            except PhoneError as error:
                hint = f"; {OLD_LABELS}" if error.code == "unknown_phone" else ""
                self.context.issue(error.code, f"{where}: {error}{hint}")
        if len(self.context.issues) > issues:
            return ()
        try:
            realised_phones(phones, errors)  # refuses what would show only when the target is made
        except PhoneError as error:
            self.context.issue(error.code, f"{where}: {error}")
            return ()
        silent = len(wrong - {item.index for item in errors})
        note = f"{self.split}: phones below {MISPRONOUNCED_BELOW:g} without mispronunciation, taken as canonical"
        self.context.notes += [note] * silent
        return tuple(errors)

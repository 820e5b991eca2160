"""The 39 base phones of ARPAbet (CMU dictionary), and mispronunciations annotated with them.

A realised sequence is the canonical one with the annotated mispronunciations applied: the phone at `index` is replaced
by `pronounced-phone`. A label outside the inventory is a `PhoneError`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from speechtune.errors import ManifestError
from speechtune.types import Mispronunciation

VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW")
"""The 15 phones that may carry a stress digit."""
CONSONANTS = (
    "B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N",
    "NG", "P", "R", "S", "SH", "T", "TH", "V", "W", "Y", "Z", "ZH",
)  # fmt: skip
"""The 24 phones that carry none."""
PHONES = tuple(sorted(VOWELS + CONSONANTS))
"""All 39 base phones in alphabetical order."""
DELETED = "<DEL>"
"""Label of a phone that was left out; a realised sequence does not contain it."""
UNKNOWN = "<unk>"
"""Label of a sound that is no phone of English; a realised sequence contains it."""
ACCENT_MARK = "*"
"""`X*` is a variant of X with a heavy foreign accent."""
STRESS_DIGITS = ("0", "1", "2")

StarPolicy = Literal["base", "unk"]
"""How `X*` is read: "base" as X, "unk" as `<unk>`."""


class PhoneError(ManifestError):
    """A label or an entry that does not fit the inventory; `code` is short, for tables of issues."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def base_phone(label: str) -> str:
    """The base phone of a label such as "AH0": its stress digit stripped.

    Raises PhoneError: not one of the 39 phones, or a stress digit on a consonant.
    """
    base = label[:-1] if label.endswith(STRESS_DIGITS) and label[:-1] in VOWELS else label
    if base not in PHONES:
        raise PhoneError("unknown_phone", f"{label!r:.40} is none of the 39 ARPAbet phones")
    return base


def split_phones(value: object) -> list[str]:
    """The labels of a word's phones, given as a list or as one text with blanks between them, stress digits kept.

    Raises PhoneError: neither of the two, or no phone at all.
    """
    labels = value.split() if isinstance(value, str) else value
    if not isinstance(labels, list | tuple) or not all(isinstance(label, str) for label in labels):
        raise PhoneError("bad_field", f"'phones' is neither a list of texts nor a text but {value!r:.60}")
    if not labels:
        raise PhoneError("missing_phones", "'phones' is empty")
    return list(labels)


def pronounced_phones(label: str, star_policy: StarPolicy = "base") -> tuple[str, ...]:
    """The phones of a `pronounced-phone`: none (`<DEL>`), one, or several ("D Z").

    Stress digits are stripped; `X*` becomes X or `<unk>` by `star_policy`.
    """
    if label in (DELETED, UNKNOWN):
        return () if label == DELETED else (UNKNOWN,)
    parts = label.split()
    if not parts:
        raise PhoneError("unknown_phone", "'pronounced-phone' is empty; a phone that was left out is '<DEL>'")
    bases = [base_phone(part.removesuffix(ACCENT_MARK)) for part in parts]
    if star_policy == "unk":
        return tuple(UNKNOWN if part.endswith(ACCENT_MARK) else base for part, base in zip(parts, bases, strict=True))
    return tuple(bases)


def read_mispronunciation(value: object, phones: Sequence[str]) -> Mispronunciation:
    """Check one entry of a word's `mispronunciations` against the word's `phones` (stress digits allowed in both).

    Raises PhoneError: no such entry, its index lies outside the word, its canonical phone is another than the one at
    that index, or a label is unknown.
    """
    if not isinstance(value, Mapping):
        raise PhoneError("bad_field", f"a mispronunciation is an object, found {value!r:.60}")
    index = value.get("index")
    canonical, pronounced = _label(value, "canonical-phone"), _label(value, "pronounced-phone")
    if not isinstance(index, int) or isinstance(index, bool):
        raise PhoneError("bad_field", f"'index' of a mispronunciation is not a whole number but {index!r:.40}")
    if not 0 <= index < len(phones):
        raise PhoneError("bad_index", f"'index' {index} lies outside the word, which has {len(phones)} phone(s)")
    if base_phone(canonical) != base_phone(phones[index]):
        reason = f"'canonical-phone' {canonical!r} is not the phone at index {index}, which is {phones[index]!r}"
        raise PhoneError("phone_mismatch", reason)
    pronounced_phones(pronounced)
    return Mispronunciation(index, base_phone(canonical), pronounced)


def realised_phones(
    phones: Sequence[str], mispronunciations: Sequence[Mispronunciation], star_policy: StarPolicy = "base"
) -> list[str]:
    """The base phones that were said: canonical `phones` with `mispronunciations` applied.

    Replaced at the index; `<DEL>` removed; `<unk>` kept; `X*` by `star_policy`; "D Z" becomes two phones.

    Raises PhoneError: an unknown label, an index outside the word, or two entries for one index.
    """
    replaced: dict[int, tuple[str, ...]] = {}
    for item in mispronunciations:
        if not 0 <= item.index < len(phones):
            raise PhoneError("bad_index", f"'index' {item.index} lies outside the word of {len(phones)} phone(s)")
        if item.index in replaced:
            raise PhoneError("duplicate_index", f"two mispronunciations are given for the phone at index {item.index}")
        replaced[item.index] = pronounced_phones(item.pronounced, star_policy)
    return [phone for index, label in enumerate(phones) for phone in replaced.get(index, (base_phone(label),))]


def _label(value: Mapping[Any, Any], name: str) -> str:
    label = value.get(name)
    if not isinstance(label, str):
        raise PhoneError("bad_field", f"{name!r} of a mispronunciation is not a text but {label!r:.40}")
    return label

"""ARPAbet phones: the inventory, labels, and the realised sequence of a mispronounced word."""

from __future__ import annotations

from typing import Any

import pytest

from speechtune.errors import ManifestError
from speechtune.tasks.pronunciation.phones import (
    PHONES,
    VOWELS,
    Mispronunciation,
    PhoneError,
    base_phone,
    pronounced_phones,
    read_mispronunciation,
    realised_phones,
    split_phones,
)

LISA = ["L", "IY1", "S", "AH0"]


def error(index: int, pronounced: str, canonical: str = "") -> Mispronunciation:
    return Mispronunciation(index, canonical or base_phone(LISA[index]), pronounced)


def entry(index: Any = 0, canonical: Any = "L", pronounced: Any = "D") -> dict[str, Any]:
    return {"index": index, "canonical-phone": canonical, "pronounced-phone": pronounced}


def test_the_inventory() -> None:
    assert len(PHONES) == len(set(PHONES)) == 39
    assert len(VOWELS) == 15
    assert list(PHONES) == sorted(PHONES)


@pytest.mark.parametrize(("label", "base"), [("AH0", "AH"), ("IY1", "IY"), ("AE2", "AE"), ("UH", "UH"), ("W", "W")])
def test_stress_digits_are_stripped(label: str, base: str) -> None:
    assert base_phone(label) == base


@pytest.mark.parametrize("label", ["AX", "W0", "AH3", "ah", "", "0", "<unk>", "<DEL>", "D*", "AH00", " D", "D Z"])
def test_unknown_labels_are_issues(label: str) -> None:
    with pytest.raises(PhoneError, match="none of the 39 ARPAbet phones") as caught:
        base_phone(label)
    assert caught.value.code == "unknown_phone"
    assert isinstance(caught.value, ManifestError)


@pytest.mark.parametrize("value", [["L", "IY1", "S", "AH0"], ("L", "IY1", "S", "AH0"), "L IY1 S AH0", " L  IY1 S AH0 "])
def test_phones_as_list_or_as_text(value: object) -> None:
    assert split_phones(value) == LISA


@pytest.mark.parametrize(
    ("value", "code"),
    [(None, "bad_field"), (3, "bad_field"), (["L", 3], "bad_field"), ([], "missing_phones"), (" ", "missing_phones")],
)
def test_what_is_no_phones(value: object, code: str) -> None:
    with pytest.raises(PhoneError, match="'phones' is") as caught:
        split_phones(value)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("label", "base", "unk"),
    [
        ("D", ("D",), ("D",)),
        ("EH1", ("EH",), ("EH",)),
        ("<DEL>", (), ()),
        ("<unk>", ("<unk>",), ("<unk>",)),
        ("L*", ("L",), ("<unk>",)),
        ("AH0*", ("AH",), ("<unk>",)),
        ("D Z", ("D", "Z"), ("D", "Z")),
        ("D* AH1", ("D", "AH"), ("<unk>", "AH")),
    ],
)
def test_labels_by_policy(label: str, base: tuple[str, ...], unk: tuple[str, ...]) -> None:
    assert pronounced_phones(label) == pronounced_phones(label, "base") == base
    assert pronounced_phones(label, "unk") == unk


@pytest.mark.parametrize("label", ["", " ", "*", "Q", "<UNK>", "<del>", "<unk>*", "<DEL> D", "D <unk>", "D-Z", "D**"])
def test_labels_that_are_not_guessed_at(label: str) -> None:
    with pytest.raises(PhoneError) as caught:
        pronounced_phones(label)
    assert caught.value.code == "unknown_phone"


@pytest.mark.parametrize(
    ("errors", "base", "unk"),
    [
        ([], "L IY S AH", "L IY S AH"),
        ([error(0, "D")], "D IY S AH", "D IY S AH"),
        ([error(3, "<DEL>")], "L IY S", "L IY S"),
        ([error(1, "<unk>")], "L <unk> S AH", "L <unk> S AH"),
        ([error(0, "L*")], "L IY S AH", "<unk> IY S AH"),
        ([error(2, "D Z")], "L IY D Z AH", "L IY D Z AH"),
        ([error(3, "ER0"), error(2, "D Z"), error(0, "<DEL>")], "IY D Z ER", "IY D Z ER"),
        ([error(index, "<DEL>") for index in range(4)], "", ""),
    ],
)
def test_realised_phones(errors: list[Mispronunciation], base: str, unk: str) -> None:
    assert " ".join(realised_phones(LISA, errors)) == base
    assert " ".join(realised_phones(LISA, errors, "unk")) == unk


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_the_word(index: int) -> None:
    with pytest.raises(PhoneError, match="outside the word") as caught:
        realised_phones(LISA, [error(index, "D", "L")])
    assert caught.value.code == "bad_index"
    with pytest.raises(PhoneError, match=f"{index} lies outside the word, which has 4"):
        read_mispronunciation(entry(index), LISA)


def test_two_entries_for_one_phone() -> None:
    with pytest.raises(PhoneError, match="two mispronunciations are given for the phone at index 2") as caught:
        realised_phones(LISA, [error(2, "D"), error(2, "Z")])
    assert caught.value.code == "duplicate_index"


@pytest.mark.parametrize("canonical", ["IY", "IY1", "IY0"])
def test_an_entry_is_read(canonical: str) -> None:
    assert read_mispronunciation(entry(1, canonical, "D* Z"), LISA) == Mispronunciation(1, "IY", "D* Z")


@pytest.mark.parametrize(
    ("value", "code", "message"),
    [
        ("L", "bad_field", "is an object, found 'L'"),
        (entry(index="0"), "bad_field", "'index' of a mispronunciation is not a whole number but '0'"),
        (entry(index=True), "bad_field", "not a whole number but True"),
        (entry(index=None), "bad_field", "not a whole number but None"),
        (entry(canonical=None), "bad_field", "'canonical-phone' of a mispronunciation is not a text but None"),
        (entry(pronounced=None), "bad_field", "'pronounced-phone' of a mispronunciation is not a text but None"),
        (entry(canonical="Q"), "unknown_phone", "'Q' is none of the 39"),
        (entry(pronounced="Q"), "unknown_phone", "'Q' is none of the 39"),
        (entry(canonical="R"), "phone_mismatch", "'canonical-phone' 'R' is not the phone at index 0, which is 'L'"),
    ],
)
def test_issues_of_an_entry(value: object, code: str, message: str) -> None:
    with pytest.raises(PhoneError) as caught:
        read_mispronunciation(value, LISA)
    assert caught.value.code == code
    assert message in str(caught.value)

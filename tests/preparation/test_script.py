"""Scripts: exact text wins over the recogniser's, and what does not match is listed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import Case, quiet
from speechtune.data.text_checks import alike
from speechtune.errors import ConfigError
from speechtune.preparation.prepare import prepare
from speechtune.preparation.script import align_script, read_script

pytest.importorskip("whisper_normalizer")

LINES = [
    "“Mr. Brown’s dog” — it barked; twenty-five times!",
    "Then all was quiet.",
    "She said: don't go there, it is dark. Nobody answered her at all.",
    "Then all was quiet.",
    "The end...",
]


def test_the_scripts_own_characters_come_back_whole_lines_parts_and_several() -> None:
    said = {
        "a": "Mister Brown's dog, it barked 25 times. Then all was quiet.",
        "b": "she said don't go there it is dark",
        "c": "Nobody answered at all",
        "d": "then, all was quiet",
        "e": "The end.",
    }
    found = align_script(LINES, said, "en", 0.2)
    texts = {key: match.text for key, match in found.matches.items()}
    assert texts == {
        "a": f"{LINES[0]} {LINES[1]}",
        "b": "She said: don't go there, it is dark.",
        "c": "Nobody answered her at all.",
        "d": LINES[3],
        "e": LINES[4],
    }
    assert found.matches["d"].lines == (3,), "of two equal lines the one behind the piece before"
    assert found.matches["c"].errors == pytest.approx(1 / 5)
    assert found.missing == ()


def test_takes_may_come_in_any_order_and_more_than_once() -> None:
    said = {"1": "the end", "2": "then all was quiet", "3": "the end", "4": LINES[2]}
    found = align_script(LINES, said, "en", 0.2)
    assert found.matches["1"].text == found.matches["3"].text == "The end..."
    assert found.matches["4"].text == LINES[2]
    assert 0 in found.missing and 2 not in found.missing and 4 not in found.missing


def test_words_at_the_ends_of_a_line_that_the_recogniser_missed_stay_with_it() -> None:
    found = align_script(["Well, it rained all day long, alas."], {"a": "it rained all day long"}, "en", 0.3)
    assert found.matches["a"].text == "Well, it rained all day long, alas."
    assert found.matches["a"].errors == pytest.approx(2 / 7)


def test_speech_that_is_not_in_the_script_matches_nothing_well() -> None:
    found = align_script(LINES, {"a": "a completely different sentence about whales"}, "en", 0.2)
    assert found.missing == (0, 1, 2, 3, 4)
    assert all(match.errors > 0.2 for match in found.matches.values())


def test_a_script_without_words_or_not_in_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n...\n")
    with pytest.raises(ConfigError, match="no words"):
        read_script(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_script(tmp_path / "b.txt")
    (tmp_path / "c.txt").write_text("﻿One.\r\n\r\n Two. \n", encoding="utf-8")
    assert read_script(tmp_path / "c.txt") == ["One.", "Two."]


WRONG = {
    2: "The weather in the mountains was lovely this spring.",
    4: "Your password has been successfully deleted.",
    7: "Please check the letter and write again.",
    9: "Press nine to buy a painting",
}
EXTRA = "This line was never recorded by anybody."


@pytest.mark.slow
def test_texts_equal_the_script_and_five_wrong_lines_are_listed(case: Case, copy_of: Callable[[], Path]) -> None:
    said = list(dict.fromkeys(part.text for part in case.parts if part.kind == "sentence"))
    right = [f"“{text.rstrip('.').capitalize()}” ...!" for text in said]  # written as no recogniser writes
    script = [WRONG.get(place, text) for place, text in enumerate(right)]
    script.insert(5, EXTRA)
    out = copy_of()
    prepare(replace(case.prepared.request, out=out, script=script), quiet)
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text(encoding="utf-8").splitlines()]
    listed = {row["text"] for row in rejected if row["reason"] == "not_spoken"}
    assert listed == {*WRONG.values(), EXTRA}
    mismatched = [row["transcript"] for row in rejected if row["reason"] == "script_mismatch"]
    for place in WRONG:
        assert any(alike(said[place], transcript) for transcript in mismatched), "what was said there is rejected"
    texts = [json.loads(line)["text"] for line in (out / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(texts) == sorted(text for place, text in enumerate(right) if place not in WRONG)

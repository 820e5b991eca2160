"""Texts cut at sentences: by hand, and that nothing is lost whatever the text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from speechtune.inference.sentences import cut_text

BY_HAND = {
    "Hello there. How are you? Fine!": ["Hello there.", "How are you?", "Fine!"],
    "Dr. Smith met Mrs. Jones at 5 p.m. on St. James St. yesterday.": None,
    "It costs 3.50 euros, or 1,200.75 yen. Not more.": ["It costs 3.50 euros, or 1,200.75 yen.", "Not more."],
    "J. R. R. Tolkien wrote it. So did I. We agree.": ["J. R. R. Tolkien wrote it.", "So did I.", "We agree."],
    "See e.g. Fig. 3 and no. 7 (cf. p. 12).": None,
    'He said: "Stop!" Then he left.': ['He said: "Stop!"', "Then he left."],
    "Wait... what? Version 2.0 is out... Really.": ["Wait... what?", "Version 2.0 is out...", "Really."],
    "A heading\n\nThe text\nunder it.": ["A heading", "The text under it."],
    "你好。今天天气很好！我们走吧？": ["你好。", "今天天气很好！", "我们走吧？"],
    "Visit example.com. It is free.": ["Visit example.com.", "It is free."],
    "Yes. - No. ...": ["Yes.", "- No. ..."],
    "": [],
}


@pytest.mark.parametrize("text", BY_HAND)
def test_by_hand(text: str) -> None:
    assert cut_text(text) == ([text] if BY_HAND[text] is None else BY_HAND[text])


def test_long_sentences_are_cut_at_pauses_else_between_words() -> None:
    clause = "the river was high that spring, "
    pieces = cut_text(clause * 10 + "and nobody crossed.", 100)
    assert all(len(piece) <= 100 and piece.endswith((",", ".")) for piece in pieces)
    words = cut_text("word " * 50, 48)
    assert all(piece.split() == ["word"] * len(piece.split()) for piece in words) and len(words) == 6
    assert cut_text("x" * 250, 100) == ["x" * 100, "x" * 100, "x" * 50]


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet=st.sampled_from("ab .!?,\n\u3002\"'I1;"), max_size=300), st.integers(5, 60))
def test_nothing_is_lost_or_added(text: str, most: int) -> None:
    pieces = cut_text(text, most)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    letters = [piece for piece in pieces if any(character.isalnum() for character in piece)]
    assert len(letters) >= len(pieces) - 1, "only a text that is nothing else begins with a piece of marks"

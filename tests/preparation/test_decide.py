"""Each threshold rejects what lies beyond it, with a reason of its own, and nothing else."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from speechtune.preparation.cut import Piece
from speechtune.preparation.decide import Findings, decide
from speechtune.preparation.loudness import Loudness
from speechtune.preparation.quality import Quality
from speechtune.preparation.report import WORDS
from speechtune.preparation.script import Aligned, Match
from speechtune.preparation.settings import PrepareConfig
from speechtune.preparation.speakers import Voice
from speechtune.preparation.transcribe import Transcript

pytest.importorskip("rapidfuzz")

TEXT = "Please hold while I try that extension."  # 39 characters
CONFIG = PrepareConfig()


def findings() -> Findings:
    """A piece that is good in every respect, and another one."""
    first = Piece("a", "a", "x.wav", 0.0, 3.0, 2.8)
    return Findings(
        pieces={"a": first, "b": replace(first, id="b", key="b", start=4.0, end=7.0)},
        loudness=dict.fromkeys("ab", Loudness(lufs=-20, peak_dbfs=-3, clipping=0, gain_db=-3)),
        quality=dict.fromkeys("ab", Quality(snr_db=40, noise_dbfs=-60, sound=None, mos=4)),
        voices=dict.fromkeys("ab", Voice("voice-1", 0.9, 0.8)),
        transcripts={
            "a": Transcript(text=TEXT, confidence=0.9),
            "b": Transcript(text="The leader left.", confidence=0.9),
        },
    )


def with_(step: str, **changes: object) -> Callable[[Findings], None]:
    """Change a result of piece a."""

    def change(found: Findings) -> None:
        results = getattr(found, step)
        old = results["a"]
        new = replace(old, **changes) if step in ("pieces", "voices") else old.model_copy(update=changes)
        setattr(found, step, {**results, "a": new})

    return change


def with_script(text: str, errors: float) -> Callable[[Findings], None]:
    """Give a script that says this of piece a."""

    def change(found: Findings) -> None:
        found.script = Aligned({"a": Match(text, errors, (0,)), "b": Match("The leader left.", 0.0, (1,))}, ())

    return change


def unheard(found: Findings) -> None:
    """A script in which nothing is like piece a."""
    found.script = Aligned({"b": Match("The leader left.", 0.0, (1,))}, (0,))


def confirmed(found: Findings) -> None:
    """The recogniser is not sure, but says what the script says."""
    with_("transcripts", confidence=0.1)(found)
    with_script(TEXT, 0.0)(found)


CASES = {
    "too_short": with_("pieces", end=1.9),
    "too_long": with_("pieces", end=12.1),
    "tone": with_("quality", sound="tone"),
    "noise": with_("quality", sound="noise"),
    "other_voice": with_("voices", name="voice-2"),
    "other_voice, outlier": with_("voices", similarity=0.79),
    "two_voices": with_("voices", halves=0.59),
    "clipped": with_("loudness", clipping=0.0006),
    "noisy": with_("quality", snr_db=24.9),
    "low_mos": with_("quality", mos=2.99),
    "no_words": with_("transcripts", text=" ... "),
    "low_confidence": with_("transcripts", confidence=0.59),
    "speech_rate": with_("transcripts", text=TEXT * 3),
    "speech_rate, slow": with_("transcripts", text="Please."),
    "script_mismatch": with_script("Something else altogether was written here.", 0.21),
    "script_mismatch, nothing": unheard,
    "duplicate": with_("transcripts", text="the LEADER left"),
}
FINE: dict[str, Callable[[Findings], None]] = {
    "nothing": lambda found: None,
    "at the limits": with_("quality", snr_db=25.0, mos=3.0),
    "no scores": with_("quality", mos=None),
    "no halves": with_("voices", halves=None),
    "no confidence": with_("transcripts", confidence=None),
    "a script that agrees": with_script(TEXT, 0.2),
    "an unsure recogniser that a script confirms": confirmed,
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_rejected_with_its_reason(name: str) -> None:
    found = findings()
    CASES[name](found)
    reasons = decide(found, CONFIG)
    loser = "b" if name == "duplicate" and not reasons["a"] else "a"  # of equal takes the first stays
    assert [reason.code for reason in reasons[loser]] == [name.partition(",")[0]] and reasons[loser][0].message
    assert not reasons["b" if loser == "a" else "a"]
    assert reasons[loser][0].code in WORDS


@pytest.mark.parametrize("name", FINE)
def test_what_is_good_is_kept(name: str) -> None:
    found = findings()
    FINE[name](found)
    assert decide(found, CONFIG) == {"a": [], "b": []}


def test_takes_are_all_kept_where_that_is_told_and_the_better_one_stays_otherwise() -> None:
    found = findings()
    CASES["duplicate"](found)
    every = PrepareConfig.model_validate({"duplicates": {"keep": "all"}})
    assert decide(found, every) == {"a": [], "b": []}
    with_("quality", mos=3.5)(found)
    assert [reason.code for reason in decide(found, CONFIG)["a"]] == ["duplicate"]

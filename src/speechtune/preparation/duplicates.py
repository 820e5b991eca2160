"""Sentences said more than once, also in other words by a little."""

from collections.abc import Mapping

from speechtune.data.text_checks import plain
from speechtune.preparation.settings import INSTALL
from speechtune.tasks.voice_cloning.support import need


def find_duplicates(texts: Mapping[str, str], quality: Mapping[str, float], alike: float) -> dict[str, str]:
    """Of each piece that repeats a sentence the piece that stays: the one of the best quality, the first of equals.

    Texts are compared without case and marks; `alike` is the least likeness of two takes: of 1, the share of
    characters that need not be put in or left out (Levenshtein's distance without replacements).
    """
    rapidfuzz = need("rapidfuzz", "duplicates", INSTALL)
    kept: dict[str, str] = {}
    found: dict[str, str] = {}
    for key in sorted(texts, key=lambda key: -quality[key]):
        text = plain(texts[key])
        same = rapidfuzz.process.extractOne(text, kept, scorer=rapidfuzz.fuzz.ratio, score_cutoff=100 * alike)
        if same is None:
            kept[key] = text
        else:
            found[key] = same[2]
    return found

"""Word errors of a transcript against the text to be said, after normalisation by whisper-normalizer per language.

seed-tts-eval (Anastassiou et al. 2024) is followed in its definitions: jiwer's alignment, WER = (S + D + I) / N per
utterance, characters in place of words where the script does not divide words. Differences, all in the normalisation:
seed-tts-eval only strips punctuation and lowers English; here English numbers, contractions and spellings are made one
too, since recognisers differ in them, and traditional Chinese is not turned into simplified (zhconv).
"""

from collections.abc import Callable
from functools import cache
from importlib.metadata import version

from speechtune.tasks.statistics import edit_counts
from speechtune.tasks.voice_cloning.support import need

INSTALL = "pip install 'speechtune[asr]'"
BY_CHARACTER = frozenset({"zh", "yue", "ja", "th", "lo", "my", "km"})
"""Languages written without spaces between words: characters are counted, as in seed-tts-eval and Whisper's paper."""
NAMES = {"english": "en", "chinese": "zh", "mandarin": "zh", "cmn": "zh", "cantonese": "yue", "japanese": "ja"}


def language_code(language: str | None) -> str | None:
    """A language as two or three letters: "en-US" and "English" are "en"; None stays None."""
    if not language:
        return None
    name = language.strip().lower().replace("_", "-").partition("-")[0]
    return NAMES.get(name, name)


def check_installed() -> None:
    """Make sure that word errors can be counted."""
    for module in ("jiwer", "whisper_normalizer.english", "whisper_normalizer.basic"):
        need(module, "word error rate", INSTALL)


def description() -> str:
    """The normalisation of all languages in one line."""
    return (
        f"whisper-normalizer {version('whisper-normalizer')}: en EnglishTextNormalizer, others BasicTextNormalizer; "
        f"characters count as words in {', '.join(sorted(BY_CHARACTER))}"
    )


@cache
def _normaliser(code: str | None) -> Callable[[str], str]:
    if code == "en":
        return need("whisper_normalizer.english", "word error rate", INSTALL).EnglishTextNormalizer()
    basic = need("whisper_normalizer.basic", "word error rate", INSTALL).BasicTextNormalizer
    # without the marks Indic and Thai words lose their vowels
    return basic(preserve_marks=True, split_letters=code in BY_CHARACTER)


def normalise(text: str, language: str | None) -> str:
    """Text as it is compared, with single spaces."""
    return " ".join(_normaliser(language_code(language))(text).split())


def word_errors(text: str, transcript: str, language: str | None) -> tuple[int, int]:
    """Substitutions, deletions and insertions together, and the number of words (characters) of `text`.

    Returns:
        (errors, words); where the normalised text has no word, (0, 0): there is nothing to measure.
    """
    reference = normalise(text, language)
    if not any(map(str.isalnum, reference)):  # the English rules leave "..." as a token
        return 0, 0
    substitutions, deletions, insertions, words = edit_counts([reference], [normalise(transcript, language)])
    return substitutions + deletions + insertions, words

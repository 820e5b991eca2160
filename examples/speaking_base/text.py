"""The base's tokenizer: a token for each phoneme of a known word, for each letter of another.

What turns words into phonemes is the tokenizer's own normalizer, a list of replacements: it ships inside
`tokenizer.json`, and neither this project nor transformers knows that the model reads phonemes.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from speechtune.families.higgs_audio_v2.layout import DEFAULT_SCENE, DEFAULT_SYSTEM
from speechtune.families.higgs_audio_v2.tiny import SPECIAL_TOKENS

STRESS, SECONDARY = "ˈ", "ˌ"
VOWELS = "AIOQWYaiuæɑɐɒɔəɛɜɪʊʌᵻᵊeoɯ"
CONSONANTS = "bdfhjklmnpstvwzðŋɡɹɾTʃʒʤʧθxʔɫ"
PUNCTUATION = " .,?!;:'-"
PRIVATE = 0xE000  # phonemes are written as characters of the private use area: "b" the sound is not "b" the letter
PHRASES = {DEFAULT_SYSTEM: 0, DEFAULT_SCENE: 1, "system": 2, "user": 3, "assistant": 4}
PHRASE_START = 0xE200
UNKNOWN = "\ufffd"


def phoneme_symbols(phonemes: str) -> list[str]:
    """Phonemes one by one, a stressed vowel as one; secondary stress is left out."""
    return re.findall(f"{STRESS}?[{VOWELS}]|[{CONSONANTS}]", phonemes.replace(SECONDARY, ""))


SYMBOLS = [*CONSONANTS, *VOWELS, *(STRESS + vowel for vowel in VOWELS)]
CHARACTERS = {symbol: chr(PRIVATE + index) for index, symbol in enumerate(SYMBOLS)}


def word_groups(text: str, phonemes: str) -> list[tuple[str, str]]:
    """Words of a text and their phonemes, both without punctuation; empty where they do not pair."""
    words, groups = text.lower().split(), phonemes.split(" ")
    return [] if len(words) != len(groups) else [(w.strip(PUNCTUATION), g) for w, g in zip(words, groups, strict=True)]


def lexicon_of(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Word -> its most frequent phonemes, as characters of the private use area."""
    counts: dict[str, Counter[str]] = {}
    for text, phonemes in pairs:
        for word, group in word_groups(text, phonemes):
            if re.fullmatch(r"[a-z]+('[a-z]+)?|[0-9]", word):
                said = "".join(CHARACTERS[symbol] for symbol in phoneme_symbols(group))
                counts.setdefault(word, Counter())[said] += 1
    return {word: counter.most_common(1)[0][0] for word, counter in sorted(counts.items())}


def make_tokenizer(lexicon: Mapping[str, str]) -> PreTrainedTokenizerFast:
    """The tokenizer."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    phrases = [chr(PHRASE_START + index) for index in PHRASES.values()]
    vocab = {c: i for i, c in enumerate([UNKNOWN, *phrases, *PUNCTUATION, *letters, *CHARACTERS.values()])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    longest_first = sorted(lexicon, key=lambda word: (-len(word), word))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(r"\n+"), ""),
            *(normalizers.Replace(Regex(rf"\A{re.escape(p)}\z"), chr(PHRASE_START + i)) for p, i in PHRASES.items()),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[’‘`]"), "'"),
            normalizers.Replace(Regex(r"\A\s*\.{2,}\s*"), ""),  # a base that never read an ellipsis talks on and on
            normalizers.Replace(Regex(r"\.{2,}"), ","),
            *(
                normalizers.Replace(Regex(rf"(?<![a-z0-9']){re.escape(w)}(?![a-z0-9'])"), lexicon[w])
                for w in longest_first
            ),
            normalizers.Replace(Regex(r"\s+"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|end_of_text|>",
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )

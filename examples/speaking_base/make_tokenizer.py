"""Write the tokenizer of the words that the speech has, of some more texts, of common English words, and of the digits.

python examples/speaking_base/make_tokenizer.py --speech speech --texts clips.jsonl --output tokenizer
"""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from hibari import Hibari
from text import lexicon_of, make_tokenizer

COMMON_WORDS = "frequency_dictionary_en_82_765.txt"  # of symspellpy, the most frequent first


def common_words(count: int) -> list[str]:
    """The most frequent words of English, and all contractions."""
    spec = find_spec("symspellpy")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("symspellpy, for its list of words: pip install -c constraints.txt symspellpy")
    lines = (Path(spec.origin).parent / COMMON_WORDS).read_text(encoding="utf-8-sig").splitlines()
    words = [line.split()[0] for line in lines]
    return words[:count] + [word for word in words[count:] if "'" in word]


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--texts", type=Path, nargs="*", default=(), help="JSON lines with `text`: further words")
    parser.add_argument("--common-words", type=int, default=10_000)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    pairs: list[tuple[str, str]] = []
    for path in sorted(arguments.speech.glob("*.npz")):
        with np.load(path, allow_pickle=False) as shard:
            pairs += [(row["text"], row["phonemes"]) for row in json.loads(shard["rows"].tobytes())]
    phonemize = Hibari().g2p
    further = [*(str(digit) for digit in range(10)), *common_words(arguments.common_words)]
    for path in arguments.texts:
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        further += [word for row in rows if row["language"] == "en" for word in row["text"].split()]
    pairs += [(word, phonemize(word)) for word in further if word != "am"]  # alone it is read as in 9 a.m.
    lexicon = lexicon_of([*pairs, ("am", phonemize("I am sorry.").split()[1])])
    tokenizer = make_tokenizer(lexicon)
    tokenizer.save_pretrained(arguments.output)
    print(f"{len(lexicon)} words, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()

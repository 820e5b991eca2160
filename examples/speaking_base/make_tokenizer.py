"""Write the tokenizer of the words that the speech has, of some more texts, and of the digits.

python examples/speaking_base/make_tokenizer.py --speech speech --texts clips.jsonl --output tokenizer
"""

import argparse
import json
from pathlib import Path

import numpy as np
from hibari import Hibari
from text import lexicon_of, make_tokenizer


def main() -> None:
    """Write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--texts", type=Path, help="JSON lines with `text`, further words to know")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    pairs: list[tuple[str, str]] = []
    for path in sorted(arguments.speech.glob("*.npz")):
        with np.load(path, allow_pickle=False) as shard:
            pairs += [(row["text"], row["phonemes"]) for row in json.loads(shard["rows"].tobytes())]
    phonemize = Hibari().g2p
    further = [str(digit) for digit in range(10)]
    if arguments.texts:
        rows = map(json.loads, arguments.texts.read_text(encoding="utf-8").splitlines())
        further += [word for row in rows if row["language"] == "en" for word in row["text"].split()]
    lexicon = lexicon_of([*pairs, *((word, phonemize(word)) for word in further)])
    tokenizer = make_tokenizer(lexicon)
    tokenizer.save_pretrained(arguments.output)
    print(f"{len(lexicon)} words, {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()

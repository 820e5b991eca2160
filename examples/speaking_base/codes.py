"""Codes of the features, with what is spoken in each frame.

python examples/speaking_base/codes.py --features features --codec codec --output codes
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from features import read_features
from text import STRESS, word_groups

from speechtune.families.higgs_audio_v2.codec_world import WorldCodec


def places(phonemes: str) -> list[tuple[int, int, int]]:
    """Of each phoneme: its word, its place among that word's symbols, and their number (0 for a space behind it)."""
    found: list[tuple[int, int, int]] = []
    for word, group in enumerate(phonemes.split(" ")):
        symbols, own = 0, []
        for symbol in group:
            own.append(symbols)
            symbols += symbol not in STRESS + "ˌ"
        found += [(word, min(place, max(symbols - 1, 0)), max(symbols, 1)) for place in own]
        found.append((word, 0, 0))
    return found[:-1]


def write_codes(source: Path, path: Path, codec: WorldCodec) -> int:
    """Encode a shard of features; returns the number of clips."""
    rows: list[dict[str, Any]] = []
    codes: list[np.ndarray] = []
    where: list[np.ndarray] = []
    for row, features, spoken_F in read_features(source):
        if not word_groups(row["text"], row["phonemes"]):
            continue  # the phonemizer took a name for a number
        codes.append(codec.quantise(features))
        where.append(np.asarray(places(row["phonemes"]), np.int16)[spoken_F])
        rows.append(row)
    arrays = {"codes": np.concatenate(codes), "places": np.concatenate(where)}
    arrays["rows"] = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)
    temporary.replace(path)
    return len(rows)


def main() -> None:
    """Encode what is new."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--codec", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    codec, started, count = WorldCodec(str(arguments.codec)), time.monotonic(), 0
    for source in sorted(arguments.features.glob("*.npz"))[arguments.part :: arguments.parts]:
        path = arguments.output / source.name
        if not path.exists():
            count += write_codes(source, path, codec)
            print(f"{path.name}: {count} clips in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()

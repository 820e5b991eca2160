"""Codes of the features, of each clip as it is and in other vocal tracts, with what is spoken in each frame.

python examples/speaking_base/codes.py --features features --codec codec --output codes
"""

import argparse
import json
import os
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from features import read_features
from text import STRESS, word_groups
from warp import Warp, random_warp, warped

from speechtune.families.higgs_audio_v2.codec_world import Features, WorldCodec

MOST_HEARD = "af_heart"
WARPS = {MOST_HEARD: 96, "flite-awb": 48, "flite-rms": 48, "flite-slt": 48, "joe": 48}
FEW_WARPS = 12  # of the other voices, which say few clips
HEARD_WARPS_PER_CLIP, WARPS_PER_CLIP = 3, 6  # of the voice most heard, and of the others


@cache
def warps_of(voice: str) -> tuple[Warp, ...]:
    """The voices that are made of a voice: the same in all of its clips."""
    draw = random.Random(voice)
    return tuple(random_warp(draw) for _ in range(WARPS.get(voice, FEW_WARPS)))


def variants(row: dict[str, Any], features: Features) -> dict[str, Features]:
    """Features by the name of the voice that they are of."""
    voice, made = row["voice"], {row["voice"]: features}
    if row["split"] == "train":
        warps, count = warps_of(voice), HEARD_WARPS_PER_CLIP if voice == MOST_HEARD else WARPS_PER_CLIP
        for index in random.Random(row["name"]).sample(range(len(warps)), count):
            made[f"{voice}~{index}"] = warped(features, warps[index])
    return made


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
        made = variants(row, features)
        codes += [codec.quantise(one) for one in made.values()]
        where.append(np.asarray(places(row["phonemes"]), np.int16)[spoken_F])
        rows.append({**row, "voices": list(made)})
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

"""Fit the tables of the WORLD codec on features, and write the codec's folder.

python examples/speaking_base/fit_codec.py --features features --output codec --size 512
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
from features import read_features
from safetensors.numpy import save_file
from warp import in_room, random_room, random_warp, warped

from speechtune.families.higgs_audio_v2.codec_world import MODEL_TYPE, SAMPLING_RATE, Features, scale_pitch

NUM_CODEBOOKS = 8
COMPONENTS = 64
ITERATIONS = 15
NOISE_DECIBELS = (-45.0, -12.0)
SEED = 0


def training_frames(folder: Path, per_voice: int, warps: int) -> Features:
    """Frames of training clips, the same number of clips of each voice, as they are and as other voices and rooms."""
    draw, by_voice = random.Random(SEED), dict[str, list[Features]]()
    for path in sorted(folder.glob("*.npz")):
        for row, features, _ in read_features(path):
            if row["split"] == "train":
                by_voice.setdefault(row["voice"], []).append(features)
    chosen: list[Features] = []
    for clips in by_voice.values():
        for features in draw.sample(clips, min(per_voice, len(clips))):
            others = [warped(features, random_warp(draw)) for _ in range(warps)]
            rooms = [random_room(draw, *NOISE_DECIBELS) if index % 2 else None for index in range(warps)]
            chosen += [features, *(in_room(o, r) if r else o for o, r in zip(others, rooms, strict=True))]
    print(f"{len(by_voice)} voices, {len(chosen)} clips")
    names = ("envelope", "pitch", "aperiodicity")
    return Features(*(np.concatenate([getattr(clip, name) for clip in chosen]) for name in names))


def assign(values_FD: np.ndarray, entries_VD: np.ndarray) -> np.ndarray:
    """`nearest` by matrix products, in pieces: faster, and equal but for ties."""
    half_norms = 0.5 * np.square(entries_VD).sum(axis=1)
    pieces = np.array_split(values_FD, max(1, len(values_FD) // 8192))
    return np.concatenate([(half_norms - piece @ entries_VD.T).argmin(axis=1) for piece in pieces])


def k_means(values_FD: np.ndarray, size: int, draw: np.random.Generator) -> np.ndarray:
    """Entries (V, D) of a codebook; one that no value is near to starts anew at a value."""
    values_FD = values_FD.astype(np.float32)
    entries_VD = values_FD[draw.permutation(len(values_FD))[:size]].copy()
    for _ in range(ITERATIONS):
        chosen_F = assign(values_FD, entries_VD)
        counts_V = np.bincount(chosen_F, minlength=size)
        order = np.argsort(chosen_F, kind="stable")
        starts_V = np.minimum(np.cumsum(counts_V) - counts_V, len(order) - 1)
        sums_VD = np.add.reduceat(values_FD[order], starts_V, axis=0)
        others_VD = values_FD[draw.integers(len(values_FD), size=size)]
        entries_VD = np.where(counts_V[:, None] > 0, sums_VD / np.maximum(counts_V, 1)[:, None], others_VD)
    return entries_VD.astype(np.float16).astype(np.float32)  # as they are stored, for the stages that follow


def fit(frames: Features, size: int) -> dict[str, np.ndarray]:
    """Tables of the codec."""
    draw = np.random.default_rng(SEED)
    mean = frames.envelope.mean(axis=0).astype(np.float32)
    centred = (frames.envelope - mean).astype(np.float32)
    variances, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    components = axes[:, ::-1][:, :COMPONENTS].T.astype(np.float32)
    print(f"{len(centred)} frames; {variances[::-1][:COMPONENTS].sum() / variances.sum():.2%} of variance kept")
    residual = centred @ components.T
    total, tables = np.square(residual).sum(), {"mean": mean, "components": np.ascontiguousarray(components)}
    for stage in range(NUM_CODEBOOKS - 2):
        entries = tables[f"envelope.{stage}"] = k_means(residual, size, draw)
        residual = residual - entries[assign(residual, entries)]
        print(f"envelope {stage}: {np.square(residual).sum() / total:.4f} of the energy left", flush=True)
    pitch = scale_pitch(frames.pitch).astype(np.float32)
    tables["pitch"] = k_means(pitch, size, draw)
    voiced = frames.pitch[:, 4:] > 0.5
    error = np.abs(pitch - tables["pitch"][assign(pitch, tables["pitch"])])[:, :4][voiced] / 6 * 12 / np.log(2)
    print(f"pitch: {error.mean():.2f} semitones off")
    tables["aperiodicity"] = k_means(frames.aperiodicity, size, draw)
    return tables


def write_codec(tables: dict[str, np.ndarray], directory: Path) -> None:
    """The codec's folder: entries in fp16, mean and components in float32."""
    directory.mkdir(parents=True, exist_ok=True)
    exact = ("mean", "components")
    stored = {name: table if name in exact else table.astype(np.float16) for name, table in tables.items()}
    save_file(stored, directory / "model.safetensors")
    config = {"model_type": MODEL_TYPE, "num_codebooks": NUM_CODEBOOKS, "sampling_rate": SAMPLING_RATE}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--features", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--size", type=int, default=512, help="entries of a codebook")
    parser.add_argument("--per-voice", type=int, default=24)
    parser.add_argument("--warps", type=int, default=2)
    arguments = parser.parse_args()
    started = time.monotonic()
    frames = training_frames(arguments.features, arguments.per_voice, arguments.warps)
    write_codec(fit(frames, arguments.size), arguments.output)
    print(f"{arguments.output}: {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()

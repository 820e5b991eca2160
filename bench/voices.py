"""What the benches train on: samples of voice cloning with made-up codes, and a base of the real classes.

Codes are drawn at random, for their values cost nothing; lengths and layout are those of real data. A clip has 25
frames a second, and 3.5 letters of text: as many positions as speech takes with the released tokenizer, for the byte
tokenizer here makes a position of each letter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speechtune.cache.encoded_set import EncodedSet, EncodeReport
from speechtune.cache.store import FeatureStore
from speechtune.config import RunConfig
from speechtune.families import build_config, create_family
from speechtune.families.higgs_audio_v2 import tiny
from speechtune.family import Family
from speechtune.lora.apply import apply_lora
from speechtune.precision import plan_precision
from speechtune.training.job import Job
from speechtune.types import AudioRef, Clip, Sample

FRAMES_PER_SECOND, CODEBOOKS, LETTERS_PER_SECOND = 25, 8, 3.5
SHORTEST_SECONDS, LONGEST_SECONDS = 3.0, 30.0
SYSTEM = "Speak."  # in bytes about as long as the usual system message is in tokens of the released tokenizer
SAMPLES_PER_STEP = 8
LORA_RANK, LORA_ALPHA, RATE, SEED = 16, 32, 1e-4, 42


@dataclass(frozen=True)
class Size:
    """Dimensions of the bench's base.

    256 wide and 4 deep, so that a run of some steps takes seconds on two cores. The vocabulary is of bytes: a text head
    over 128,256 entries would be a lead of its own for the side that computes it only where a label is. 130 codes per
    codebook keep the share of the heads (audio here, nearly all text there) among the weights that a position passes
    through below that of the released base: 12 % against 15 %.
    """

    hidden_size: int = 256
    num_layers: int = 4
    codebook_size: int = 130


BENCH = Size()


@dataclass(frozen=True)
class Example:
    """Texts, and codes of shape (frames, codebooks), of one sample."""

    reference_text: str
    text: str
    reference_FK: np.ndarray
    target_FK: np.ndarray


def mixed_seconds(count: int, seed: int = 1) -> list[tuple[float, float]]:
    """Durations of reference and target as in voice-cloning sets: log-normal, median 7 s, cut to 3 to 30 s.

    Random batches of 8 are padded by 36 % on average, as real ones were found to be; that is what sets the spread.
    """
    drawn = np.random.default_rng(seed).lognormal(np.log(7.0), 0.6, (count, 2))
    return [(float(a), float(b)) for a, b in np.clip(drawn, SHORTEST_SECONDS, LONGEST_SECONDS)]


def equal_seconds(count: int, seconds: float = 7.0) -> list[tuple[float, float]]:
    """The same duration everywhere."""
    return [(seconds, seconds)] * count


def make_examples(durations: Sequence[tuple[float, float]], codebook_size: int, seed: int = 2) -> list[Example]:
    """Examples of these durations; codes are below the two stream ids."""
    random = np.random.default_rng(seed)

    def text(seconds: float) -> str:
        return "".join(random.choice(list("abcdefghij klmno"), int(seconds * LETTERS_PER_SECOND))).strip() or "a"

    def codes(seconds: float) -> np.ndarray:
        frames = max(1, round(seconds * FRAMES_PER_SECOND))
        return random.integers(0, codebook_size - 2, (frames, CODEBOOKS)).astype(np.int16)

    return [Example(text(a), text(b), codes(a), codes(b)) for a, b in durations]


def write_examples(examples: Sequence[Example], folder: Path) -> Path:
    """Write examples as the peer reads them."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"reference_text": e.reference_text, "text": e.text}) + "\n" for e in examples]
    (folder / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    arrays = {f"reference-{i}": e.reference_FK for i, e in enumerate(examples)}
    np.savez(folder / "codes.npz", **arrays, **{f"target-{i}": e.target_FK for i, e in enumerate(examples)})
    return folder


def read_examples(folder: Path) -> list[Example]:
    """Read back what `write_examples` wrote."""
    rows = [json.loads(line) for line in (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    codes = np.load(folder / "codes.npz")
    return [
        Example(row["reference_text"], row["text"], codes[f"reference-{i}"], codes[f"target-{i}"])
        for i, row in enumerate(rows)
    ]


def make_base(folder: Path, size: Size = BENCH) -> Path:
    """Write model and codec folders; the codec is only there to give the codes an identity."""
    tiny.make_model(folder / "model", **vars(size))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tiny.codec_from_config(codebook_size=size.codebook_size - 2).save_pretrained(folder / "codec")
    return folder


def bench_config(base: Path, output_dir: Path, steps: int, **sections: dict[str, Any]) -> RunConfig:
    """The recipe of the benches: the peer's LoRA, optimizer and samples per step; all else as users get it."""
    values: dict[str, dict[str, Any]] = {
        "model": {"path": str(base / "model"), "codec_path": str(base / "codec")},
        "lora": {"rank": LORA_RANK, "alpha": LORA_ALPHA, "dropout": 0.0},
        "train": {"max_steps": steps, "batch_size": SAMPLES_PER_STEP, "learning_rate": RATE, "schedule": "constant"},
    }
    values["train"] |= {"betas": [0.9, 0.95], "warmup_steps": 0, "seed": SEED}
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return build_config({"family": "higgs_audio_v2", "output_dir": output_dir, **values}, "bench")


def encoded_set(family: Family, examples: Sequence[Example], root: Path) -> EncodedSet:
    """The examples as the toolkit's own encoded set, their codes in its cache."""
    samples, keys = [], []
    with FeatureStore(root, family.encode_key) as store:
        for i, example in enumerate(examples):
            clip = AudioRef(data=b"made-up codes")
            reference = Clip(clip, example.reference_text)
            samples.append(Sample(f"sample-{i}", example.text, clip, (reference,), system=SYSTEM))
            own = []
            for codes_FK in (example.reference_FK, example.target_FK):
                key = hashlib.sha256(codes_FK.tobytes()).hexdigest()
                store.put(key, codes_FK)
                own.append(key)
            keys.append(tuple(own))
    count = 2 * len(samples)
    return EncodedSet(family, samples, store, keys, EncodeReport(count, 0, count, 0.0, 0.0))


def make_job(config: RunConfig, examples: Sequence[Example], cache: Path) -> Job:
    """What `speechtune.training.prepare.prepare` makes of a manifest, from examples whose codes are known."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    family = create_family(config)
    plan = plan_precision(config.train.precision)
    model = apply_lora(family.load(plan), family, config.lora, config.train.seed)
    data = encoded_set(family, examples, cache)
    return Job(config, family, model, plan, data, None, {"dataset": data.fingerprint}, {})

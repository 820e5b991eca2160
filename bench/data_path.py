"""The data path of an epoch: cached codes against the codec in `__getitem__`, as the original pipeline had it.

Both sides yield the same padded batches of the shipped recordings, every second clip of a speaker after the one before
it; nothing is trained. Time is from the second epoch on, when the cache is filled. The codec here is the demo's, with
the released one's layers but a small part of its width: with that one the codec's side takes longer still.
"""

from __future__ import annotations

import json
import tempfile
from importlib import resources
from itertools import pairwise
from pathlib import Path
from time import perf_counter

from meter import quiet
from torch.utils.data import DataLoader, Dataset
from voices import SYSTEM

from speechtune.audio import read_audio
from speechtune.cache.encode import encode_samples
from speechtune.cache.encoded_set import EncodedSet
from speechtune.families import build_config, create_family
from speechtune.families.higgs_audio_v2.tiny import make_base
from speechtune.family import Family
from speechtune.training.batching import BatchPlan, StepBatches, make_loader
from speechtune.types import AudioRef, Batch, Clip, Encoded, Sample

BATCH_SIZE = 8


class CodecInTheLoop(Dataset[Encoded]):
    """Reads and encodes a sample's clips whenever it is asked for."""

    def __init__(self, family: Family, samples: list[Sample]) -> None:
        self.family, self.samples = family, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Encoded:
        sample = self.samples[index]
        audios = [read_audio(clip, self.family.sampling_rate) for clip in self.family.clips(sample)]
        return self.family.encode(sample, self.family.encode_audio(audios))


def demo_samples(voices: Path) -> list[Sample]:
    """Each recording with the one before it, of the same speaker, as reference."""
    clips = [json.loads(line) for line in (voices / "clips.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [(a, b) for a, b in pairwise(clips) if a["speaker"] == b["speaker"]]
    return [
        Sample(
            target["audio"],
            target["text"],
            AudioRef(str(voices / target["audio"])),
            (Clip(AudioRef(str(voices / reference["audio"])), reference["text"]),),
            system=SYSTEM,
        )
        for reference, target in pairs
    ]


def epoch_with_codec(family: Family, samples: list[Sample]) -> float:
    """Seconds for all batches of an epoch, encoded on the way."""
    started = perf_counter()
    loader: DataLoader[Batch] = DataLoader(
        CodecInTheLoop(family, samples), BATCH_SIZE, shuffle=True, collate_fn=family.collate
    )
    seen = sum(len(batch.sample_ids) for batch in loader)
    assert seen == len(samples)
    return perf_counter() - started


def epoch_from_cache(encoded: EncodedSet, epoch: int) -> float:
    """Seconds for all batches of an epoch."""
    plan = BatchPlan(encoded.lengths, BATCH_SIZE)
    steps = plan.num_steps(1)
    started = perf_counter()
    batches = StepBatches(plan, encoded, encoded.family, 0)
    loader = make_loader(batches, range(epoch * steps, (epoch + 1) * steps), workers=0, pin_memory=False)
    seen = sum(len(batch.sample_ids) for step in loader for batch in step)
    seconds = perf_counter() - started
    assert seen >= len(encoded)
    return seconds


def measure(pairs: int = 5) -> dict[str, list[float]]:
    """Ratio and seconds of both."""
    result: dict[str, list[float]] = {"codec in the loop / cached codes, time": [], "cached codes, samples/s": []}
    with quiet(), tempfile.TemporaryDirectory(prefix="speechtune-bench-") as name:
        folder = Path(name)
        voices = Path(str(resources.files("speechtune") / "assets" / "demo-voices"))
        model = make_base(folder / "base", [AudioRef(str(path)) for path in sorted(voices.rglob("*.flac"))[::3]])
        config = build_config({"family": "higgs_audio_v2", "output_dir": folder, "model": model}, "bench")
        family, samples = create_family(config), demo_samples(voices)
        encoded = encode_samples(family, samples, folder / "cache", quiet=True)
        epoch_from_cache(encoded, 0)
        for pair in range(pairs):
            codec = epoch_with_codec(family, samples)
            cached = epoch_from_cache(encoded, pair + 1)
            result["codec in the loop / cached codes, time"].append(codec / cached)
            result["cached codes, samples/s"].append(len(samples) / cached)
    return result

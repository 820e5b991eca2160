"""Training CSM beside `peers/csm_trainer.py`: the same dimensions, clips, LoRA rank, samples per step and threads.

    python bench/csm.py [--pairs 3] [--json FILE]

Real speech, each clip with another of its speaker as reference. Both sides are timed by one hook behind every optimizer
step, the first left out; tokens are real positions, without padding. The lead is stated with its parts: ours with the
depth decoder on all frames, padded too, and by transformers' layers too; the peer on a sixteenth of the frames, and how
much of its time goes into the codec. The first run of ours, which encodes, is timed from its start.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from meter import Meter, metered, quiet
from peers import csm_trainer as peer
from run import RESULTS
from table import Row, Threshold, make_rows, print_rows, write_results

from speechtune.audio import read_audio
from speechtune.commands.demo_voice import VOICES
from speechtune.commands.guarded import limit_kernel_caches
from speechtune.families import build_config
from speechtune.families.csm import tiny
from speechtune.training.loop import Run
from speechtune.training.prepare import prepare
from speechtune.types import AudioRef

SAMPLES, SAMPLES_PER_STEP = 24, 8
STEPS = 1 + SAMPLES // SAMPLES_PER_STEP
SIZE: dict[str, Any] = {"hidden_size": 256, "num_codebooks": 32, "codebook_size": 256}
PARTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, all frames": {"data": {"depth_share": 1.0}},
    "ours, all frames, padded": {"data": {"depth_share": 1.0}, "batch": {"packing": False}},
    "ours, all frames, padded, native layers": {
        "data": {"depth_share": 1.0},
        "batch": {"packing": False},
        "speed": {"fast_forward": False},
    },
}
LEAST = {"ours / peer": Threshold(least=3.0)}


def write_data(folder: Path) -> None:
    """`clips.jsonl` for the peer, and the same samples as a manifest for ours."""
    clips = [json.loads(line) for line in (VOICES / "clips.jsonl").read_text(encoding="utf-8").splitlines()]
    voices: dict[str, list[dict[str, Any]]] = {}
    for clip in clips:
        voices.setdefault(clip["speaker"], []).append(clip)
    pairs = [(own[(i + 1) % len(own)], clip) for own in voices.values() for i, clip in enumerate(own)][:SAMPLES]
    lines, rows = [], []
    for reference, target in pairs:
        turns = [{"text": clip["text"], "audio": str(VOICES / clip["audio"])} for clip in (reference, target)]
        lines.append(json.dumps({"turns": turns}) + "\n")
        texts = [{"type": "text", "text": turn["text"]} for turn in turns]
        sounds = [{"type": "audio", "audio_url": turn["audio"]} for turn in turns]
        asked = {"role": "user", "content": [texts[0], sounds[0], texts[1]]}
        rows.append({"messages": [asked, {"role": "assistant", "content": [texts[1], sounds[1]]}], "speaker": "0"})
    (folder / "clips.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")


def train_ours(folder: Path, sections: dict[str, Any]) -> Meter:
    """Train with the toolkit's loop, guards on."""
    shutil.rmtree(folder / "ours", ignore_errors=True)
    values: dict[str, Any] = {
        "family": "csm",
        "output_dir": folder / "ours",
        "model": {"path": str(folder / "base")},
        "lora": {"rank": 16, "alpha": 32, "dropout": 0.0},
        "train": {"max_steps": STEPS, "batch_size": SAMPLES_PER_STEP, "schedule": "constant"},
        "tracking": {"trackers": ()},
    }
    data = {"train": folder / "train.json", "cache_dir": folder / "cache"} | sections.get("data", {})
    config = build_config(values | sections | {"data": data}, "bench")
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), project_dir=folder / "ours")
    job = prepare(config, accelerator)
    with metered() as meter:
        run = Run(job, accelerator)

        def count(*_: object) -> None:
            meter.tokens += int(job.train_set.lengths[run.plan.global_batch(len(meter.marks))].sum())

        run.optimizer.register_step_pre_hook(count)
        run.train()
    return meter


def train_peer(folder: Path, ratio: float) -> tuple[Meter, float]:
    """Train with the peer's script; the meter, and the share of the timed steps that went into the codec."""
    model = peer.load_model(str(folder / "base"))
    data = peer.Voices(str(folder / "base"), folder / "clips.jsonl", ratio)
    inner, codec_marks = model.get_base_model(), [0.0]
    encode: Callable[..., Any] = inner.codec_model.encode

    def timed(*arguments: Any) -> Any:
        started = time.monotonic()
        try:
            return encode(*arguments)
        finally:
            if meter.marks:
                codec_marks[0] += time.monotonic() - started

    inner.codec_model.encode = timed
    with metered() as meter:

        def count(_: object, __: object, inputs: dict[str, torch.Tensor], ___: object) -> None:
            meter.tokens += int(inputs["attention_mask"].sum())

        inner.register_forward_hook(count, with_kwargs=True)
        peer.make_trainer(model, data, STEPS, folder / "peer").train()
    return meter, codec_marks[0] / (meter.marks[-1][0] - meter.marks[0][0])


def measure(pairs: int) -> dict[str, list[float]]:
    """Rates of every side, taken in turn, and the ratios of ours to the peer's."""
    rates: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        rates.setdefault(name, []).append(value)
        print(f"{name}: {value:,.3g}", flush=True)

    with quiet(), tempfile.TemporaryDirectory(prefix="speechtune-bench-") as name:
        folder = Path(name)
        write_data(folder)
        speech = [AudioRef(str(path)) for path in sorted(VOICES.rglob("*.flac"))[::3]]
        tiny.make_model(folder / "base", [read_audio(ref, 24_000) for ref in speech], **SIZE)
        started = time.monotonic()
        train_ours(folder, {})
        note("first run with encoding, seconds", time.monotonic() - started)
        for _ in range(pairs):
            for part, sections in PARTS.items():
                note(f"tokens/s, {part}", train_ours(folder, sections).rate().wall)
            for ratio, side in ((1.0, "peer"), (1 / 16, "peer, a sixteenth of the frames")):
                meter, share = train_peer(folder, ratio)
                note(f"tokens/s, {side}", meter.rate().wall)
                note(f"share of time in the codec, {side}", share)
    peers = rates["tokens/s, peer"]
    ratios = {
        f"{part} / peer": [ours / theirs for ours, theirs in zip(rates[f"tokens/s, {part}"], peers, strict=True)]
        for part in PARTS
    }
    return ratios | rates


def main() -> int:
    """Measure, print, write."""
    limit_kernel_caches()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "csm.json")
    options = parser.parse_args()
    rows: list[Row] = make_rows("CSM", measure(options.pairs), LEAST)
    write_results(rows, options.json)
    print_rows(rows)
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())

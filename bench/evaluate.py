"""How much faster a voice evaluation is in batches than one prompt at a time; pairs of runs in one process.

    python bench/evaluate.py --prompts 200 --pairs 3

On the demo's small model. Both sides do all of it: prompts, generation to the same length cap, decoding, wavs on disk,
reading them back and measuring. Scorers are left out: they see the same audio on both sides.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from importlib import resources
from pathlib import Path

import torch

from speechtune.commands.demo_voice import LONGEST_SECONDS
from speechtune.commands.guarded import guarded
from speechtune.families.higgs_audio_v2.tiny import make_base
from speechtune.family import Scorers
from speechtune.inference.evaluate_voices import System, evaluate_voices
from speechtune.types import AudioRef, GenerationOptions

ROWS = 60
RESULTS = Path(__file__).parent / "results"


def write_prompts(path: Path, count: int) -> Path:
    """Prompts in seed-tts-eval's format from the shipped voices: each clip's voice speaks another clip's text."""
    voices = Path(str(resources.files("speechtune") / "assets" / "demo-voices"))
    clips = [json.loads(line) for line in (voices / "clips.jsonl").read_text(encoding="utf-8").splitlines()]
    clips = [clip for clip in clips if clip["duration_seconds"] <= LONGEST_SECONDS]  # those the demo takes
    lines = []
    for number in range(count):
        voice, said = clips[number % len(clips)], clips[(number * 7 + 3) % len(clips)]
        text = f"{voice['text']}|{voices / voice['audio']}|{said['text']}"
        lines.append(f"prompt-{number}|{text}\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def seconds(prompts: Path, base: Path, folder: Path, batch_size: int) -> float:
    """Time of one evaluation; the references are encoded already."""
    started = time.monotonic()
    evaluate_voices(
        prompts,
        [System("base", str(base / "model"), None)],
        folder / f"{batch_size}-{started}",
        Scorers(None, None, None),
        model_options={"codec_path": str(base / "codec")},
        cache_dir=folder / "cache",
        batch_size=batch_size,
        options=GenerationOptions(temperature=0, max_new_tokens=ROWS),
    )
    return time.monotonic() - started


def run() -> int:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="speechtune-bench-") as name:
        folder = Path(name)
        voices = Path(str(resources.files("speechtune") / "assets" / "demo-voices"))
        base = folder / "base"
        make_base(base, [AudioRef(str(path)) for path in sorted(voices.rglob("*.flac"))[::3]])
        prompts = write_prompts(folder / "prompts.lst", options.prompts)
        seconds(write_prompts(folder / "all.lst", options.prompts), base, folder, options.batch_size)  # fills the cache
        ratios = []
        for _ in range(options.pairs):
            alone = seconds(prompts, base, folder, 1)
            together = seconds(prompts, base, folder, options.batch_size)
            ratios.append(alone / together)
            print(f"one by one {alone:.1f} s, in batches of {options.batch_size} {together:.1f} s: {ratios[-1]:.2f} x")
    result = {
        "prompts": options.prompts,
        "batch_size": options.batch_size,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "evaluate.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded(run))

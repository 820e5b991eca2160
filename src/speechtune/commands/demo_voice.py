"""The demonstration of a family that speaks, on a base of random weights: it learns speech of four people by heart."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from speechtune.cache.encode import encode_samples
from speechtune.config import RunConfig
from speechtune.families import build_config, family_part
from speechtune.inference.generate import write_output
from speechtune.inference.load import load_model
from speechtune.training.run import Outcome
from speechtune.types import AudioRef, GenerationOptions, Output

VOICES = Path(__file__).parents[1] / "assets" / "demo-voices"
SPEAKERS = ("allison", "june", "carlo", "ivrvoice-ru")
CLIPS_PER_SPEAKER = 2
LONGEST_SECONDS = 3.2
SYSTEM = "Generate audio following instruction."
INSTRUCTION = "Please generate speech for given text in reference audio's voice: "
SCORERS = {"asr": "pocketsphinx", "speaker": "resemblyzer", "mos": "distillmos"}  # packages with weights inside
SPOKEN = 0  # index of the training sample that is spoken at the end


def write_data(directory: Path) -> Path:
    """Write the manifest: per speaker a few short clips, each with another one as reference."""
    clips = [json.loads(line) for line in (VOICES / "clips.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = []
    for speaker in SPEAKERS:
        own = [c for c in clips if c["speaker"] == speaker and c["duration_seconds"] <= LONGEST_SECONDS]
        chosen = own[:CLIPS_PER_SPEAKER]
        rows += [chatml_row(chosen[(i + 1) % len(chosen)], target) for i, target in enumerate(chosen)]
    path = directory / "train.json"
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def chatml_row(reference: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """One row in the original pipeline's ChatML."""

    def audio(clip: dict[str, Any]) -> dict[str, str]:
        return {"type": "audio", "audio_url": str((VOICES / clip["audio"]).resolve())}

    def text(value: str) -> dict[str, str]:
        return {"type": "text", "text": value}

    asked = [text(reference["text"]), audio(reference), text(INSTRUCTION + target["text"])]
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [text(target["text"]), audio(target)]},
        ],
        "speaker": target["speaker"],
        "misc": {"language": target["language"]},
    }


def demo_config(family: str, manifest: Path, directory: Path) -> RunConfig:
    """The demo's recipe, on the family's embedded base."""
    tiny = family_part(family, "tiny")
    speech = [AudioRef(str(path)) for path in sorted(VOICES.rglob("*.flac"))[::3]]
    batch_size = len(SPEAKERS) * CLIPS_PER_SPEAKER
    scorers = {name: package for name, package in SCORERS.items() if importlib.util.find_spec(package) is not None}
    return build_config(
        {
            "family": family,
            "output_dir": directory / "run",
            "model": tiny.make_base(directory / "base", speech),
            "data": {"train": manifest, "cache_dir": directory / "cache", **getattr(tiny, "DEMO_DATA", {})},
            "lora": {"rank": 32, "alpha": 64, "dropout": 0.0, "targets": "all"},
            "train": {"max_steps": 240, "batch_size": batch_size, "learning_rate": 4e-3, "warmup_steps": 20},
            "evaluate": {"every_steps": 80, "prompts": 2, "temperature": 0, **scorers},
            "checkpoint": {"every_steps": 80, "keep_last": 2},
            "tracking": {"log_every_steps": 20},
        },
        "demo",
    )


def measure(outcome: Outcome, manifest: Path, merged: Path, console: Console) -> list[tuple[str, str]]:
    """Speak a trained sentence with the merged model; the table's rows on it, and on the last evaluation's scores."""
    spoken, wanted, right = speak(outcome, merged)
    wav = merged.with_name("speech.wav")
    write_output(spoken, wav)
    base = json.loads((outcome.job.config.output_dir / "samples" / "base_scores.json").read_text(encoding="utf-8"))
    trained = outcome.result.scores
    rows = [
        ("speech", f"{wav} ({spoken.audio.duration_seconds if spoken.audio else 0:.2f} s)"),
        ("frames wanted / generated", f"{wanted} / {len(spoken.arrays['codes'])} ({right:.1%} of codes right)"),
    ]
    codebooks = [name for name in base if name.startswith("codebook_accuracy")]
    for name in [name for name in base if name in trained and name not in codebooks]:
        rows.append((f"evaluation: {name}, base -> trained", f"{base[name]:.3g} -> {trained[name]:.3g}"))
    if codebooks:
        first, last = (sum(values[name] for name in codebooks) / len(codebooks) for values in (base, trained))
        rows.append(("evaluation: codebook accuracy, base -> trained", f"{first:.1%} -> {last:.1%}"))
    return rows


def speak(outcome: Outcome, merged: Path) -> tuple[Output, int, float]:
    """Let the merged model say a training sentence; the output, the frames wanted and the share of right codes."""
    config, sample = outcome.job.config, outcome.job.train_set.samples[SPOKEN]
    *_, target = outcome.job.train_set.features(SPOKEN)
    merged_base = config.model.model_copy(update={"path": str(merged)})
    family, model = load_model(config.model_copy(update={"model": merged_base}), None)
    prompt = encode_samples(family, [replace(sample, audio=None)], config.cache_dir, quiet=True)
    options = GenerationOptions(temperature=0, max_new_tokens=4 * len(target))
    (output,) = family.generate(model, [(prompt.samples[0], prompt.features(0))], options)
    codes = output.arrays["codes"]
    shared = min(len(codes), len(target))
    return output, len(target), float((codes[:shared] == target[:shared]).mean())

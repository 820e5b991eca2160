"""The embedded demo: every step of the pipeline on a small model and real speech, ending in a table measured here."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import HiggsAudioV2ForConditionalGeneration

from speechtune.adapter_files import verify_adapter
from speechtune.audio import read_audio
from speechtune.cache import encode_samples
from speechtune.config import DataConfig, RunConfig, build_config
from speechtune.errors import TrainingError
from speechtune.families import tiny
from speechtune.families.base import AudioRef, GenerationOptions, Output
from speechtune.generate import load_model, write_output
from speechtune.merge import merge
from speechtune.run import Outcome, run_training
from speechtune.validate import print_report, validate

SPEAKERS = ("allison", "june", "carlo", "ivrvoice-ru")
CLIPS_PER_SPEAKER = 2
LONGEST_SECONDS = 3.2
SYSTEM = "Generate audio following instruction."
INSTRUCTION = "Please generate speech for given text in reference audio's voice: "
SPOKEN = 0  # index of the training sample that is spoken at the end


def run_demo(directory: Path) -> int:
    """Validate, encode, train, verify, merge and generate under `directory`; print the table; return the exit code."""
    started = time.monotonic()
    console = Console()
    with resources.as_file(resources.files("speechtune") / "assets") as assets:
        manifest = write_manifest(assets / "demo-voices", directory / "train.json")
        console.rule("1. validate")
        report = validate(manifest, DataConfig(), deep=True)
        print_report(report, console)
        if report.faults:
            return 2
        console.rule("2. encode and train")
        config = demo_config(make_base(assets / "demo-voices", directory / "base"), manifest, directory)
        if (config.output_dir / "config.yaml").exists():
            shutil.rmtree(config.output_dir)
        outcome = run_training(config)
        if outcome.result.signal is not None:
            return 128 + outcome.result.signal
        console.rule("3. verify, merge, generate")
        rows = check(outcome, config, directory)
    table = Table("measured in this run", "value", title="speechtune demo")
    for name, value in rows:
        table.add_row(name, value)
    table.add_row("time", f"{time.monotonic() - started:.0f} s on {torch.get_num_threads()} threads")
    console.print(table)
    return 0


def write_manifest(voices: Path, path: Path) -> Path:
    """Write the demo's ChatML: per speaker a few short clips, each with another one as reference."""
    clips = [json.loads(line) for line in (voices / "clips.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = []
    for speaker in SPEAKERS:
        own = [c for c in clips if c["speaker"] == speaker and c["duration_seconds"] <= LONGEST_SECONDS]
        chosen = own[:CLIPS_PER_SPEAKER]
        for i, target in enumerate(chosen):
            reference = chosen[(i + 1) % len(chosen)]
            rows.append(chatml_row(voices, speaker, reference, target))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


def make_base(voices: Path, directory: Path) -> Path:
    """Make the small model and codec, once; the codec's codebooks are drawn from the demo's own recordings."""
    if not (directory / "codec" / "config.json").is_file():
        speech = [read_audio(AudioRef(path), 24_000) for path in sorted(voices.rglob("*.flac"))[::3]]
        tiny.make_model(directory / "model", hidden_size=96, codebook_size=258, output_scale=10.0)
        tiny.make_codec(directory / "codec", speech, codebook_size=256)
    return directory


def chatml_row(voices: Path, speaker: str, reference: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """One row in the original pipeline's ChatML."""

    def audio(clip: dict[str, Any]) -> dict[str, Any]:
        return {"type": "audio", "audio_url": str((voices / clip["audio"]).resolve())}

    def text(value: str) -> dict[str, str]:
        return {"type": "text", "text": value}

    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {
                "role": "user",
                "content": [text(reference["text"]), audio(reference), text(INSTRUCTION + target["text"])],
            },
            {"role": "assistant", "content": [text(target["text"]), audio(target)]},
        ],
        "speaker": speaker,
        "misc": {"language": target["language"]},
    }


def demo_config(model: Path, manifest: Path, directory: Path) -> RunConfig:
    """The demo's recipe."""
    return build_config(
        {
            "family": "higgs_audio_v2",
            "output_dir": directory / "run",
            "model": {"path": str(model / "model"), "codec_path": str(model / "codec")},
            "data": {"train": manifest, "cache_dir": directory / "cache"},
            "lora": {"rank": 32, "alpha": 64, "dropout": 0.0, "targets": "all"},
            "train": {
                "max_steps": 240,
                "batch_size": len(SPEAKERS) * CLIPS_PER_SPEAKER,
                "learning_rate": 4e-3,
                "warmup_steps": 20,
            },
            "checkpoint": {"every_steps": 80, "keep_last": 2},
            "tracking": {"log_every_steps": 20},
        },
        "demo",
    )


def check(outcome: Outcome, config: RunConfig, directory: Path) -> list[tuple[str, str]]:
    """Compare trained, reloaded and merged model, speak a trained sentence, and return the table's rows.

    Raises:
        SpeechtuneError: something does not hold.
    """
    adapter = config.output_dir / "lora_adapters"
    trained, _ = outcome.job.family.probe(outcome.job.model.eval())
    family, reloaded = load_model(config, adapter)
    reload_difference = float((family.probe(reloaded)[0] - trained).abs().max())
    output = directory / "run" / "merged"
    verified = verify_adapter(adapter, config.model.path)
    if not verified.valid:
        raise TrainingError(f"{adapter}: " + "; ".join(f"{c.name}: {c.detail}" for c in verified.checks))
    report = merge(config, adapter, output)
    plain = HiggsAudioV2ForConditionalGeneration.from_pretrained(output, use_text_head=True).eval()
    merged_difference = float((family.probe(plain)[0] - trained).abs().max())
    if reload_difference > 1e-5 or merged_difference > 1e-3:
        raise TrainingError(f"reloaded differs by {reload_difference:.1e}, merged by {merged_difference:.1e}")
    spoken, wanted_rows, right = speak(outcome, config, output)
    wav = directory / "run" / "speech.wav"
    write_output(spoken, wav)
    first, last = outcome.result.first_losses, outcome.result.state.losses
    proof = outcome.proof
    files = sorted(path for path in config.output_dir.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    return [
        ("trainable parameters", f"{proof.trainable_parameters:,}"),
        ("loss, first -> last", "; ".join(f"{head} {first[head]:.3f} -> {last[head]:.3f}" for head in first)),
        ("lora_B moved", f"{proof.lora_b_moved} of {proof.lora_b_total}"),
        ("base unchanged, bit for bit", "yes" if proof.base_unchanged else "NO"),
        ("trained = reloaded (greatest logit difference)", f"{reload_difference:.1e}"),
        ("trained = merged (greatest logit difference)", f"{merged_difference:.1e}"),
        ("the adapter moves the base's logits by", f"{report.adapter_effect:.3g}"),
        ("rows wanted / generated", f"{wanted_rows} / {spoken.num_tokens} ({right:.1%} of codes right)"),
        ("files written", f"{len(files)} ({size / 1e6:.1f} MB) in {config.output_dir}"),
        ("adapter", f"{adapter}, {len(verified.checks)} checks passed"),
        ("speech", f"{wav} ({spoken.audio.duration_seconds if spoken.audio else 0:.2f} s)"),
    ]


def speak(outcome: Outcome, config: RunConfig, merged: Path) -> tuple[Output, int, float]:
    """Let the merged model say a training sentence; return the output, the rows wanted and the share of right codes."""
    sample = outcome.job.train_set.samples[SPOKEN]
    *_, target = outcome.job.train_set.features(SPOKEN)
    merged_base = config.model.model_copy(update={"path": str(merged)})
    family, model = load_model(config.model_copy(update={"model": merged_base}), None)
    prompt = encode_samples(family, [replace(sample, audio=None)], config.cache_dir, quiet=True)
    options = GenerationOptions(temperature=0, max_new_tokens=4 * len(target))
    (output,) = family.generate(model, [(prompt.samples[0], prompt.features(0))], options)
    codes = output.arrays["codes"]
    shared = min(len(codes), len(target))
    return output, len(target) + target.shape[1] + 1, float((codes[:shared] == target[:shared]).mean())

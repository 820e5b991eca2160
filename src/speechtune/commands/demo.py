"""The embedded demo: every step of the pipeline on a small model and real speech, ending in a table measured here."""

from __future__ import annotations

import importlib.util
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from speechtune.cache.encode import encode_samples
from speechtune.commands.validate import print_report, validate
from speechtune.config import DataConfig, RunConfig
from speechtune.errors import TrainingError
from speechtune.export.merge import merge
from speechtune.export.verify import verify_adapter
from speechtune.families import build_config, family_part
from speechtune.inference.generate import write_output
from speechtune.inference.load import load_model, open_adapter
from speechtune.lora.files import FOLDER_NAME
from speechtune.report.write import write_report
from speechtune.training.run import Outcome, run_training
from speechtune.types import AudioRef, GenerationOptions, Output

DEFAULTS = {"voice": "higgs_audio_v2", "pronunciation": "phi4_multimodal"}
"""Demonstration -> the family it shows; a family's name shows that one."""
SPEAKERS = ("allison", "june", "carlo", "ivrvoice-ru")
CLIPS_PER_SPEAKER = 2
LONGEST_SECONDS = 3.2
SYSTEM = "Generate audio following instruction."
INSTRUCTION = "Please generate speech for given text in reference audio's voice: "
SPOKEN = 0  # index of the training sample that is spoken at the end


def run_demo(what: str, directory: Path) -> int:
    """Run one of the demonstrations in `directory`; return the exit code."""
    family = DEFAULTS.get(what, what)
    if "speak" in family_part(family, "family").FAMILY.abilities:
        return run_demo_voice(directory if what in DEFAULTS else directory / family, family)
    other = import_module("speechtune.commands.demo_pronunciation")  # it uses helpers of this module
    return other.run_demo_pronunciation(directory / what, family)


def run_demo_voice(directory: Path, family: str) -> int:
    """Validate, encode, train, verify, merge and generate under `directory`; print the table; return the exit code."""
    started = time.monotonic()
    console = Console()
    with resources.as_file(resources.files("speechtune") / "assets") as assets:
        manifest = write_manifest(assets / "demo-voices", directory / "train.json")
        console.rule("1. validate")
        report = validate(manifest, DataConfig(), deep=True)
        print_report(report, console)
        if report.issues:
            return 2
        console.rule("2. encode and train")
        config = demo_config(family, assets / "demo-voices", manifest, directory)
        if (config.output_dir / "config.yaml").exists():
            shutil.rmtree(config.output_dir)
        outcome = run_training(config)
        if outcome.result.signal is not None:
            return 128 + outcome.result.signal
        console.rule("3. verify, merge, generate")
        rows = check(outcome, config, directory)
    print_table("speechtune demo", rows, started, console)
    return 0


def print_table(title: str, rows: Sequence[tuple[str, str]], started: float, console: Console) -> None:
    """What was measured, and the time since `started`."""
    table = Table("measured in this run", "value", title=title)
    for name, value in rows:
        table.add_row(name, value)
    table.add_row("time", f"{time.monotonic() - started:.0f} s on {torch.get_num_threads()} threads")
    console.print(table)


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


def demo_config(family: str, voices: Path, manifest: Path, directory: Path) -> RunConfig:
    """The demo's recipe, on the family's embedded base."""
    speech = [AudioRef(str(path)) for path in sorted(voices.rglob("*.flac"))[::3]]
    return build_config(
        {
            "family": family,
            "output_dir": directory / "run",
            "model": family_part(family, "tiny").make_base(directory / "base", speech),
            "data": {"train": manifest, "cache_dir": directory / "cache"},
            "lora": {"rank": 32, "alpha": 64, "dropout": 0.0, "targets": "all"},
            "train": {
                "max_steps": 240,
                "batch_size": len(SPEAKERS) * CLIPS_PER_SPEAKER,
                "learning_rate": 4e-3,
                "warmup_steps": 20,
            },
            "evaluate": {"every_steps": 80, "prompts": 2, "temperature": 0, **installed_scorers()},
            "checkpoint": {"every_steps": 80, "keep_last": 2},
            "tracking": {"log_every_steps": 20},
        },
        "demo",
    )


def installed_scorers() -> dict[str, str]:
    """Scorers that carry their weights in their packages, as far as they are installed."""
    known = {"asr": "pocketsphinx", "speaker": "resemblyzer", "mos": "distillmos"}
    return {kind: name for kind, name in known.items() if importlib.util.find_spec(name) is not None}


def scores_of(outcome: Outcome) -> list[tuple[str, str]]:
    """The table's rows on the last evaluation, each beside the base's."""
    base = json.loads((outcome.job.config.output_dir / "samples" / "base_scores.json").read_text(encoding="utf-8"))
    found = outcome.result.scores
    names = [name for name in base if name in found and not name.startswith("codebook_accuracy")]
    codebooks = [name for name in base if name.startswith("codebook_accuracy")]
    rows = [(f"heard: {name}, base -> trained", f"{base[name]:.3g} -> {found[name]:.3g}") for name in names]
    if codebooks:
        first, last = (sum(values[name] for name in codebooks) / len(codebooks) for values in (base, found))
        rows.append(("heard: codebook accuracy, base -> trained", f"{first:.1%} -> {last:.1%}"))
    return rows


def report_row(config: RunConfig) -> tuple[str, str]:
    """Write the run's report; the table's row on it."""
    _, page = write_report([config.output_dir])
    return "report", f"{page} ({page.stat().st_size / 1e6:.1f} MB)"


def check(outcome: Outcome, config: RunConfig, directory: Path) -> list[tuple[str, str]]:
    """Prove the training, speak a trained sentence with the merged model, and return the table's rows.

    Raises:
        SpeechtuneError: something does not hold.
    """
    merged = directory / "run" / "merged"
    rows = prove_saved(outcome, merged)
    spoken, wanted_rows, right = speak(outcome, config, merged)
    wav = directory / "run" / "speech.wav"
    write_output(spoken, wav)
    return [
        *rows,
        ("rows wanted / generated", f"{wanted_rows} / {spoken.num_tokens} ({right:.1%} of codes right)"),
        *scores_of(outcome),
        files_written(config),
        report_row(config),
        ("speech", f"{wav} ({spoken.audio.duration_seconds if spoken.audio else 0:.2f} s)"),
    ]


def prove_saved(outcome: Outcome, merged: Path) -> list[tuple[str, str]]:
    """Verify the saved adapter, merge it into `merged`, and compare trained, reloaded and merged model.

    Args:
        outcome: the finished run.
        merged: folder to write the merged model to.

    Raises:
        SpeechtuneError: something does not hold.
    """
    config, family = outcome.job.config, outcome.job.family
    adapter = config.output_dir / FOLDER_NAME
    stored = open_adapter(adapter)
    trained, _ = family.probe(outcome.job.model.eval())
    _, reloaded = load_model(config, stored)
    reload_difference = float((family.probe(reloaded)[0] - trained).abs().max())
    verified = verify_adapter(adapter, config.model.path)
    if not verified.valid:
        raise TrainingError(f"{adapter}: " + "; ".join(verified.issues))
    report = merge(config, stored, merged)
    load_plain = family_part(config.family, "tiny").load_plain
    merged_difference = float((family.probe(load_plain(merged).eval())[0] - trained).abs().max())
    if reload_difference > 1e-5 or merged_difference > 1e-3:
        raise TrainingError(f"reloaded differs by {reload_difference:.1e}, merged by {merged_difference:.1e}")
    first, last = outcome.result.first_losses, outcome.result.state.losses
    proof = outcome.proof
    return [
        ("trainable parameters", f"{proof.trainable_parameters:,}"),
        ("loss, first -> last", "; ".join(f"{head} {first[head]:.3f} -> {last[head]:.3f}" for head in first)),
        ("lora_B moved", f"{proof.lora_b_moved} of {proof.lora_b_total}"),
        ("base unchanged, bit for bit", "yes" if proof.base_unchanged else "NO"),
        ("trained = reloaded (greatest logit difference)", f"{reload_difference:.1e}"),
        ("trained = merged (greatest logit difference)", f"{merged_difference:.1e}"),
        ("the adapter moves the base's logits by", f"{report.adapter_effect:.3g}"),
        ("adapter", f"{adapter}, {len(verified.checks)} checks passed"),
    ]


def files_written(config: RunConfig) -> tuple[str, str]:
    """The table's row on the run directory."""
    files = sorted(path for path in config.output_dir.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    return "files written", f"{len(files)} ({size / 1e6:.1f} MB) in {config.output_dir}"


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

"""`speechtune demo`: the complete pipeline on a small model, ending in a table whose every line was measured here."""

import shutil
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from speechtune.commands import demo_adaptation, demo_pronunciation, demo_voice, wide_console
from speechtune.commands.report import write_report
from speechtune.commands.validate import print_report, validate
from speechtune.config import DataConfig
from speechtune.errors import ConfigError, ManifestError, TrainingError
from speechtune.export.merge import merge
from speechtune.export.verify import verify_adapter
from speechtune.families import family_part
from speechtune.inference.load import load_model, open_adapter
from speechtune.lora.files import FOLDER_NAME
from speechtune.training.run import Outcome, run_training

DEFAULTS = {"voice": "higgs_audio_v2", "pronunciation": "phi4_multimodal"}
"""Demonstration -> the family it shows; a family's name shows that one, on a base of random weights."""


def run_demo(what: str, directory: Path, asr: str | None = None) -> int:
    """Validate, train, verify, merge and use a model under `directory`; print the table; return the exit code.

    `asr` is the recogniser of the voice's words.

    Raises ConfigError: a recogniser for a demonstration of something else.
    """
    started, console = time.monotonic(), Console()
    family = DEFAULTS.get(what, what)
    if asr and what != "voice":
        raise ConfigError(f"--asr {asr}: only the demonstration `voice` is measured by a recogniser")
    speaks = "speak" in family_part(family, "family").FAMILY.abilities
    demo = demo_adaptation if what == "voice" else demo_voice if speaks else demo_pronunciation
    directory = directory if what == "voice" else directory / what
    console.rule("1. validate")
    data = demo.write_data(directory)
    report = validate(data, DataConfig(), deep=True)
    print_report(report, console)
    if report.issues:
        return ManifestError.exit_code
    console.rule("2. train")
    config = demo.demo_config(family, data, directory)
    if asr:
        config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"asr": asr})})
    if (config.output_dir / "config.yaml").exists():
        shutil.rmtree(config.output_dir)  # of an earlier demonstration
    outcome = run_training(config)
    if outcome.result.signal is not None:
        return 128 + outcome.result.signal
    console.rule("3. verify and merge")
    merged = config.output_dir / "merged"
    rows = prove_saved(outcome, merged)
    console.rule("4. use")
    rows += demo.measure(outcome, data, merged, console)
    _, page = write_report([config.output_dir])
    files = [path for path in config.output_dir.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    rows += [
        ("files written", f"{len(files)} ({size / 1e6:.1f} MB) in {config.output_dir}"),
        ("report", f"{page} ({page.stat().st_size / 1e6:.1f} MB)"),
        ("time", f"{time.monotonic() - started:.0f} s on {torch.get_num_threads()} threads"),
    ]
    table = Table("measured in this run", "value", title=f"speechtune demo {what}")
    for row in rows:
        table.add_row(*row)
    wide_console().print(table)
    return 0


def prove_saved(outcome: Outcome, merged: Path) -> list[tuple[str, str]]:
    """Verify the saved adapter, merge it into the folder `merged`, and compare trained, reloaded and merged model."""
    config, family = outcome.job.config, outcome.job.family
    adapter = config.output_dir / FOLDER_NAME
    stored = open_adapter(adapter)
    trained, _ = family.probe(outcome.job.model.eval())
    _, reloaded = load_model(config, stored)
    reload_difference = float((family.probe(reloaded)[0] - trained).abs().max())
    verified = verify_adapter(adapter, config.model.path)
    if not verified.valid:
        raise TrainingError(f"{adapter}: " + "; ".join(verified.issues))
    report = merge(config, stored, merged, dtype="float32")  # in a base's float16 the weights would be rounded
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

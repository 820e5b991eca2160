"""The embedded demo of pronunciation assessment: the whole pipeline, measured on speakers the model never heard.

The recordings are synthetic voices with made errors and scores by a rule (see the README beside them), so the figures
tell whether the pipeline learns; of people they tell nothing.
"""

from __future__ import annotations

import shutil
import time
from importlib import resources
from pathlib import Path

from rich.console import Console

from speechtune.commands.demo import files_written, print_table, prove_saved, report_row
from speechtune.commands.score import print_score, read_requests
from speechtune.commands.validate import print_report, validate
from speechtune.config import DataConfig, RunConfig
from speechtune.errors import ConfigError
from speechtune.families import build_config, family_part
from speechtune.inference.evaluate_pronunciation import evaluate_pronunciation
from speechtune.inference.load import open_adapter
from speechtune.inference.score import assessor, score_samples
from speechtune.lora.files import FOLDER_NAME
from speechtune.tasks.pronunciation.evaluation import EvaluationReport, print_evaluation
from speechtune.training.run import run_training

STEPS = 240
ASSETS = "demo-pronunciation"


def run_demo_pronunciation(directory: Path, family: str) -> int:
    """Validate, train, verify, merge and evaluate under `directory`; print the tables; return the exit code."""
    started = time.monotonic()
    console = Console()
    with resources.as_file(resources.files("speechtune") / "assets" / ASSETS) as data:
        console.rule("1. validate")
        report = validate(data, DataConfig(), deep=True)
        print_report(report, console)
        if report.issues:
            return ConfigError.exit_code
        console.rule("2. train")
        config = demo_config(family, data, directory)
        if (config.output_dir / "config.yaml").exists():
            shutil.rmtree(config.output_dir)
        outcome = run_training(config)
        if outcome.result.signal is not None:
            return 128 + outcome.result.signal
        console.rule("3. verify, merge")
        merged = directory / "run" / "merged"
        rows = prove_saved(outcome, merged)
        console.rule("4. score one recording, and measure all those of the test speakers")
        found = measure(data, directory, config.output_dir / FOLDER_NAME, console)
    print_evaluation(found, console)
    console.print("(synthetic voices with scores by a rule: these figures tell of the pipeline, not of people)")
    print_table("speechtune demo pronunciation", [*rows, files_written(config), report_row(config)], started, console)
    return 0


def demo_config(family: str, data: Path, directory: Path) -> RunConfig:
    """The demo's recipe: a new adapter on language model and speech encoder of the embedded base, both tasks."""
    return build_config(
        {
            "family": family,
            "output_dir": directory / "run",
            "model": family_part(family, "tiny").make_base(directory / "base", ()),
            "data": {"train": data / "train", "cache_dir": directory / "cache"},
            "lora": {"rank": 32, "alpha": 64, "dropout": 0.05, "targets": "language+audio"},
            "train": {"max_steps": STEPS, "batch_size": 12, "learning_rate": 2e-3, "warmup_steps": 20},
            "evaluate": {"every_steps": 120, "prompts": 12},
            "checkpoint": {"every_steps": 120, "keep_last": 1},
            "tracking": {"log_every_steps": 20},
        },
        "demo",
    )


def measure(data: Path, directory: Path, adapter: Path, console: Console) -> EvaluationReport:
    """Score one recording for the eye, then evaluate the adapter on the test speakers."""
    cache = directory / "cache"
    _, family, model = assessor(None, open_adapter(adapter))
    sample, *_ = read_requests([], None, data / "test")
    (score,) = score_samples(family, model, [sample], cache, max_tokens=160)
    print_score(score, console)
    return evaluate_pronunciation(
        data / "test",
        train=data / "train",
        adapter=adapter,
        out=directory / "run" / "evaluation",
        cache_dir=cache,
        max_new_tokens=160,
    )

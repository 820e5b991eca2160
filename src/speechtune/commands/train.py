"""The verb `train`: train as a recipe says, or show what that would be."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from speechtune.commands import print_json, wide_console
from speechtune.config import RunConfig, is_first_rank
from speechtune.families import create_family, load_config
from speechtune.lora.apply import apply_lora, open_initial
from speechtune.training.prepare import show_counts
from speechtune.training.run import run_training


def run_train(recipe: Path, overrides: Sequence[str], *, dry_run: bool, as_json: bool) -> int:
    """Train as a recipe says, or with `dry_run` show what that would be; see `train` for the exit code."""
    config = load_config(recipe, overrides)
    return show_plan(config) if dry_run else train(config, as_json=as_json)


def train(config: RunConfig, *, as_json: bool = False, resume: str = "checkpoint.resume=auto") -> int:
    """Train and report; 128 + signal number when a signal ended the run, which `resume` continues where it is given."""
    outcome = run_training(config)
    result = outcome.result
    if as_json and is_first_rank():
        print_json({"state": asdict(result.state), "proof": asdict(outcome.proof), "signal": result.signal})
    if result.signal is not None:
        if is_first_rank():
            print(f"stopped at step {result.state.step}; go on with {resume}", file=sys.stderr)
        return 128 + result.signal
    return 0


def show_plan(config: RunConfig) -> int:
    """Resolve a recipe without weights or data: print it, then what its adapter would train on the real dimensions."""
    if not is_first_rank():
        return 0
    family = create_family(config)
    model = family.skeleton()
    initial = open_initial(family, config.lora)
    if config.lora.enabled:
        model = apply_lora(model, family, config.lora, config.train.seed, initial)
    family.add_to_base(model, initial.directory if initial else None, training=True)
    print(config.to_yaml())
    show_counts(model, family, wide_console())
    return 0

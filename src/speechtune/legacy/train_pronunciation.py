"""The pronunciation pipeline's training command line, mapped onto a recipe in one table.

Nothing here may import torch before the GPUs are chosen: CUDA reads CUDA_VISIBLE_DEVICES once.
"""

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from speechtune.commands.guarded import guarded, print_once
from speechtune.config import RunConfig, shipped_recipes
from speechtune.data.sources import as_paths
from speechtune.errors import ConfigError, ManifestError
from speechtune.families import load_config
from speechtune.legacy import Flag, Parser, flags_in_messages

log = logging.getLogger("speechtune")

CONFIGS = ("pretrained_r320", "paper_r64")
GPUS = "0"
VISIBLE = "CUDA_VISIBLE_DEVICES"

FLAGS = (
    Flag("--train-data", "data.train", "data/speechocean762/train", "Speechocean762 folder, parquet or JSONL"),
    Flag("--epochs", "train.epochs", 3.0, "passes over the data"),
    Flag("--batch-size", "train.batch_size", 8, "samples per GPU and micro-batch"),
    Flag("--gradient-accumulation", "train.accumulation", 8, "micro-batches per optimizer step"),
    Flag("--learning-rate", "train.learning_rate", 2e-5, "peak learning rate"),
    Flag("--seed", "train.seed", 42, "seed of everything random"),
    Flag("--eval-data", "data.eval", None, "evaluation data, in place of the speakers held out"),
    Flag("--output", "output_dir", None, "run directory (default: output/CONFIG)"),
    Flag("--model", "model.path", "microsoft/Phi-4-multimodal-instruct", "base model: hub id or folder"),
    Flag("--speech-lora-path", "model.speech_lora_path", None, "the base's speech LoRA (default: from the base)"),
)
RESUME = Flag("--resume", "checkpoint.resume", None, "go on from the newest checkpoint, or this one")
UNSUPPORTED = {
    "--deepspeed": "DeepSpeed is not used here: a LoRA run has optimizer state for the adapter alone, so there is "
    "nothing worth spreading",
    "--fsdp": "the base in half precision (9.5 GB) fits on one GPU; speechtune train has speed.parallel=fsdp",
}
INSTEAD = (
    "several GPUs train by DDP (--gpus 0,1 starts torchrun); memory is saved by gradient checkpointing, on in both "
    "recipes, and by a smaller --batch-size with more --gradient-accumulation"
)


def build_parser() -> argparse.ArgumentParser:
    """The original's flags, and those added here."""
    parser = Parser(
        description="Train Phi-4-multimodal to assess pronunciation, with the original pipeline's flags.",
        epilog="A flag replaces what the recipe CONFIG says; --set comes last.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, choices=CONFIGS, help="recipe to start from")
    for flag in FLAGS:
        kind = str if flag.default is None else type(flag.default)
        shown = flag.help if flag.default is None else f"{flag.help} (default: {flag.default})"
        parser.add_argument(flag.name, type=kind, help=shown)
    gpus = f"numbers for {VISIBLE}; several start torchrun, '' means the CPU (default: {GPUS}, or what it says already)"
    parser.add_argument("--gpus", type=_gpu_list, help=gpus)
    parser.add_argument("--fp16", action="store_true", help="float16 base for GPUs without bfloat16; adapters: float32")
    for name in UNSUPPORTED:
        parser.add_argument(name, nargs="?", const="", help="not supported; says what to use instead")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="CHECKPOINT", help=RESUME.help)
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and counts; load no weights")
    more = "any other option of a recipe; repeatable"
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help=more)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with the original's flags; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = build_parser().parse_args(given)
    except ConfigError as error:
        print_once(f"speechtune: ConfigError: {error}")
        return error.exit_code
    if options.gpus is not None:
        os.environ[VISIBLE] = options.gpus
    elif "RANK" not in os.environ:  # under torchrun the ranks share the GPUs that it was given
        os.environ.setdefault(VISIBLE, GPUS)
    return guarded(lambda: run(options, given))


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """Train as parsed `options` say; `given` are the same as text, for torchrun."""
    for name, reason in UNSUPPORTED.items():
        if getattr(options, name.removeprefix("--")) is not None:
            raise ConfigError(f"{name}: {reason}. Instead: {INSTEAD}")
    typed = [RESUME, *(flag for flag in FLAGS if getattr(options, flag.key) is not None)]
    with flags_in_messages(typed):
        config = configure(options)
        if options.dry_run:
            from speechtune.commands.train import show_plan

            return show_plan(config)
    require_data(config)
    processes = processes_to_start(options.gpus)
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        sys.stdout.flush()  # execv drops what is buffered
        # In place of this process, not below it: torchrun itself then gets a scheduler's signals.
        os.execv(sys.executable, [sys.executable, *launch, sys.argv[0], *given])
    from speechtune.commands.train import train

    with flags_in_messages(typed):
        return train(config, resume="--resume")


def configure(options: argparse.Namespace) -> RunConfig:
    """The recipe, with what was given on the command line in place of its values."""
    recipe = shipped_recipes()[options.config]
    given = {flag.option: getattr(options, flag.key) for flag in FLAGS}
    given["checkpoint.resume"] = options.resume
    overrides = [
        f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in given.items() if value is not None
    ]
    if options.fp16:
        overrides.append("train.precision=fp16")
    if options.eval_data is not None:
        overrides.append("data.validation_split=0")
    if options.model is not None and options.model != load_config(recipe).model.path:
        overrides.append("model.revision=null")  # the recipe's revision is one of its own base
    return load_config(recipe, [*overrides, *options.set])


def require_data(config: RunConfig) -> None:
    """Refuse data that is not there, before the model is loaded or processes are started."""
    given = (("--train-data", config.data.train), ("--eval-data", config.data.eval))
    for option, path in ((option, path) for option, paths in given for path in as_paths(paths)):
        is_split = path.name in ("train", "test") and path.parent.exists()  # it may be in files
        if not path.exists() and not is_split:
            raise ManifestError(
                f"{option} {path}: no such file or folder; expected is a Speechocean762 folder or its train or test, "
                "the hub copy's parquet files, or JSONL"
            )


def processes_to_start(gpus: str | None) -> int:
    """How many processes torchrun must start; 1 means that this one trains."""
    if not gpus:
        return 1
    wanted, usable = len(gpus.split(",")), usable_gpus()
    if usable == 0 and not has_nvidia_device():
        log.warning("--gpus %s: this machine has no GPU; training on the CPU", gpus)
        return 1
    if usable < wanted:
        raise ConfigError(
            f"--gpus {gpus}: {usable} of {wanted} can be used; is each number one that nvidia-smi lists, and torch a "
            "build with CUDA? --gpus '' trains on the CPU"
        )
    if "RANK" not in os.environ:
        return wanted
    if (started := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > wanted:
        raise ConfigError(f"--gpus {gpus}: torchrun started {started} processes for {wanted} GPU(s)")
    return 1


def usable_gpus() -> int:
    """How many of the GPUs in CUDA_VISIBLE_DEVICES torch can use."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def has_nvidia_device() -> bool:
    """Whether the machine shows an NVIDIA GPU, usable or not."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _gpu_list(text: str) -> str:
    numbers = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(re.fullmatch(r"[0-9]+", number) for number in numbers) or len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of different GPU numbers such as 0 or 0,1")
    return ",".join(numbers)

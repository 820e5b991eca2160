"""The original pipeline's training command lines, mapped onto `RunConfig` in one table."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from speechtune.config import RunConfig
from speechtune.families import build_config
from speechtune.legacy import Flag, Parser, flags_in_messages

log = logging.getLogger("speechtune")

REQUIRED = None
FLAGS = (
    Flag("--model_path", "model.path", REQUIRED, "base model: hub id or folder"),
    Flag("--audio_tokenizer_path", "model.codec_path", REQUIRED, "codec: hub id or folder"),
    Flag("--train_data_file", "data.train", REQUIRED, "ChatML JSON or JSONL"),
    Flag("--eval_data_file", "data.eval", "", "evaluation data; not together with --validation_split"),
    Flag("--validation_split", "data.validation_split", 0.0, "share of the training samples held out"),
    Flag("--output_dir", "output_dir", "./output", "run directory"),
    Flag("--num_train_epochs", "train.epochs", 3.0, "passes over the data"),
    Flag("--per_device_train_batch_size", "train.batch_size", 4, "samples per device and micro-batch"),
    Flag("--per_device_eval_batch_size", "evaluate.batch_size", 1, "samples per device in evaluation"),
    Flag("--gradient_accumulation_steps", "train.accumulation", 1, "micro-batches per optimizer step"),
    Flag("--learning_rate", "train.learning_rate", 5e-5, "peak learning rate"),
    Flag("--warmup_steps", "train.warmup_steps", 100, "steps of linear warm-up"),
    Flag("--logging_steps", "tracking.log_every_steps", 10, "steps between console lines"),
    Flag("--save_steps", "checkpoint.every_steps", 500, "steps between checkpoints"),
    Flag("--eval_steps", "evaluate.every_steps", 500, "steps between evaluations"),
    Flag("--use_lora", "lora.enabled", False, "train a LoRA adapter instead of all weights"),
    Flag("--lora_rank", "lora.rank", 16, "r of LoRA"),
    Flag("--lora_alpha", "lora.alpha", 32.0, "scaling numerator of LoRA"),
    Flag("--lora_dropout", "lora.dropout", 0.1, "dropout before lora_A"),
    Flag("--seed", "train.seed", 42, "seed of everything random"),
    Flag("--bf16", "train.precision", False, "insist on bfloat16 (default: decided by the device)"),
    Flag("--report_to", "tracking.trackers", "tensorboard", "tensorboard, wandb or none"),
    Flag("--logging_dir", "tracking.logging_dir", "./logs", "folder of the tracker"),
    Flag("--disable_eval", "evaluate.enabled", False, "no evaluation during training"),
    Flag("--freeze_llm", "train.freeze", False, "full fine-tuning: train audio embeddings and heads only"),
    Flag("--strategic_logging_steps", "tracking.detail_every_steps", 100, "steps between lines about the samples"),
    Flag("--enable_strategic_logging", "tracking.detail_every_steps", False, "log the samples of a step at times"),
    Flag("--whisper_path", "model.whisper_path", "", "condition references by this Whisper: hub id or folder"),
    Flag(
        "--freeze_audio_encoder_proj",
        "model.freeze_reference_projector",
        False,
        "with --whisper_path: leave the projector behind Whisper as the base has it",
    ),
    Flag("--resume", "checkpoint.resume", "", "auto, or a checkpoint to go on from (not in the original)"),
    Flag(
        "--force_resume",
        "checkpoint.force",
        False,
        "resume with other data, base or seed, too (not in the original)",
    ),
    Flag("--on_error", "data.on_error", "fail", "fail, or quarantine invalid rows (not in the original)"),
)
FROZEN_TOWER = "--freeze_audio_tower"
FIXED = {  # what the original left to its trainer's defaults
    "lora.targets": "attention",
    "checkpoint.keep_last": 3,
    "train.schedule": "linear",
    "train.betas": (0.9, 0.999),
}
LLM_PARAMETERS = r"model\.(embed_tokens|layers|norm)\..*"


def parse(arguments: Sequence[str] | None = None) -> tuple[RunConfig, bool]:
    """Turn an original command line into a configuration, and whether it is only to be shown."""
    parser = Parser(description="Higgs Audio v2 training with the original pipeline's flags.")
    for flag in FLAGS:
        if flag.default is REQUIRED:
            parser.add_argument(flag.name, required=True, help=flag.help)
        elif isinstance(flag.default, bool):
            parser.add_argument(flag.name, action="store_true", help=flag.help)
        else:
            shown = f"{flag.help} (default: %(default)s)" if flag.default != "" else flag.help
            parser.add_argument(flag.name, type=type(flag.default), default=flag.default, help=shown)
    frozen = "the encoder of --whisper_path is always frozen, with this flag and without"
    parser.add_argument(FROZEN_TOWER, action="store_true", help=frozen)
    parser.add_argument("--dry_run", action="store_true", help="print the resolved recipe and counts; load no weights")
    more = "any other option of a recipe, after all flags; repeatable"
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help=more)
    given = vars(parser.parse_args(arguments))
    flags = (FROZEN_TOWER, "--freeze_audio_encoder_proj")
    ignored = [name for name in flags if given[name.removeprefix("--")] and not given["whisper_path"]]
    if ignored:
        log.warning(
            "%s: the Higgs Audio v2 base has no Whisper encoder and no projector; nothing to freeze without "
            "--whisper_path, which adds them",
            ignored,
        )
    sections: dict[str, dict[str, Any]] = defaultdict(dict)
    for option, value in options_of(given).items():
        section, _, key = option.rpartition(".")
        sections[section][key] = value
    values = {"family": "higgs_audio_v2", **sections.pop(""), **sections}
    with flags_in_messages(FLAGS):
        return build_config(values, "command line", given["set"]), given["dry_run"]


def options_of(given: dict[str, Any]) -> dict[str, Any]:
    """Dotted options from parsed flags."""
    values = {flag.option: given[flag.key] for flag in FLAGS}
    values["train.precision"] = "bf16" if given["bf16"] else "auto"
    values["evaluate.enabled"] = not given["disable_eval"]
    values["tracking.trackers"] = [] if given["report_to"] == "none" else [given["report_to"]]
    detailed = given["enable_strategic_logging"]
    values["tracking.detail_every_steps"] = given["strategic_logging_steps"] if detailed else None
    values["train.freeze"] = LLM_PARAMETERS if given["freeze_llm"] and not given["use_lora"] else None
    if given["freeze_llm"] and given["use_lora"]:
        log.warning("--freeze_llm: LoRA freezes all of the base anyway; the flag changes nothing beside --use_lora")
    for option in ("data.eval", "checkpoint.resume", "model.whisper_path"):
        values[option] = values[option] or None
    values["model.reference_conditioning"] = "whisper" if given["whisper_path"] else None
    values["model.freeze_reference_projector"] &= bool(given["whisper_path"])
    return values | FIXED


def main(arguments: Sequence[str] | None = None) -> int:
    """Train with the original's flags; returns the exit code."""
    from speechtune.commands.guarded import guarded
    from speechtune.commands.train import show_plan, train

    def run() -> int:
        config, dry_run = parse(arguments)
        with flags_in_messages(FLAGS):
            return show_plan(config) if dry_run else train(config, resume="--resume auto")

    return guarded(run)

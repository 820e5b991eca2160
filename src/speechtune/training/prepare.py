"""Preparation of a run: options checked, data read and encoded, the model loaded, the adapter attached."""

import json
import logging

from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch import nn

from speechtune.cache.encode import encode_samples
from speechtune.cache.encoded_set import EncodedSet
from speechtune.config import RunConfig
from speechtune.data.sources import load_samples
from speechtune.data.splits import split_validation
from speechtune.errors import ConfigError
from speechtune.families import create_family
from speechtune.families.layers.kernels import choose_kernels
from speechtune.family import Family
from speechtune.lora.apply import (
    apply_lora,
    count_by_component,
    freeze,
    interchangeable,
    matching_modules,
    target_pattern,
    trainable,
)
from speechtune.lora.base_identity import RECIPE_NAME, describe_base
from speechtune.lora.files import CARD_NAME
from speechtune.precision import PrecisionPlan, plan_precision
from speechtune.storage.verified_folder import check_writable, clear_leftovers, find_checkpoints
from speechtune.tensors import tensors_fingerprint
from speechtune.training.checkpoint import ADAM_MOMENTS, bytes_of
from speechtune.training.generated_samples import make_sample_generator, prepare_scorers
from speechtune.training.job import Job, checkpoint_activations
from speechtune.training.run_info import INFO_NAME, model_card, run_info
from speechtune.training.tracking import WARNINGS_NAME, flatten
from speechtune.types import Sample

log = logging.getLogger("speechtune")


def prepare(config: RunConfig, accelerator: Accelerator, family: Family | None = None) -> Job:
    """Load data, base and adapter, and show what will be trained; `family` None takes the recipe's own.

    Raises SpeechtuneError: anything that would make the run fail or unreal later.
    """
    if accelerator.is_main_process:
        _open_output(config)
    accelerator.wait_for_everyone()
    family = family or create_family(config)
    lora = config.lora
    plan = plan_precision(config.train.precision, full_finetune=not lora.enabled, device=accelerator.device)
    _check_before_encoding(config, family, plan)
    scorers = prepare_scorers(config, family)
    train_set, eval_set = encode_sets(config, family, accelerator)
    model = family.load(plan)
    identity = {
        "family": config.family,
        "dataset": train_set.fingerprint,
        "base": tensors_fingerprint(model.named_parameters()),
        "lora": interchangeable(family, lora) if lora.enabled else None,
        "seed": config.train.seed,
    }
    notes = {CARD_NAME: model_card(config, family, train_set)}
    if lora.enabled:
        notes[RECIPE_NAME] = describe_base(config, family, model, plan).to_json()
        model = apply_lora(model, family, lora, config.train.seed)
    elif config.train.freeze:
        freeze(model, config.train.freeze)
    if config.train.gradient_checkpointing is True:
        checkpoint_activations(model)
    if accelerator.is_main_process:
        log.info("precision: %s", plan.describe())
        show_counts(model, family)
        check_writable(config.output_dir, bytes_of(trainable(model).values()) * (1 + ADAM_MOMENTS))
        info = run_info(config, plan, identity["base"], count_by_component(model, family), train_set, eval_set)
        (config.output_dir / INFO_NAME).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
        accelerator.init_trackers("speechtune", {k: str(v) for k, v in flatten(config.model_dump()).items()})
    generator = None if scorers is None else make_sample_generator(config, family, train_set, eval_set, scorers)
    return Job(config, family, model, plan, train_set, eval_set, identity, notes, generator)


def _open_output(config: RunConfig) -> None:
    """Make the run directory ready, unless another run's checkpoints lie in it."""
    check_writable(config.output_dir, 0)
    if config.checkpoint.resume is None and find_checkpoints(config.output_dir):
        raise ConfigError(
            f"output_dir={config.output_dir} holds the checkpoints of an earlier run: go on with "
            "checkpoint.resume=auto (--resume auto with the original's flags), or choose another folder"
        )
    clear_leftovers(config.output_dir)
    (config.output_dir / WARNINGS_NAME).touch()
    (config.output_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")


def _check_before_encoding(config: RunConfig, family: Family, plan: PrecisionPlan) -> None:
    """Refuse what would stop the run after hours of encoding."""
    unknown = sorted(set(config.train.head_weights) - set(family.heads))
    if unknown:
        raise ConfigError(f"train.head_weights: no head {unknown[0]!r}; {family.name} has: {', '.join(family.heads)}")
    if config.lora.enabled:
        matching_modules(family.skeleton(), target_pattern(family, config.lora))
    if plan.scaler and config.speed.parallel == "fsdp":
        raise ConfigError(
            "speed.parallel=fsdp: the gradient scaler of float16 looks for infinities rank by rank: set "
            "train.precision=bf16 or fp32, or speed.parallel=ddp"
        )
    choose_kernels(config.speed, plan.device)


def load_sets(config: RunConfig, family: Family) -> tuple[list[Sample], list[Sample]]:
    """Read, check and split the data of a run into what the family makes training and evaluation samples of.

    Raises ConfigError: no training data named; ManifestError: issues in the data.
    """
    data = config.data
    if data.train is None:
        raise ConfigError("data.train: required for this, but not given")
    training, evaluation = load_samples(data.train, data, config.output_dir), list[Sample]()
    if not config.evaluate.enabled:
        if data.validation_split or data.eval:
            log.info("evaluation is off: all %d samples are trained on, data.eval is not read", len(training))
    elif data.validation_split > 0:
        share, total = data.validation_split, len(training)
        training, evaluation = split_validation(training, share, config.train.seed)
        log.info("validation_split %g holds out %d of %d samples", share, len(evaluation), total)
    elif data.eval:
        evaluation = load_samples(data.eval, data, config.output_dir, "test")
    return family.expand(training), family.expand(evaluation)


def encode_sets(config: RunConfig, family: Family, accelerator: Accelerator) -> tuple[EncodedSet, EncodedSet | None]:
    """Load and encode training and evaluation data; each rank encodes a share, and waits for the others."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    training, evaluation = load_sets(config, family)
    encoded = [
        encode_samples(
            family,
            samples,
            config.cache_dir,
            allow_urls=config.data.allow_urls,
            shard=(rank, ranks) if ranks > 1 else None,
            quiet=rank > 0,
        )
        for samples in ([training, evaluation] if evaluation else [training])
    ]
    accelerator.wait_for_everyone()
    reports = [one.report for one in encoded]
    log.info("%d clips encoded, %d reused", sum(r.num_encoded for r in reports), sum(r.num_reused for r in reports))
    return encoded[0], encoded[1] if len(encoded) > 1 else None


def show_counts(model: nn.Module, family: Family, console: Console | None = None) -> None:
    """Print what is trainable, by component of the model."""
    table = Table("part", "base parameters", "trainable")
    rows = count_by_component(model, family)
    for row in rows:
        table.add_row(row.component, f"{row.total:,}", f"{row.trainable:,}")
    total, trained = sum(row.total for row in rows), sum(row.trainable for row in rows)
    table.add_section()
    table.add_row("all", f"{total:,}", f"{trained:,} ({trained / total:.2%})")
    (console or Console(stderr=True)).print(table)

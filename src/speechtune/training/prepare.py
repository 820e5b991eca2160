"""What a run needs before its first step: data read and encoded, the model loaded, the adapter attached."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

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
from speechtune.precision import plan_precision
from speechtune.storage.verified_folder import check_writable, clear_leftovers, find_checkpoints
from speechtune.tensors import tensors_fingerprint
from speechtune.training.checkpoint import ADAM_MOMENTS
from speechtune.training.generated_samples import make_sample_generator, prepare_scorers
from speechtune.training.job import Job, checkpoint_activations
from speechtune.training.run_info import INFO_NAME, model_card, run_info
from speechtune.training.tracking import WARNINGS_NAME, flatten
from speechtune.types import Sample

log = logging.getLogger("speechtune")


def load_sets(config: RunConfig, family: Family) -> tuple[list[Sample], list[Sample]]:
    """Read, check and split the data of a run into what the family makes training and evaluation samples of.

    Raises:
        ConfigError: no training data named.
        ManifestError: issues in the data.
    """
    data = config.data
    if data.train is None:
        raise ConfigError("data.train: required for this, but not given")
    training, evaluation = _split(config, load_samples(data.train, data, config.output_dir))
    return family.expand(training), family.expand(evaluation)


def _split(config: RunConfig, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    data = config.data
    if not config.evaluate.enabled:
        if data.validation_split or data.eval:
            log.info("evaluation is off: all %d samples are trained on, data.eval is not read", len(samples))
        return samples, []
    if data.validation_split > 0:
        training, held_out = split_validation(samples, data.validation_split, config.train.seed)
        log.info("validation_split %g holds out %d of %d samples", data.validation_split, len(held_out), len(samples))
        return training, held_out
    return samples, load_samples(data.eval, data, config.output_dir, "test") if data.eval else []


def encode_sets(
    config: RunConfig, family: Family, sets: Sequence[Sequence[Sample]], shard: tuple[int, int] | None = None
) -> list[EncodedSet]:
    """Encode every set through the run's cache."""
    urls, quiet = config.data.allow_urls, shard is not None and shard[0] > 0
    encoded = [
        encode_samples(family, samples, config.cache_dir, allow_urls=urls, shard=shard, quiet=quiet) for samples in sets
    ]
    clips = sum(one.report.num_encoded for one in encoded)
    log.info("%d clips encoded, %d reused", clips, sum(one.report.num_reused for one in encoded))
    return encoded


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


def prepare(config: RunConfig, accelerator: Accelerator, family: Family | None = None) -> Job:
    """Load data, base and adapter, and show what will be trained.

    Raises:
        SpeechtuneError: anything that would make the run fail or unreal later.
    """
    if accelerator.is_main_process:
        _open_output(config)
    accelerator.wait_for_everyone()
    family = family or create_family(config)
    unknown = sorted(set(config.train.head_weights) - set(family.heads))
    if unknown:
        raise ConfigError(f"train.head_weights: no head {unknown[0]!r}; {family.name} has: {', '.join(family.heads)}")
    lora = config.lora
    if lora.enabled:  # before hours of encoding: the base is there, and the targets match
        matching_modules(family.skeleton(), target_pattern(family, lora))
    scorers = prepare_scorers(config, family)
    plan = plan_precision(config.train.precision, full_finetune=not lora.enabled, device=accelerator.device)
    if plan.scaler and config.speed.parallel == "fsdp":
        raise ConfigError(
            "speed.parallel=fsdp: the gradient scaler of float16 looks for infinities rank by rank: set "
            "train.precision=bf16 or fp32, or speed.parallel=ddp"
        )
    choose_kernels(config.speed, accelerator.device)  # refused here rather than after hours of encoding
    training, evaluation = load_sets(config, family)
    ranks = accelerator.num_processes
    shard = (accelerator.process_index, ranks) if ranks > 1 else None
    train_set, *eval_sets = encode_sets(config, family, [training, evaluation] if evaluation else [training], shard)
    eval_set = eval_sets[0] if eval_sets else None
    accelerator.wait_for_everyone()
    model = family.load(plan)
    base_fingerprint = tensors_fingerprint(model.named_parameters())
    notes = {CARD_NAME: model_card(config, family, train_set)}
    if lora.enabled:
        notes[RECIPE_NAME] = describe_base(config, family, model, plan).to_json()
        model = apply_lora(model, family, lora, config.train.seed)
    elif config.train.freeze:
        freeze(model, config.train.freeze)
    if config.train.gradient_checkpointing is True:
        checkpoint_activations(model)
    identity = {
        "family": config.family,
        "dataset": train_set.fingerprint,
        "base": base_fingerprint,
        "lora": interchangeable(family, lora) if lora.enabled else None,
        "seed": config.train.seed,
    }
    if accelerator.is_main_process:
        log.info("precision: %s", plan.describe())
        show_counts(model, family)
        trained = sum(p.numel() * p.element_size() for p in trainable(model).values())
        check_writable(config.output_dir, trained * (1 + ADAM_MOMENTS))
        info = run_info(config, plan, identity, count_by_component(model, family), train_set, eval_set)
        (config.output_dir / INFO_NAME).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
        accelerator.init_trackers("speechtune", {k: str(v) for k, v in flatten(config.model_dump()).items()})
    generator = None if scorers is None else make_sample_generator(config, family, train_set, eval_set, scorers)
    return Job(config, family, model, plan, train_set, eval_set, identity, notes, generator)


def show_counts(model: nn.Module, family: Family, console: Console | None = None) -> None:
    """Print what is trainable, by part of the model."""
    table = Table("part", "base parameters", "trainable")
    rows = count_by_component(model, family)
    for row in rows:
        table.add_row(row.component, f"{row.total:,}", f"{row.trainable:,}")
    total, trained = sum(row.total for row in rows), sum(row.trainable for row in rows)
    table.add_section()
    table.add_row("all", f"{total:,}", f"{trained:,} ({trained / total:.2%})")
    (console or Console(stderr=True)).print(table)

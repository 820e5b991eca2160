"""Preparation of a run: options checked, data encoded, the model loaded, the adapter attached, and all written down."""

import importlib.metadata
import json
import logging
import os
import platform
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from huggingface_hub import EvalResult, ModelCardData
from rich.console import Console
from rich.table import Table
from torch import nn

from speechtune import __version__
from speechtune.cache.encode import encode_samples
from speechtune.cache.encoded_set import EncodedSet
from speechtune.config import RunConfig, world_size
from speechtune.data.manifest import borrow_references
from speechtune.data.sources import as_paths, load_all
from speechtune.data.splits import split_validation
from speechtune.errors import ConfigError
from speechtune.families import create_family
from speechtune.families.layers.kernels import choose_kernels
from speechtune.family import Family
from speechtune.lora.additions import additions
from speechtune.lora.apply import (
    apply_lora,
    count_by_component,
    freeze,
    interchangeable,
    load_base,
    lora_b,
    matching_modules,
    open_initial,
    target_pattern,
    trainable,
)
from speechtune.lora.base_identity import RECIPE_NAME, describe_base
from speechtune.lora.files import CARD_NAME, StoredAdapter, in_checkpoint
from speechtune.lora.prompts import PROMPTS_NAME, describe_prompts
from speechtune.precision import PrecisionPlan, plan_precision
from speechtune.storage.verified_folder import check_writable, clear_leftovers, find_checkpoints, read_state, saves
from speechtune.tensors import tensors_fingerprint
from speechtune.training.checkpoint import ADAM_MOMENTS, choose_checkpoint
from speechtune.training.distributed import check_same_checkpoint, on_first_rank
from speechtune.training.generated_samples import make_sample_generator, prepare_scorers
from speechtune.training.job import Job, checkpoint_activations
from speechtune.training.loop import warmup_steps
from speechtune.training.set_checks import check_sets
from speechtune.training.tracking import WARNINGS_NAME, add_warnings, flatten
from speechtune.types import Sample

log = logging.getLogger("speechtune")

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "soundfile", "soxr")
INFO_NAME = "run_info.json"
CONFIG_NAME = "config.yaml"


def prepare(config: RunConfig, accelerator: Accelerator, family: Family | None = None) -> Job:
    """Load data, base and adapter, and show what will be trained; `family` None takes the recipe's own.

    Raises SpeechtuneError: anything that would make the run fail or unreal later.
    """
    on_first_rank(lambda: _open_output(config))
    family = family or create_family(config)
    lora = config.lora
    plan = plan_precision(config.train.precision, full_finetune=not lora.enabled, device=accelerator.device)
    checkpoint = choose_checkpoint(config.output_dir, config.checkpoint.resume)
    check_same_checkpoint(accelerator, checkpoint)
    initial = None if checkpoint else open_initial(family, lora)
    _check_before_encoding(config, family, plan, initial)
    scorers = prepare_scorers(config, family)
    train_set, eval_set = encode_sets(config, family, accelerator)
    warnings = check_sets(train_set, eval_set, family.max_positions)
    for message in warnings:
        log.warning("%s", message)
    if accelerator.is_main_process and not checkpoint:
        add_warnings(config.output_dir, 0, "data", warnings)
    model = load_base(family, plan, initial)
    identity = {
        "family": config.family,
        "dataset": train_set.fingerprint,
        "base": tensors_fingerprint(model.named_parameters()),
        "lora": interchangeable(family, lora) if lora.enabled else None,
        "seed": config.train.seed,
    }
    notes = {}
    if "speak" in family.abilities:
        notes[PROMPTS_NAME] = describe_prompts(train_set.samples)
    if lora.enabled:
        notes[RECIPE_NAME] = describe_base(config, family, model, plan).to_json()
        model = apply_lora(model, family, lora, config.train.seed, initial)
    elif config.train.freeze:
        freeze(model, config.train.freeze)
    family.add_to_base(model, checkpoint or (initial.directory if initial else None), training=True)
    if additions(model):
        identity["additions"] = family.recipe()
    origin = _origin(config, checkpoint, initial, model)
    notes[CARD_NAME] = model_card(config, family, train_set, origin)
    if config.train.gradient_checkpointing is True:
        checkpoint_activations(model)
    generator = None if scorers is None else make_sample_generator(config, family, train_set, eval_set, scorers)
    job = Job(config, family, model, plan, train_set, eval_set, identity, notes, generator, checkpoint, origin)
    if accelerator.is_main_process:
        log.info("precision: %s", plan.describe())
        show_counts(model, family)
        check_writable(config.output_dir, sum(p.nbytes for p in trainable(model).values()) * (1 + ADAM_MOMENTS))
    return job


def record_start(job: Job, accelerator: Accelerator, total_steps: int) -> None:
    """Write down what is about to be trained, on the main process, and start the trackers."""
    if not accelerator.is_main_process:
        return
    config, directory = job.config, job.config.output_dir
    _write_config(config)
    warmup = warmup_steps(total_steps, config.train)
    if warmup < config.train.warmup_steps:
        message = "train.warmup_steps=%d: shortened to %d, a tenth of the run's %d steps"
        log.warning(message, config.train.warmup_steps, warmup, total_steps)
    info = {**run_info(job), "total_steps": total_steps, "warmup_steps": warmup}
    (directory / INFO_NAME).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
    # Steps that a run took before it was killed, and takes again, would stand in TensorBoard's curves twice.
    first = read_state(job.checkpoint)["step"] + 1 if job.checkpoint else 0
    options = {name: str(value) for name, value in flatten(config.model_dump()).items()}
    accelerator.init_trackers("speechtune", options, {"tensorboard": {"purge_step": first}})


def _open_output(config: RunConfig) -> None:
    """Make the run directory ready, unless another run's checkpoints lie in it."""
    saves.setLevel(logging.NOTSET if config.tracking.log_saves else logging.WARNING)
    check_writable(config.output_dir, 0)
    if config.tracking.trackers and config.tracking.logging_dir:
        check_writable(config.tracking.logging_dir, 0)
    resume = config.checkpoint.resume
    if resume not in (None, "auto") and not in_checkpoint(Path(resume)).is_dir():
        raise ConfigError(f"checkpoint.resume={resume}: no such folder; name a checkpoint-N folder, or auto")
    if config.checkpoint.resume is None and find_checkpoints(config.output_dir):
        raise ConfigError(
            f"output_dir={config.output_dir} holds the checkpoints of an earlier run: go on with "
            "checkpoint.resume=auto, or choose another folder"
        )
    clear_leftovers(config.output_dir)
    (config.output_dir / WARNINGS_NAME).touch()
    if config.checkpoint.resume is None or not (config.output_dir / CONFIG_NAME).is_file():
        _write_config(config)  # so that there is a report on a run that fails while it is prepared


def _write_config(config: RunConfig) -> None:
    (config.output_dir / CONFIG_NAME).write_text(config.to_yaml(), encoding="utf-8")


def _origin(
    config: RunConfig, checkpoint: Path | None, initial: StoredAdapter | None, model: nn.Module
) -> dict[str, str] | None:
    """`Job.initial`: of a fresh run from the adapter it starts with, of a resumed one from its checkpoint."""
    asked = config.lora.initial
    if initial:
        log.info("the adapter starts from the weights of %s", initial.directory)
        fingerprint = tensors_fingerprint(lora_b(model).items())
        return {"path": str(asked), "sha256": initial.sha256["weights"], "lora_b": fingerprint}
    origin = read_state(checkpoint).get("initial") if checkpoint else None
    if checkpoint and asked and (origin is None or origin["path"] != str(asked)):
        began = f"began from {origin['path']}" if origin else "began afresh"
        log.warning("lora.initial=%s is not used: the run goes on from %s, and %s", asked, checkpoint, began)
    return origin


def _check_before_encoding(
    config: RunConfig, family: Family, plan: PrecisionPlan, initial: StoredAdapter | None
) -> None:
    """Refuse what would stop the run after hours of encoding."""
    family.check_base()
    unknown = sorted(set(config.train.head_weights) - set(family.heads))
    if unknown:
        raise ConfigError(f"train.head_weights: no head {unknown[0]!r}; {family.name} has: {', '.join(family.heads)}")
    if initial:
        apply_lora(family.skeleton(), family, config.lora, config.train.seed, initial)
    elif config.lora.enabled:
        matching_modules(family.skeleton(), target_pattern(family, config.lora))
        _ = family.initial_adapter  # refuses where it is not there
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
    training, evaluation = load_all(data.train, data, config.output_dir), list[Sample]()
    if not config.evaluate.enabled:
        if data.validation_split or data.eval:
            log.info("evaluation is off: all %d samples are trained on, data.eval is not read", len(training))
    elif data.validation_split > 0:
        share, total = data.validation_split, len(training)
        sides = split_validation(training, share, config.train.seed)
        training, evaluation = map(borrow_references, sides)  # never across the split
        log.info("validation_split %g holds out %d of %d samples", share, len(evaluation), total)
    elif data.eval:
        evaluation = load_all(data.eval, data, config.output_dir, "test")
        same = {path.resolve() for path in as_paths(data.train)} & {path.resolve() for path in as_paths(data.eval)}
        if same and {sample.audio for sample in evaluation} <= {sample.audio for sample in training}:
            raise ConfigError(
                f"data.train and data.eval both name {min(same)}: the evaluation would only show what was learnt by "
                "heart; set data.validation_split in place of data.eval, or name other data"
            )
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


def run_info(job: Job) -> dict[str, Any]:
    """The content of run_info.json."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    base = {"path": job.config.model.path, "revision": job.config.model.revision, "fingerprint": job.identity["base"]}
    return {
        "speechtune": __version__,
        "versions": {"python": platform.python_version(), **versions},
        "hardware": hardware(job.precision.device),
        "precision": job.precision.describe(),
        "base": base,
        "initial_adapter": job.initial,
        "data": describe_data(job.train_set, job.eval_set),
        "parameters": [asdict(row) for row in count_by_component(job.model, job.family)],
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "world_size": world_size(),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """The device a run takes place on, and the machine around it; memory in bytes."""
    on_gpu = device.type == "cuda"
    memory, cpu = psutil.virtual_memory().total, platform.processor() or platform.machine()
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if on_gpu else cpu,
        "count": torch.cuda.device_count() if on_gpu else 1,
        "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else memory,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
    }


def describe_data(train_set: EncodedSet, eval_set: EncodedSet | None) -> dict[str, Any]:
    """Counts of the training set, its hours by target audio, and how many samples are held back for evaluation."""
    samples = train_set.samples
    return {
        "fingerprint": train_set.fingerprint,
        "samples": len(samples),
        "hours": round(train_set.audio_seconds / 3600, 4),
        "positions": int(train_set.lengths.sum()),
        "speakers": len({sample.speaker for sample in samples}),
        "languages": dict(Counter(sample.language or "(not given)" for sample in samples).most_common()),
        "eval_samples": len(eval_set) if eval_set is not None else 0,
    }


def model_card(
    config: RunConfig,
    family: Family,
    train_set: EncodedSet,
    initial: Mapping[str, str] | None,
    scores: Mapping[str, float] | None = None,
) -> str:
    """The text of README.md.

    `initial` is as in `Job`; `scores` are those of the run's last (or best) evaluation by name, None on the way.
    """
    base, lora, data = config.model.path, config.lora, describe_data(train_set, None)
    rows = [f"| {name} | {value:.4g} |" for name, value in (scores or {}).items()]
    table = "\n".join(["| figure | value |", "|---|---|", *rows])
    without = "No evaluation was made in this run." if scores is not None else "Saved on the way: see `metrics.jsonl`."
    started = ""
    if initial:
        name = "/".join(Path(initial["path"]).absolute().parts[-2:])
        started = f"It started from the weights of the adapter `{name}` (SHA-256 {initial['sha256']}).\n"
    kind, how, load = "LoRA adapter for", "", "Load it with `PeftModel.from_pretrained(base, folder)`."
    if lora.enabled:
        how = f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, targets `{lora.targets}`"
    else:
        kind, load = "Full fine-tuning of", "Load it with `from_pretrained(folder)`: it is a complete model."
        how = "all weights" + (f" but those of `{config.train.freeze}`" if config.train.freeze else "")
    return f"""---
{_metadata(config, family, scores or {}).to_yaml()}
---
# {kind} {Path(base).name if Path(base).exists() else base}

Trained with speechtune {__version__} on {data["samples"]} samples ({data["hours"]:.2f} h, \
{data["speakers"]} speakers): {how}, learning rate {config.train.learning_rate:g}, seed {config.train.seed}.
{started}
{load} {family.card_note}

## Evaluation

{table if rows else without}

## Use

{family.card_use} The licence of the base model holds for it too.
"""


def _metadata(config: RunConfig, family: Family, scores: Mapping[str, float]) -> ModelCardData:
    """The metadata block; a base in a local folder is not named, for nobody else could find it."""
    base, data = config.model.path, config.data
    name = ", ".join(path.name for path in as_paths(data.eval)) or "held out from the training data"
    results = [
        EvalResult(
            task_type=family.pipeline_tag,
            dataset_type="custom",
            dataset_name=name,
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for metric, value in scores.items()
    ]
    return ModelCardData(
        base_model=None if Path(base).exists() else base,
        library_name="peft" if config.lora.enabled else "transformers",
        license=family.base_license,
        pipeline_tag=family.pipeline_tag,
        tags=["lora", "speechtune"] if config.lora.enabled else ["speechtune"],
        model_name=config.output_dir.name,
        eval_results=results or None,
        ignore_metadata_errors=False,
    )

"""A training run from its configuration: data, base, adapter, loop, and the proof of what was trained."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import nn

from speechtune import __version__
from speechtune.adapter import (
    adapter_state,
    apply_lora,
    count_by_tower,
    describe_settings,
    freeze,
    frozen,
    matching_modules,
    save_lora_adapters,
    target_pattern,
    trainable,
)
from speechtune.base_recipe import describe_base
from speechtune.budget import settle_budget, settle_checkpointing
from speechtune.cache import EncodedSet, encode_samples
from speechtune.checkpoint import STATE_NAME, check_writable, clear_leftovers, find_checkpoints
from speechtune.config import RunConfig, world_size
from speechtune.datasets import load_samples, split_validation
from speechtune.errors import ConfigError, TrainingError
from speechtune.families import create_family
from speechtune.families.base import Family, Sample
from speechtune.families.fast_ops import choose_kernels
from speechtune.fingerprint import checksums, tensors_fingerprint
from speechtune.listening import make_listener, num_prompts, prepare_scorers
from speechtune.loop import Job, Run, TrainResult
from speechtune.model_card import model_card
from speechtune.objective import checkpoint_activations
from speechtune.precision import plan_precision
from speechtune.ranks import least_over_ranks
from speechtune.run_info import INFO_NAME, run_info
from speechtune.save_adapters import CARD_NAME, RECIPE_NAME
from speechtune.saving import ADAM_MOMENTS, cpu_copy, restore_weights, weights_of, write_state
from speechtune.sharding import is_sharded
from speechtune.tracking import WARNINGS_NAME, add_warnings, configure_logging, flatten
from speechtune.watchdog import Watchdog

log = logging.getLogger("speechtune")

SETUP_TIMEOUT = timedelta(hours=12)  # ranks wait for one another while clips are encoded


@dataclass(frozen=True, slots=True)
class Proof:
    """What shows that a run trained what it was to train, measured on the model in memory."""

    lora_b_total: int
    lora_b_moved: int
    base_unchanged: bool
    trainable_parameters: int


@dataclass(frozen=True)
class Outcome:
    """A finished run: what the loop says, what was proven, and the trained model with all that belongs to it."""

    result: TrainResult
    proof: Proof
    job: Job


def start_accelerator(config: RunConfig) -> Accelerator:
    """Join the other ranks, if any, and make sure that it really happened.

    Raises:
        TrainingError: accelerate runs another kind of job than was launched.
    """
    tracking = config.tracking
    for name in tracking.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"tracking.trackers: {name} is not installed: pip install {name}, or name another tracker"
            )
    if config.speed.parallel == "fsdp":
        _check_sharding(config)
    if world_size() > 1 and "MASTER_ADDR" not in os.environ:
        raise ConfigError(f"WORLD_SIZE={world_size()} without MASTER_ADDR: start several processes with torchrun")
    if world_size() > 1:
        _check_restarts()
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),  # without this accelerate starts single processes under torchrun on a CPU
        log_with=list(tracking.trackers) or None,
        project_dir=tracking.logging_dir or config.output_dir / "logs",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=SETUP_TIMEOUT)],
    )
    expected = {DistributedType.NO} if world_size() == 1 else {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU}
    if accelerator.distributed_type not in expected or accelerator.num_processes != world_size():
        raise TrainingError(
            f"{world_size()} processes were launched, accelerate runs {accelerator.distributed_type.value} with "
            f"{accelerator.num_processes}; check ACCELERATE_* in the environment"
        )
    configure_logging(accelerator.is_main_process)
    return accelerator


def _check_sharding(config: RunConfig) -> None:
    if world_size() == 1:
        raise ConfigError(
            "speed.parallel=fsdp: there is one process, so nothing can be sharded: start several with torchrun, or set "
            "speed.parallel=ddp"
        )
    if num_prompts(config):
        raise ConfigError(
            "speed.parallel=fsdp: answers are generated on one rank, which has only its share of the weights: set "
            "evaluate.prompts=0 and listen to the adapter afterwards (speechtune evaluate), or set speed.parallel=ddp"
        )
    for option, value in (
        ("batch.tokens", config.batch.tokens),
        ("train.gradient_checkpointing", config.train.gradient_checkpointing),
    ):
        if value == "auto":
            raise ConfigError(
                f"speed.parallel=fsdp: {option}=auto measures a model that is whole on its device: name a value"
            )


def _check_restarts() -> None:
    """Refuse restarts in which a new process would be told the addresses of the old ones (pytorch issue 135712)."""
    shared_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared_store and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
        raise ConfigError(
            "torchrun --max-restarts: a restart would connect to the processes of the attempt before it; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun, and start several nodes with "
            "--rdzv-backend=c10d"
        )


def load_sets(config: RunConfig, family: Family) -> tuple[list[Sample], list[Sample]]:
    """Read, check and split the data of a run into what the family makes training and evaluation samples of.

    Raises:
        ConfigError: no training data named.
        ManifestError: faults in the data.
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


def prepare(config: RunConfig, accelerator: Accelerator) -> Job:
    """Load data, base and adapter, and show what will be trained.

    Raises:
        SpeechtuneError: anything that would make the run fail or unreal later.
    """
    if accelerator.is_main_process:
        _open_output(config)
    accelerator.wait_for_everyone()
    family = create_family(config)
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
        "lora": describe_settings(lora, target_pattern(family, lora)) if lora.enabled else None,
        "seed": config.train.seed,
    }
    if accelerator.is_main_process:
        log.info("precision: %s", plan.describe())
        show_counts(model, family)
        trained = sum(p.numel() * p.element_size() for p in trainable(model).values())
        check_writable(config.output_dir, trained * (1 + ADAM_MOMENTS))
        info = run_info(config, plan, identity, count_by_tower(model, family), train_set, eval_set)
        (config.output_dir / INFO_NAME).write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")
        accelerator.init_trackers("speechtune", {k: str(v) for k, v in flatten(config.model_dump()).items()})
    listener = None if scorers is None else make_listener(config, family, train_set, eval_set, scorers)
    return Job(config, family, model, plan, train_set, eval_set, identity, notes, listener)


def run_training(config: RunConfig) -> Outcome:
    """Train as configured, then save the adapter, prove it, and write the run's summary.

    Raises:
        SpeechtuneError: with the reason; checkpoints saved before it stay.
    """
    accelerator = start_accelerator(config)
    with Watchdog(accelerator, config.output_dir) as watchdog:
        outcome = _train(config, accelerator, watchdog)
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return outcome


def _train(config: RunConfig, accelerator: Accelerator, watchdog: Watchdog) -> Outcome:
    job = prepare(config, accelerator)
    for settle in (settle_checkpointing, settle_budget):
        job = settle(job, accelerator.num_processes, lambda value: least_over_ranks(accelerator, value))
    frozen_before, adapter_before = tensors_fingerprint(frozen(job.model)), lora_b_checksums(job.model)
    run = Run(job, accelerator)
    watchdog.step = lambda: run.state.step
    try:
        result = run.train()
    except TrainingError as error:
        if accelerator.is_main_process:
            add_warnings(config.output_dir, run.state.step + 1, "guard", [str(error)])
        raise
    proof = prove(job.model, adapter_before, tensors_fingerprint(frozen(job.model)) == frozen_before)
    if result.signal is None:
        weights = _final_weights(job, result, keep=accelerator.is_main_process)
        if accelerator.is_main_process:
            finish(job, result, proof, weights)
    return Outcome(result, proof, job)


def lora_b_checksums(model: nn.Module) -> dict[str, str]:
    """Checksum of every lora_B of the adapter that is trained; empty for a full model."""
    state = adapter_state(model) if isinstance(model, PeftModel) else {}
    return checksums({name: tensor for name, tensor in state.items() if "lora_B" in name})


def prove(model: nn.Module, adapter_before: Mapping[str, str], base_unchanged: bool) -> Proof:
    """Measure the proof on a trained model; `adapter_before` are its lora_B checksums before the first step.

    Raises:
        TrainingError: the frozen base changed, or no lora_B moved.
    """
    after = lora_b_checksums(model)
    moved = sum(adapter_before[name] != now for name, now in after.items())
    if after and not moved:
        raise TrainingError(f"all {len(after)} lora_B are after training what they were before: nothing was learnt")
    if not base_unchanged:
        raise TrainingError("the frozen base changed during training: the adapter would not fit the original base")
    return Proof(len(after), moved, base_unchanged, sum(p.numel() for p in trainable(model).values()))


def _final_weights(job: Job, result: TrainResult, *, keep: bool) -> dict[str, torch.Tensor] | None:
    """Put the adapter that the run ends with into the model; of a sharded model also return it whole."""
    if not isinstance(job.model, PeftModel):
        return None
    if job.config.checkpoint.final == "best" and result.best_checkpoint is not None:
        restore_weights(job.model, result.best_checkpoint)
        best = result.best_checkpoint.name
        log.info("lora_adapters holds the weights of %s, the best by %s", best, job.config.evaluate.best_metric)
    return cpu_copy(weights_of(job.model), keep=keep) if is_sharded(job.model) else None


def finish(job: Job, result: TrainResult, proof: Proof, weights: Mapping[str, torch.Tensor] | None) -> None:
    """Write `lora_adapters/` (with LoRA; `weights` as `save_lora_adapters` takes them) and the run's trainer state."""
    output_dir = job.config.output_dir
    if isinstance(job.model, PeftModel):
        notes = {**job.notes, CARD_NAME: model_card(job.config, job.family, job.train_set, result.scores)}
        directory = output_dir / "lora_adapters"
        save_lora_adapters(job.model, directory, notes=notes, save_embedding_layers=False, state_dict=weights)
    write_state(output_dir / STATE_NAME, result.state)
    summary = {
        "speechtune": __version__,
        "first_losses": dict(result.first_losses),
        "last_losses": dict(result.state.losses),
        "seconds": result.seconds,
        "proof": asdict(proof),
        "best_checkpoint": str(result.best_checkpoint) if result.best_checkpoint else None,
        "scores": dict(result.scores),
        "time": dict(result.time),
    }
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def show_counts(model: nn.Module, family: Family, console: Console | None = None) -> None:
    """Print what is trainable, by part of the model."""
    table = Table("part", "base parameters", "trainable")
    rows = count_by_tower(model, family)
    for row in rows:
        table.add_row(row.tower, f"{row.total:,}", f"{row.trainable:,}")
    total, trained = sum(row.total for row in rows), sum(row.trainable for row in rows)
    table.add_section()
    table.add_row("all", f"{total:,}", f"{trained:,} ({trained / total:.2%})")
    (console or Console(stderr=True)).print(table)


def dry_run(config: RunConfig) -> int:
    """Resolve a recipe without weights or data: print it, then what its adapter would train on the real dimensions."""
    family = create_family(config)
    model = family.skeleton()
    if config.lora.enabled:
        model = apply_lora(model, family, config.lora, config.train.seed)
    print(config.to_yaml())
    show_counts(model, family, Console())
    return 0

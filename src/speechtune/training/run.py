"""A training run from its recipe to the saved adapter, with the proof of what was trained."""

import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel
from torch import nn

from speechtune import __version__
from speechtune.config import RunConfig
from speechtune.errors import TrainingError
from speechtune.family import Family
from speechtune.lora.additions import addition_state
from speechtune.lora.apply import frozen, lora_b, trainable
from speechtune.lora.files import CARD_NAME, FOLDER_NAME
from speechtune.lora.save import save_lora_adapters
from speechtune.storage.files import write_atomically
from speechtune.storage.lock import locked
from speechtune.storage.verified_folder import STATE_NAME, read_state
from speechtune.tensors import checksums, is_sharded, tensors_fingerprint
from speechtune.training.checkpoint import cpu_copy, publish_model, restore_weights, weights_of, write_state
from speechtune.training.distributed import on_first_rank, start_accelerator
from speechtune.training.job import Job, TrainResult
from speechtune.training.loop import Run
from speechtune.training.memory_budget import settle_budget, settle_checkpointing
from speechtune.training.prepare import model_card, prepare, record_start
from speechtune.training.tracking import add_warnings
from speechtune.training.watchdog import LOST_SECONDS, Watchdog

log = logging.getLogger("speechtune")

SUMMARY_NAME = "summary.json"


@dataclass(frozen=True, slots=True)
class Proof:
    """Evidence, measured on the model in memory, of what a run trained.

    Attributes:
        lora_b_total: of the adapter; like the next two None after full fine-tuning, which has neither adapter nor base.
        lora_b_moved: of these, how many changed.
        base_unchanged: the base is bit for bit what it was.
        trainable_parameters: numbers in what was trained.
        tensors_total: tensors that were trained.
        tensors_moved: of these, how many changed.
    """

    lora_b_total: int | None
    lora_b_moved: int | None
    base_unchanged: bool | None
    trainable_parameters: int
    tensors_total: int
    tensors_moved: int


@dataclass(frozen=True)
class Outcome:
    """A finished run: the loop's result, the proof, and the job with the trained model."""

    result: TrainResult
    proof: Proof
    job: Job


def run_training(config: RunConfig, family: Family | None = None, *, lost_seconds: float = LOST_SECONDS) -> Outcome:
    """Train as configured, then save the adapter, prove it, and write the run's summary.

    `family` None takes the recipe's own; another rank counts as lost after `lost_seconds` of silence.
    Raises SpeechtuneError: with the reason; checkpoints saved before it stay.
    """
    accelerator = start_accelerator(config)
    with Watchdog(accelerator, config.output_dir, lost_seconds) as watchdog, ExitStack() as stack:
        on_first_rank(lambda: stack.enter_context(locked(config.output_dir)))
        outcome = _train(config, family, accelerator, watchdog)
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return outcome


def _train(config: RunConfig, family: Family | None, accelerator: Accelerator, watchdog: Watchdog) -> Outcome:
    main = accelerator.is_main_process
    job = prepare(config, accelerator, family)
    for settle in (settle_checkpointing, settle_budget):
        job = settle(job, accelerator.num_processes, lambda value: min(gather_object([value])))
    frozen_before, before = tensors_fingerprint(frozen(job.model)), checksums(trainable(job.model))
    run = Run(job, accelerator)
    watchdog.step = lambda: run.state.step
    finished = _is_finished(job, run.total_steps)
    if not finished:
        record_start(job, accelerator, run.total_steps)
    try:
        result = run.train()
    except TrainingError as error:
        if main:
            add_warnings(config.output_dir, run.state.step + 1, "guard", [str(error)])
        raise
    unchanged = tensors_fingerprint(frozen(job.model)) == frozen_before
    proof = prove(job.model, before, unchanged, job.initial, resumed=job.checkpoint is not None)
    if result.signal is None and not finished:
        _save_final(job, result, main=main)
        if main:
            _write_summary(config.output_dir, result, proof)
    return Outcome(result, proof, job)


def _is_finished(job: Job, total_steps: int) -> bool:
    """Whether the run that is to go on has nothing left to do; its files are then left as they are."""
    directory, step = job.config.output_dir, read_state(job.checkpoint)["step"] if job.checkpoint else 0
    if step < total_steps or not (directory / SUMMARY_NAME).is_file():
        return False
    message = (
        "%s: this run is finished, at step %d of %d: nothing is trained, and nothing written. To go on, raise "
        "train.max_steps or train.epochs; to begin anew, choose another output_dir"
    )
    log.warning(message, directory, step, total_steps)
    return True


def prove(
    model: nn.Module,
    before: Mapping[str, str],
    frozen_unchanged: bool,
    initial: Mapping[str, str] | None = None,
    *,
    resumed: bool = False,
) -> Proof:
    """Measure the proof on a trained model; `before` are the checksums of what is trained before the first step.

    In a `resumed` run those are of a fresh adapter: what it must have left behind are the weights of `initial`, as in
    `Job`. What is trained beside the adapter was loaded from the checkpoint by then, and need not move again.
    """
    parameters = trainable(model)
    moved = {name for name, now in checksums(parameters).items() if before[name] != now}
    added = [name for name, _, _ in addition_state(model) if name in parameters]
    if added and not resumed and not moved & set(added):
        raise TrainingError(f"training changed none of the {len(added)} tensors beside the adapter ({added[0]})")
    lora = isinstance(model, PeftModel)
    chosen = [name for name in parameters if "lora_B" in name] if lora else list(parameters)
    num_moved = len(moved & set(chosen))
    if initial and initial["lora_b"] == tensors_fingerprint(lora_b(model).items()):
        num_moved = 0
    if chosen and not num_moved:
        raise TrainingError(
            f"training changed none of the {len(chosen)} {'lora_B' if lora else 'tensors'}: nothing was learnt"
        )
    if not frozen_unchanged:
        raise TrainingError("the frozen base changed during training: the adapter would not fit the original base")
    of_adapter = (len(chosen), num_moved, True) if lora else (None, None, None)
    return Proof(*of_adapter, sum(p.numel() for p in parameters.values()), len(parameters), len(moved))


def _save_final(job: Job, result: TrainResult, *, main: bool) -> None:
    """Write `lora_adapters/`, or lay a full model into the run's folder. All ranks call this: shards are gathered."""
    model, config = job.model, job.config
    best_checkpoint = result.best_checkpoint if config.checkpoint.final == "best" else None
    if not isinstance(model, PeftModel):
        if main:
            last = config.output_dir / f"checkpoint-{result.state.step}"
            publish_model(best_checkpoint or last, config.output_dir)
            card = model_card(config, job.family, job.train_set, job.initial, result.scores)
            write_atomically(config.output_dir / CARD_NAME, card.encode())  # the checkpoint's own may be the same file
        return
    if best_checkpoint is not None:
        restore_weights(model, best_checkpoint)
        best = best_checkpoint.name
        log.info("lora_adapters holds the weights of %s, the best by %s", best, config.evaluate.best_metric)
    weights = cpu_copy(weights_of(model), keep=main) if is_sharded(model) else None
    if main:
        notes = {**job.notes, CARD_NAME: model_card(config, job.family, job.train_set, job.initial, result.scores)}
        directory = config.output_dir / FOLDER_NAME
        save_lora_adapters(model, directory, notes=notes, save_embedding_layers=False, state_dict=weights)


def _write_summary(output_dir: Path, result: TrainResult, proof: Proof) -> None:
    """Write the files that a report reads, and that say that the run came to its end."""
    write_state(output_dir / STATE_NAME, result.state)
    summary = {
        "speechtune": __version__,
        "first_losses": dict(result.first_losses),
        "last_losses": dict(result.state.losses),
        "seconds": result.seconds["total_seconds"],
        "proof": asdict(proof),
        "best_checkpoint": str(result.best_checkpoint) if result.best_checkpoint else None,
        "scores": dict(result.scores),
        "time": dict(result.seconds),
    }
    (output_dir / SUMMARY_NAME).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

"""The training loop: the only `backward()`, and a guard wherever training can be unreal."""

import logging
import math
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Self

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from speechtune.config import TrainConfig
from speechtune.errors import CheckpointError
from speechtune.lora.additions import addition_state
from speechtune.lora.apply import trainable
from speechtune.storage.verified_folder import prune
from speechtune.tensors import checksums, gather, rng_state, set_rng_state
from speechtune.training import guards
from speechtune.training.batching import BatchLoader, BatchPlan
from speechtune.training.checkpoint import RunParts, RunState, Saver, checkpoint_writer, restore
from speechtune.training.distributed import Engine, sum_heads, sum_over_ranks
from speechtune.training.evaluator import Evaluator
from speechtune.training.job import Job, Objective, TrainResult
from speechtune.training.tracking import Record, Stopwatch, Tracker, log_details
from speechtune.types import Batch

log = logging.getLogger("speechtune")

RETRY_SECONDS = 2
MAX_SKIPPED_STEPS = 20  # a float16 scaler that halves this often in a row has met real infinities


class Interruption:
    """Catches SIGTERM and SIGINT while a run trains; the loop finishes its step, saves and leaves."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> Self:
        self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal:  # the second signal: stop at once
            raise KeyboardInterrupt
        self.signal = number
        log.warning("%s: finishing this step, then saving and stopping", signal.Signals(number).name)


def make_optimizer(parameters: Sequence[nn.Parameter], config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW over what is trained, fused where the device has such a kernel."""
    return torch.optim.AdamW(
        parameters, config.learning_rate, config.betas, config.eps, config.weight_decay, fused=device.type == "cuda"
    )


def warmup_steps(total_steps: int, config: TrainConfig) -> int:
    """Steps of warm-up: those of the recipe, but at most a tenth of the run."""
    return min(config.warmup_steps, math.ceil(total_steps / 10))


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Learning rate of step `step` (from 0): linear warm-up that starts above zero, then the schedule's decay.

    A pure function, so that there is nothing to save or restore.
    """
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    shape = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.learning_rate * shape[config.schedule]


class Run:
    """One run of the loop over one `Job`."""

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        config, device = job.config, job.precision.device
        self.job, self.accelerator, self.config = job, accelerator, config
        objective = Objective(job.model, job.family, job.precision, config.train.head_weights)
        self.engine = Engine(objective, accelerator, config.speed.parallel, defer=config.lora.enabled)
        self.parameters = trainable(job.model)
        additions = [place for place, _, _ in addition_state(job.model) if place in self.parameters]
        guards.check_trainable(self.parameters, lora=config.lora.enabled, additions=additions)
        self.unreached = set(additions)
        self.plan = BatchPlan.of(config, job.train_set.lengths, accelerator.num_processes)
        self.loader = BatchLoader(config, self.plan, job.train_set, accelerator.process_index, device)
        self.total_steps = config.train.max_steps or self.plan.num_steps(config.train.epochs)
        self.optimizer = make_optimizer(list(self.parameters.values()), config.train, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=job.precision.scaler)
        self.parts = RunParts(
            job.model, self.optimizer, self.scaler, config.to_yaml(), job.notes, job.family.save_assets
        )
        identity = {**job.identity, "global_batch": self.plan.global_batch_size}
        self.state = RunState(0, self.total_steps, 0.0, identity, initial=job.initial)
        self.skipped = 0
        self.unproven = True
        self.watch = Stopwatch("data", "forward_backward", "optimizer", "checkpoint", "evaluation")
        # A full model is too large to copy for it; and PEFT, saving, makes FSDP take weights back that a pass is using.
        self.saver = Saver(background=config.lora.enabled and config.speed.parallel == "ddp")

    def train(self) -> TrainResult:
        """Train to the last step, or to a signal; saves on the way and at the end."""
        config = self.config
        torch.manual_seed(config.train.seed + self.accelerator.process_index)
        self._resume()
        tracker = Tracker(self.accelerator, config.output_dir, config.tracking.log_every_steps, self.state.step)
        evaluator = Evaluator(
            self.job, self.accelerator, self.engine.plain, tracker, self.watch, scores=tracker.past_scores()
        )
        evaluator.evaluate_base(self.state.step, self.total_steps)
        wanted = self.job.eval_set is not None or self.job.sample_generator is not None
        self.job.model.train()
        self.first_step, self.loop_started = self.state.step, time.monotonic()
        first_losses: Mapping[str, float] = {}
        with Interruption() as interruption, self.saver, closing(self.loader):
            for step in range(self.first_step, self.total_steps):
                with self.watch.measure("data"):
                    batches = self.loader.take(step)
                record = self._step(step, batches)
                first_losses = first_losses or record.losses
                guards.check_additions_reached(self.unreached, step + 1, max(2, self.plan.num_steps(1)))
                tracker.write(record, self.total_steps)
                self.state = replace(self.state, step=step + 1, epoch=record.epoch, losses=dict(record.losses))
                stop = sum_over_ranks(self.accelerator, [{"signal": float(interruption.signal)}])["signal"] > 0
                interruption.signal = interruption.signal or (signal.SIGTERM if stop else 0)  # another rank's
                last = stop or step + 1 == self.total_steps
                due = last or (step + 1) % config.evaluate.every_steps == 0
                if wanted and due and not stop:  # after a SIGTERM a launcher soon kills: saving comes first
                    self.state = evaluator.evaluate(self.state, self.total_steps)
                early = self.state.rounds_without_better >= (config.evaluate.patience or math.inf)
                improved = self.state.best_step == self.state.step
                with self.watch.measure("checkpoint"):
                    if last or early or improved or (step + 1) % config.checkpoint.every_steps == 0:
                        self._save()
                    self.saver.poll()
                if stop or early:
                    break
            self.saver.wait()
        self.accelerator.wait_for_everyone()
        best = None if self.state.best_step is None else self._checkpoint(self.state.best_step)
        best = best if best is not None and best.is_dir() else None
        final = self.state.best_step if config.checkpoint.final == "best" and best else self.state.step
        scores = evaluator.scores.get(final or 0, {})
        return TrainResult(self.state, first_losses, interruption.signal or None, best, scores, self.watch.seconds())

    def _resume(self) -> None:
        """Go on from the job's checkpoint, if there is one."""
        if self.job.checkpoint is None:
            return
        identity, force = self.state.identity, self.config.checkpoint.force
        state = restore(self.job.checkpoint, self.parts, identity, self.accelerator.process_index, force=force)
        self.state = replace(state, total_steps=self.total_steps, identity=identity)
        self.unproven, self.unreached = False, set()  # its first step lies in the run before

    def _step(self, step: int, batches: Sequence[Batch]) -> Record:
        started, heads = time.monotonic() - self.watch.last["data"], self.job.family.heads
        where = f"step {step + 1}"
        for batch in batches:
            guards.check_targets(batch, where)
        counts = sum_heads(self.accelerator, [batch.target_counts for batch in batches], heads)
        self.optimizer.zero_grad(set_to_none=True)
        with self.watch.measure("forward_backward"):
            batches, per_batch = self._forward_backward(step, batches, counts)
            sums = sum_heads(self.accelerator, [{h: float(v) for h, v in s.items()} for s in per_batch], heads)
        losses = {head: value / counts[head] for head, value in sums.items()}
        suspects = [b for b, s in zip(batches, per_batch, strict=True) if not all(v.isfinite() for v in s.values())]
        ids = [sample_id for batch in suspects or batches for sample_id in batch.sample_ids]
        guards.check_losses(losses, where, ids)
        log_details(self.config.tracking.detail_every_steps, step + 1, batches)
        rate = learning_rate(step, self.total_steps, self.config.train)
        with self.watch.measure("optimizer"):
            grad_norm = self._update(where, ids, rate)
        sizes = [{"audio": batch.audio_seconds, "tokens": float(batch.num_tokens)} for batch in batches]
        total = sum_over_ranks(self.accelerator, sizes)
        seconds = time.monotonic() - started
        per_step = (time.monotonic() - self.loop_started) / (step + 1 - self.first_step)
        return Record(
            step=step + 1,
            epoch=self.plan.epoch_at(step + 1),
            loss=self.job.weighted(losses),
            losses=losses,
            learning_rate=rate,
            grad_norm=grad_norm,
            audio_seconds_per_second=total["audio"] / seconds,
            tokens_per_second=total["tokens"] / seconds,
            data_wait_share=self.watch.last["data"] / seconds,
            eta_seconds=per_step * (self.total_steps - step - 1),
        )

    def _forward_backward(
        self, step: int, batches: Sequence[Batch], counts: Mapping[str, float]
    ) -> tuple[Sequence[Batch], list[dict[str, torch.Tensor]]]:
        """Gradients of a step, and each micro-batch's summed losses; cut finer and taken again when it does not fit."""
        while True:
            before = rng_state()
            try:
                where = f"step {step + 1}"
                return batches, [self._backward(b, counts, where, last=b is batches[-1]) for b in batches]
            except torch.OutOfMemoryError as error:
                batches = self.loader.cut_finer(step, batches, error)
            self.optimizer.zero_grad(set_to_none=True)
            set_rng_state(before)

    def _backward(
        self, batch: Batch, counts: Mapping[str, float], where: str, *, last: bool
    ) -> dict[str, torch.Tensor]:
        ranks = self.accelerator.num_processes
        batch = batch.to(self.job.precision.device)
        with self.engine.micro_batch(last=last):
            loss, sums = self.engine.objective(batch, counts)
            guards.check_attached(loss, where, batch.sample_ids)
            self.scaler.scale(loss * ranks).backward()  # ranks average; the counts already span them
        return sums

    def _update(self, where: str, ids: Sequence[str], rate: float) -> float:
        """Clip the gradients and let the optimizer take its step; the norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.parameters.values())
        total_norm = gather(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        norm = float(total_norm)
        self.skipped = self.skipped + 1 if self.job.precision.scaler and not math.isfinite(norm) else 0
        if not self.skipped or self.skipped > MAX_SKIPPED_STEPS:
            guards.check_gradients(self.parameters, norm, where, ids)
        # After the guard: clipping by a norm of NaN makes every gradient NaN, and none could be named.
        nn.utils.clip_grads_with_norm_(parameters, self.config.train.max_grad_norm, total_norm)
        prove = self.unproven and not self.skipped  # the first step that the optimizer really takes
        if prove and self.config.lora.enabled:
            guards.check_reached(self.parameters, where)
        if self.unreached and not self.skipped:
            self.unreached = guards.still_unreached(self.parameters, self.unreached)
        before = checksums(self.parameters) if prove else {}
        self.scaler.step(self.optimizer)
        self.scaler.update()
        guards.check_finite(self.parameters, where, ids)
        if prove:
            guards.check_moved(before, checksums(self.parameters), where)
            self.unproven = False
        return norm

    def _save(self) -> None:
        states = gather_object([rng_state()])
        step, best, directory = self.state.step, self.state.best_step, self._checkpoint(self.state.step)
        main, copy = self.accelerator.is_main_process, self.config.lora.enabled
        publish = checkpoint_writer(directory, self.parts, self.state, states, copy=copy, keep=main)
        if not main:
            return

        def save() -> None:
            try:
                publish()
            except CheckpointError as error:  # a network disk may be slow to show what was written
                log.error("%s; trying once more in %d s", error, RETRY_SECONDS, exc_info=error)
                time.sleep(RETRY_SECONDS)
                publish()
            protected = [] if best is None else [self._checkpoint(best)]
            prune(self.config.output_dir, self.config.checkpoint.keep_last, protected, up_to=step)
            log.info("saved and verified %s", directory)

        self.saver.submit(save)

    def _checkpoint(self, step: int) -> Path:
        return self.config.output_dir / f"checkpoint-{step}"

"""One evaluation of a run: losses on the evaluation set, answers heard and scored, and which checkpoint is the best."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from speechtune.cache.encoded_set import EncodedSet
from speechtune.training import guards
from speechtune.training.batching import evaluation_batches
from speechtune.training.checkpoint import RunState
from speechtune.training.distributed import sum_heads
from speechtune.training.generated_samples import BASE_STEP
from speechtune.training.job import Job
from speechtune.training.tracking import EvaluationRecord, Tracker, add_warnings, log_answers

log = logging.getLogger("speechtune")


class Evaluator:
    """Evaluates on all ranks together; answers are generated on the main process.

    Args:
        job: what is trained, with its evaluation set and generator (either may be None).
        accelerator: knows the ranks.
        objective: model and loss, unwrapped.
        tracker: where records go.
    """

    def __init__(self, job: Job, accelerator: Accelerator, objective: nn.Module, tracker: Tracker) -> None:
        self.job, self.accelerator, self.objective, self.tracker = job, accelerator, objective, tracker
        self.started, self.spent = time.monotonic(), 0.0
        self.base_scores: dict[str, float] = {}
        self.scores: dict[int, dict[str, float]] = {}

    @property
    def wanted(self) -> bool:
        """Whether there is anything to evaluate."""
        return self.job.eval_set is not None or self.job.sample_generator is not None

    def evaluate_base(self, first_step: int, total_steps: int) -> None:
        """Let the model answer before the first step: what training must improve on.

        A fresh adapter changes nothing yet, and one that goes on from another starts with what that one knows.
        """
        if self.job.sample_generator is None:
            return
        file = self.job.config.output_dir / "samples" / "base_scores.json"
        # The main process decides for all: the others may not see its disk.
        known = self._told(json.loads(file.read_text(encoding="utf-8")) if self._main and file.is_file() else None)
        if known is not None:  # a resumed run
            self.base_scores = known
            return
        if self._main:
            log_answers(self.accelerator, self.job.sample_generator.prepare(), BASE_STEP, "recordings")
        if first_step > 0:
            log.warning("nothing was heard before the first step of this run: scores stand without the base's")
            return
        record = self._record(BASE_STEP)
        self.base_scores = dict(record.scores)
        if self._main:
            file.write_text(json.dumps(self.base_scores) + "\n", encoding="utf-8")
        self.tracker.write(record, total_steps)

    def evaluate(self, state: RunState, total_steps: int) -> RunState:
        """Evaluate after a step; the state returned knows whether it is the best so far.

        Raises:
            TrainingError: an evaluation loss is not finite.
        """
        record = self._record(state.step)
        self.tracker.write(record, total_steps)
        self._warn(record)
        name = self.job.config.evaluate.best_metric
        loss = {} if record.eval_loss is None else {"eval_loss": record.eval_loss}
        self.scores[record.step] = {**loss, **record.scores}
        value = record.eval_loss if name == "loss" else record.scores.get(name)
        if value is None:
            return state
        sign = -1 if name == "loss" or self.job.family.score_names[name] == "min" else 1
        if state.best_value is None or sign * (value - state.best_value) > 0:
            return replace(state, best_step=state.step, best_value=value, rounds_without_better=0)
        return replace(state, rounds_without_better=state.rounds_without_better + 1)

    def _record(self, step: int) -> EvaluationRecord:
        started = time.monotonic()
        losses: dict[str, float] = {}
        weights = self.job.config.train.head_weights
        if self.job.eval_set is not None:
            size = self.job.config.evaluate.batch_size
            losses = evaluation_losses(self.objective, self.job.eval_set, size, self.accelerator)
            ids = [sample.id for sample in self.job.eval_set.samples]
            guards.check_losses(losses, f"evaluation after step {step}", ids)
        loss = sum(weights.get(head, 1.0) * value for head, value in losses.items()) if losses else None
        scores = self._generated_scores(step)
        seconds = time.monotonic() - started
        self.spent += seconds
        share = self.spent / max(time.monotonic() - self.started, 1e-9)
        return EvaluationRecord(step, loss, losses, scores, seconds, share)

    def _generated_scores(self, step: int) -> dict[str, float]:
        generator, scores = self.job.sample_generator, {}
        if generator is None:
            return {}
        if self._main:
            precision = self.job.precision
            with torch.autocast(precision.device.type, precision.autocast, enabled=precision.autocast is not None):
                scores, outputs = generator.generate(self.job.model, step)
            log_answers(self.accelerator, outputs, step)
        return self._told(scores)

    @property
    def _main(self) -> bool:
        return self.accelerator.is_main_process

    def _told(self, value: Any) -> Any:
        """What the main process has."""
        return broadcast_object_list([value])[0] if self.accelerator.num_processes > 1 else value

    def _warn(self, record: EvaluationRecord) -> None:
        found = self.job.family.score_warnings(record.scores, self.base_scores)
        if self._main and found:
            for message in found:
                log.warning("step %d: %s", record.step, message)
            add_warnings(self.job.config.output_dir, record.step, "evaluation", found)


@torch.no_grad()
def evaluation_losses(
    objective: nn.Module, eval_set: EncodedSet, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """Summed losses over target counts, so that the batch size does not change the result.

    Args:
        objective: returns a loss and the summed losses per head; put into evaluation mode meanwhile.
        eval_set: each sample is taken once.
        batch_size: samples per rank and forward pass.
        accelerator: knows the ranks and the device.
    """
    family = eval_set.family
    was_training = objective.training
    objective.eval()
    sums, counts = [], []
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mine, most = (evaluation_batches(eval_set.lengths, batch_size, one, ranks) for one in (rank, 0))
    # A rank whose share ran out takes the first rank's batch along for nothing: sharded weights need all in every pass.
    for number, indices in enumerate([*mine, *most[len(mine) :]]):
        batch = family.collate([eval_set[i] for i in indices]).to(accelerator.device)
        _, found = objective(batch, dict.fromkeys(batch.target_counts, 1.0))
        if number >= len(mine):
            continue
        sums.append({head: float(value) for head, value in found.items()})
        counts.append({head: float(batch.target_counts[head]) for head in found})
    objective.train(was_training)
    total, targets = (sum_heads(accelerator, values, family.heads) for values in (sums, counts))
    return {head: value / targets[head] for head, value in total.items()}

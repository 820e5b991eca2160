"""Evaluation during a run: losses on the evaluation set, scores of generated samples, the best step so far."""

import json
import logging
import math
from dataclasses import dataclass, field, replace

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
from speechtune.training.tracking import EvaluationRecord, Stopwatch, Tracker, add_warnings, log_samples

log = logging.getLogger("speechtune")


@dataclass
class Evaluator:
    """Evaluates on all ranks together; samples are generated on the main process.

    `objective` is model and loss, unwrapped; of the run's `watch` the part "evaluation" grows.
    """

    job: Job
    accelerator: Accelerator
    objective: nn.Module
    tracker: Tracker
    watch: Stopwatch
    base_scores: dict[str, float] = field(default_factory=dict)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)

    def evaluate_base(self, first_step: int, total_steps: int) -> None:
        """Generate samples before the first step, and score them: what training must improve on.

        A fresh adapter changes nothing yet, and one that goes on from another starts with what that one knows.
        """
        generator, main = self.job.sample_generator, self.accelerator.is_main_process
        if generator is None:
            return
        file = self.job.config.output_dir / "samples" / "base_scores.json"
        # The main process decides for all: the others may not see its disk.
        known = json.loads(file.read_text(encoding="utf-8")) if main and file.is_file() else None
        known = broadcast_object_list([known])[0]
        if known is not None:  # a resumed run
            self.base_scores = known
            return
        if main:
            log_samples(self.accelerator, generator.write_references(), BASE_STEP, "recordings")
        if first_step > 0:
            log.warning("no samples were generated before the first step of this run: there are no base scores")
            return
        steps = total_steps - first_step
        rounds = 1 + math.ceil(steps / self.job.config.evaluate.every_steps)
        log.info(
            "evaluation: %d prompts are answered before the first step and in %d rounds of the %d steps; lower its "
            "cost with evaluate.prompts (0: none) or evaluate.every_steps",
            *(len(generator.chosen), rounds - 1, steps),
        )
        record = self._record(BASE_STEP)
        seconds = record.eval_seconds
        log.info("evaluation: this round took %.0f s; all %d take about %.0f s", seconds, rounds, rounds * seconds)
        self.base_scores = dict(record.scores)
        if main:
            file.write_text(json.dumps(self.base_scores) + "\n", encoding="utf-8")
        self.tracker.write(record, total_steps)

    def evaluate(self, state: RunState, total_steps: int) -> RunState:
        """Evaluate after a step; the state returned knows whether it is the best so far."""
        record = self._record(state.step)
        self.tracker.write(record, total_steps)
        messages = self.job.family.score_warnings(record.scores, self.base_scores)
        if self.accelerator.is_main_process and messages:
            for message in messages:
                log.warning("step %d: %s", record.step, message)
            add_warnings(self.job.config.output_dir, record.step, "evaluation", messages)
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
        generator, plan = self.job.sample_generator, self.job.precision
        losses, scores = dict[str, float](), dict[str, float]()
        with self.watch.measure("evaluation"):
            if self.job.eval_set is not None:
                size = self.job.config.evaluate.batch_size
                losses = evaluation_losses(self.objective, self.job.eval_set, size, self.accelerator)
                ids = [sample.id for sample in self.job.eval_set.samples]
                guards.check_losses(losses, f"evaluation after step {step}", ids)
            if generator is not None and self.accelerator.is_main_process:
                with torch.autocast(plan.device.type, plan.autocast, enabled=plan.autocast is not None):
                    scores, outputs = generator.generate(self.job.model, step)
                log_samples(self.accelerator, outputs, step)
            scores = broadcast_object_list([scores])[0]
        seconds = self.watch.seconds()
        share = seconds["evaluation_seconds"] / max(seconds["total_seconds"], 1e-9)
        loss = self.job.weighted(losses) if losses else None
        return EvaluationRecord(step, loss, losses, scores, self.watch.last["evaluation"], share)


@torch.no_grad()
def evaluation_losses(
    objective: nn.Module, eval_set: EncodedSet, batch_size: int, accelerator: Accelerator
) -> dict[str, float]:
    """Mean loss per head: sums over all samples and ranks, divided by target counts, so that batch sizes do not matter.

    `batch_size` are samples per rank and forward pass; `objective` is put into evaluation mode meanwhile.
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
        _, batch_sums = objective(batch, dict.fromkeys(batch.target_counts, 1.0))
        if number < len(mine):
            sums.append({head: float(value) for head, value in batch_sums.items()})
            counts.append({head: float(batch.target_counts[head]) for head in batch_sums})
    objective.train(was_training)
    total, targets = (sum_heads(accelerator, values, family.heads) for values in (sums, counts))
    return {head: value / targets[head] for head, value in total.items()}

"""Tracking: records of steps and evaluations go to metrics.jsonl, the console, and accelerate's trackers."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

from speechtune.audio import resample
from speechtune.types import Audio, Batch, Output

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger("speechtune")

WARNINGS_NAME = "warnings.jsonl"
MEL_RANGE_DB = 70.0


@dataclass(frozen=True, slots=True)
class Record:
    """Measurements of one optimizer step over all ranks.

    `losses` are means over the step's targets, per head; rates count the real targets' audio and real positions.
    """

    step: int
    epoch: float
    loss: float
    losses: Mapping[str, float]
    learning_rate: float
    grad_norm: float
    audio_seconds_per_second: float
    tokens_per_second: float
    data_wait_share: float
    eta_seconds: float


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One evaluation after `step` steps: mean losses over the evaluation set, and scores of answers to some prompts.

    `eval_loss` is None without evaluation data; `time_share` is evaluation's share of the run's time so far.
    """

    step: int
    eval_loss: float | None
    eval_losses: Mapping[str, float]
    scores: Mapping[str, float]
    eval_seconds: float
    time_share: float


class Stopwatch:
    """Seconds of this launch, by what they went into."""

    def __init__(self, *parts: str) -> None:
        self.started = time.monotonic()
        self.spent = dict.fromkeys(parts, 0.0)
        self.last: dict[str, float] = {}

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.last[part] = time.monotonic() - started
        self.spent[part] += self.last[part]

    def seconds(self) -> dict[str, float]:
        """Seconds per part so far, and in all."""
        parts = {f"{part}_seconds": seconds for part, seconds in self.spent.items()}
        return {**parts, "total_seconds": time.monotonic() - self.started}


class Tracker:
    """Writes records on the main process; on other ranks it does nothing."""

    def __init__(self, accelerator: Accelerator, output_dir: Path, log_every_steps: int, resume_step: int) -> None:
        self.accelerator = accelerator
        self.log_every_steps = log_every_steps
        self.path = output_dir / "metrics.jsonl"
        if accelerator.is_main_process:
            keep_until(self.path, resume_step)
            keep_until(output_dir / WARNINGS_NAME, resume_step)
            self.path.touch()

    def past_scores(self) -> dict[int, dict[str, float]]:
        """Loss and scores of the evaluations before a resume, by step; empty on other ranks than the main one."""
        scores: dict[int, dict[str, float]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.accelerator.is_main_process else ():
            record = json.loads(line)
            if "scores" in record:
                loss = {} if record["eval_loss"] is None else {"eval_loss": record["eval_loss"]}
                scores[record["step"]] = {**loss, **record["scores"]}
        return scores

    def write(self, record: Record | EvaluationRecord, total_steps: int) -> None:
        """Write one record everywhere it goes."""
        if not self.accelerator.is_main_process:
            return
        values = asdict(record)
        append_lines(self.path, [values])
        self.accelerator.log(flatten(values), step=record.step)
        if isinstance(record, EvaluationRecord):
            loss = "" if record.eval_loss is None else f"  loss {record.eval_loss:.4f} ({heads(record.eval_losses)})"
            scores = f"  {heads(_shortened(record.scores))}" if record.scores else ""
            cost = f"{record.eval_seconds:.1f} s, {record.time_share:.0%} of the run's time so far"
            log.info("step %d evaluation:%s%s  (%s)", record.step, loss, scores, cost)
        elif record.step % self.log_every_steps == 0 or record.step in (1, total_steps):
            loss = f"loss {record.loss:.4f} ({heads(record.losses)})"
            update = f"lr {record.learning_rate:.2e}  grad {record.grad_norm:.3g}"
            speed = f"{record.audio_seconds_per_second:.0f} audio s/s  {duration(record.eta_seconds)} left"
            log.info("step %d/%d  %s  %s  %s", record.step, total_steps, loss, update, speed)


def log_samples(accelerator: Accelerator, outputs: Sequence[Output], step: int, group: str = "answers") -> None:
    """Send generated samples to TensorBoard: sound with its log-mel picture, and text."""
    if "tensorboard" not in {tracker.name for tracker in accelerator.trackers}:
        return
    board = cast(Any, accelerator.get_tracker("tensorboard", unwrap=True))
    for output in outputs:
        tag = f"{group}/{output.sample_id}"
        if output.text is not None:
            board.add_text(tag, output.text, step)
        if output.audio is not None and len(output.audio.samples):
            board.add_audio(tag, output.audio.samples[None], step, sample_rate=output.audio.sampling_rate)
            board.add_image(f"{tag} (mel)", mel_picture(output.audio), step, dataformats="HW")


def mel_picture(audio: Audio) -> np.ndarray:
    """Log-mel picture, uint8 of shape (bands from high to low, frames of 10 ms), 0 at `MEL_RANGE_DB` below the loudest.

    64 HTK mel bands up to 8 kHz; Hann windows of 32 ms.
    """
    rate, window, hop, bands = 16_000, 512, 160, 64
    fft = 2 * window  # with as many points as the window has, low bands would lie between two bins
    decibels = spectrogram(
        resample(audio, rate).samples,
        *(window_function(window), window, hop, fft),
        power=2.0,
        pad_mode="constant",
        mel_filters=mel_filter_bank(fft // 2 + 1, bands, 0.0, rate / 2, rate),
        log_mel="dB",
        db_range=MEL_RANGE_DB,
    )
    level = (decibels - decibels.max()) / MEL_RANGE_DB + 1
    return np.round(level[::-1] * 255).astype(np.uint8)


def add_warnings(output_dir: Path, step: int, kind: str, messages: list[str]) -> None:
    """Keep warnings, or the error that stopped the run (kind "guard"), for the report."""
    append_lines(output_dir / WARNINGS_NAME, [{"step": step, "kind": kind, "message": message} for message in messages])


def append_lines(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    """Append records to a file of the run, as JSON lines; a folder that was deleted meanwhile is made again."""
    for last_try in (False, False, True):  # who deletes a folder may still be at it
        try:
            if not path.exists():
                log.error("%s: deleted while the run goes on; made again, what was in it is lost", path.parent)
                path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)
            return
        except (FileNotFoundError, FileExistsError):  # the latter: there for `mkdir`, and gone a moment later
            if last_try:
                raise


def log_details(every: int | None, step: int, batches: Sequence[Batch]) -> None:
    """Every so many steps, log positions, targets and samples of each micro-batch."""
    for batch in batches if every is not None and step % every == 0 else ():
        counts = " ".join(f"{head} {count:.0f}" for head, count in batch.target_counts.items())
        log.info("step %d: %d positions, targets %s, %s", step, batch.num_tokens, counts, ", ".join(batch.sample_ids))


def keep_until(path: Path, step: int) -> None:
    """Drop the records after `step`, and a torn last line: a resumed run writes them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    path.write_text("".join(kept), encoding="utf-8")


def flatten(values: Mapping[str, object]) -> dict[str, object]:
    """Nested mappings become `name/key`, which trackers show as a group."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}/{key}": inner for key, inner in value.items()})
        elif name != "step":
            flat[name] = value
    return flat


def heads(values: Mapping[str, float]) -> str:
    """Values per head for a console line."""
    return " ".join(f"{head} {value:.4f}" for head, value in values.items())


def _shortened(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores with those numbered `name_0`, `name_1` ... replaced by their mean."""
    groups: dict[str, list[float]] = {}
    for name, value in scores.items():
        groups.setdefault(name.rstrip("0123456789").rstrip("_"), []).append(value)
    return {name: sum(values) / len(values) for name, values in groups.items()}


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def configure_logging(main_process: bool = True) -> None:
    """Send the `speechtune` logger to the console: plain lines, from the main process only.

    Libraries show progress bars on terminals only; a notice about transformers' own attribute names is silenced.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if main_process else logging.ERROR)
    log.propagate = False

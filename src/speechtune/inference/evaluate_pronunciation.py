"""Evaluate pronunciation assessment: a model's answers to labelled recordings, measured; resumable."""

import importlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from speechtune.cache.encode import ClipHasher
from speechtune.config import DataConfig
from speechtune.data.sources import Source, find_source, load_samples, read_source
from speechtune.errors import ConfigError, ManifestError
from speechtune.inference.answer_file import AnswerFile, model_identity
from speechtune.inference.load import open_adapter
from speechtune.inference.score import answer_by_length, assessor
from speechtune.storage.lock import locked
from speechtune.tasks.pronunciation.evaluation import EvaluationReport, evaluate_answers
from speechtune.tasks.pronunciation.targets import TASKS, task_of, task_samples
from speechtune.tasks.results import write_results
from speechtune.types import Sample

log = logging.getLogger("speechtune")

ANSWERS_NAME = "answers.jsonl"
PACKAGES = ("scipy", "jiwer")
NO_DATA = "no pronunciation data: name a Speechocean762 folder, its parquet copy, or JSONL with tasks"


def training_samples(data: Path, train: Path | None, config: DataConfig) -> list[Sample]:
    """The data whose mean scores are the baseline: named, or the training split that lies beside `data`.

    Its audio is not opened. Rows with issues are left out, with a warning.
    """
    source = _beside(data) if train is None else find_source(train)
    if source is None:
        if train is not None:
            raise ConfigError(f"--train {train}: {NO_DATA}")
        return []
    result = read_source(source, None if source.format == "jsonl" else source.split or "train", config)
    if result.issues:
        log.warning("%s: %d issues; they are left out of the baseline", source.path, len(result.issues))
    if train is not None and not result.samples:
        listed = "\n".join(f"  {issue}" for issue in result.issues[:20])
        raise ManifestError(f"--train {train}: no valid row for the baseline\n{listed}", tuple(result.issues))
    return result.samples


def _beside(data: Path) -> Source | None:
    """The corpus that `data` is a split of, where it has a training split."""
    own = find_source(data)
    if own is None or own.format == "jsonl":
        return None
    for place in (own.path, own.path.parent):  # a split of the hub's copy is a file or folder in it
        corpus = find_source(place)
        if corpus is None or corpus.format != own.format or "train" not in corpus.splits:
            continue
        if corpus.format == "hub" or (corpus.path / "train").is_dir():
            return replace(corpus, split="train")
    return None


def _task_samples(data: Path, tasks: Sequence[str]) -> list[Sample]:
    wanted = tuple(task for task in TASKS if not tasks or task in tasks)
    labelled = load_samples(data, DataConfig(), default_split="test")
    samples = [sample for sample in task_samples(labelled, dict.fromkeys(wanted, 1.0), 0) if task_of(sample) in wanted]
    if not samples:
        raise ConfigError(f"{data}: holds no {' or '.join(wanted)} samples; see --tasks")
    return samples


def evaluate_pronunciation(
    data: Path,
    *,
    train: Path | None = None,
    model: str | None = None,
    adapter: Path | None = None,
    strength: float = 1.0,
    model_options: Mapping[str, str] | None = None,
    out: Path,
    cache_dir: Path = Path("speechtune-cache"),
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    tasks: Sequence[str] = (),
) -> EvaluationReport:
    """Answer labelled recordings and measure the answers; writes answers.jsonl, metrics.json and utterances.jsonl.

    Args:
        data: labelled recordings; a folder with two splits gives its `test`.
        train: data of the mean scores, as for `training_samples`.
        model: hub id or folder; None takes the one the adapter names.
        adapter: adapter, run or checkpoint folder.
        strength: how much of the adapter counts.
        model_options: as for `model_config`.
        out: folder of the files written.
        cache_dir: folder of the encoded clips.
        batch_size: recordings at a time; it does not change the answers.
        max_new_tokens: length cap of an answer.
        tasks: APA, MDD; none means both.

    Raises ConfigError: the data or the model is not for assessment; ManifestError: issues in the data;
    ModuleNotFoundError: scipy or jiwer is not installed.
    """
    if find_source(data) is None:
        raise ConfigError(f"{data}: {NO_DATA}")
    for module in PACKAGES:  # a missing one is reported before hours of answering
        importlib.import_module(module)
    samples = _task_samples(data, tasks)
    trained = training_samples(data, train, DataConfig())
    stored = open_adapter(adapter, strength) if adapter else None
    config, family, loaded = assessor(model, stored, model_options)
    identity = model_identity(config, family, stored) | {"max_new_tokens": max_new_tokens}
    with locked(out):
        answers = AnswerFile(out / ANSWERS_NAME, identity)
        hasher = ClipHasher(cache_dir)
        keys = {sample.id: f"{task_of(sample)} {hasher(sample.audio)}" for sample in samples if sample.audio}
        asked = list({key: sample for sample in samples if (key := keys[sample.id]) not in answers.texts}.values())
        ask = partial(answer_by_length, family, loaded, asked, cache_dir)
        for output in ask(batch_size=batch_size, max_tokens=max_new_tokens) if asked else ():
            answers.add(keys[output.sample_id], output.sample_id, output.text or "")
        report = evaluate_answers(samples, [answers.texts[keys[sample.id]] for sample in samples], trained)
        report = replace(report, strength=strength if stored else None)
        write_results(report.to_json(), report.rows, out)
    return report

"""The verb `evaluate`: a model's answers to labelled recordings, measured; an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from speechtune.config import DataConfig, RunConfig
from speechtune.datasets import find_source, load_samples
from speechtune.errors import ConfigError
from speechtune.evaluation import EvaluationReport, evaluate_answers, print_evaluation, write_evaluation
from speechtune.families.base import Sample
from speechtune.fingerprint import file_sha256, folder_fingerprint
from speechtune.score import answer_by_length, assessor
from speechtune.stored_adapter import adapter_folder, weights_file

log = logging.getLogger("speechtune")

ANSWERS_NAME = "answers.jsonl"


class AnswerFile:
    """Answers on disk, one line each behind a line that says whose they are; answers of another model are put aside."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        self.texts: dict[str, str] = {}
        head = json.dumps({"answers of": identity}, sort_keys=True)
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        if lines and lines[0] == head:
            for line in lines[1:-1]:  # behind the last newline stands nothing, or a line torn by a kill
                row = json.loads(line)
                self.texts[row["id"]] = row["text"]
            path.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
            log.info("%s: %d answers of the same model are taken over", path, len(self.texts))
            return
        if lines:
            os.replace(path, path.with_suffix(".old.jsonl"))
            log.warning("%s: answers of another model or data; moved to %s", path, path.with_suffix(".old.jsonl"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + "\n", encoding="utf-8")

    def add(self, sample_id: str, text: str) -> None:
        """Keep one answer."""
        self.texts[sample_id] = text
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"id": sample_id, "text": text}) + "\n")


def answerer(config: RunConfig, adapter: Path | None) -> dict[str, Any]:
    """Who answers: the base by path, revision and (local, without adapter) content, the adapter by content."""
    model, folder = config.model, Path(config.model.path)
    who: dict[str, Any] = {"model": model.path, "revision": model.revision}
    if adapter is not None:
        return who | {"adapter": file_sha256(weights_file(adapter_folder(adapter)))}
    return who | {"content": folder_fingerprint(folder) if folder.is_dir() else None}


def _digest(samples: Sequence[Sample]) -> str:
    rows = [[sample.id, str(sample.audio), sample.text] for sample in samples]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def training_samples(data: Path, train: Path | None, config: DataConfig) -> list[Sample]:
    """The data whose mean scores are the baseline: named, or the training split that lies beside `data`."""
    if train is not None:
        return load_samples(train, config)
    source = find_source(data)
    beside = {"folder": source.path / "train", "hub": source.path}.get(source.format) if source else None
    found = find_source(beside) if beside is not None and source and source.path.is_dir() else None
    return load_samples(beside, config) if beside is not None and found and "train" in found.splits else []


def evaluate(
    data: Path,
    *,
    train: Path | None = None,
    model: str | None = None,
    adapter: Path | None = None,
    out: Path,
    cache_dir: Path = Path("speechtune-cache"),
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    tasks: Sequence[str] = (),
) -> EvaluationReport:
    """Answer labelled recordings and measure the answers; writes answers, metrics and the table per utterance.

    Args:
        data: labelled recordings; a folder with two splits gives its `test`.
        train: what the mean scores come from; None looks beside `data`.
        model: hub id or folder; None takes the one the adapter names.
        adapter: adapter, run or checkpoint folder.
        out: where answers.jsonl, metrics.json and utterances.jsonl go.
        cache_dir: folder of the encoded clips.
        batch_size: recordings at a time; it does not change the answers.
        max_new_tokens: length cap of an answer.
        tasks: APA, MDD; none means both.

    Raises:
        ConfigError: the data is not for assessment.
        ManifestError: faults in the data.
    """
    if find_source(data) is None:
        raise ConfigError(
            f"{data}: no pronunciation data: a Speechocean762 folder, its parquet copy, or JSONL with tasks"
        )
    config, family, loaded = assessor(model, adapter)
    labelled = load_samples(data, DataConfig(), default_split="test")
    samples = [s for s in family.expand(labelled) if not tasks or s.extra["task"] in tasks]
    identity = answerer(config, adapter) | {"max_new_tokens": max_new_tokens, "data": _digest(samples)}
    answers = AnswerFile(out / ANSWERS_NAME, identity)
    asked = [sample for sample in samples if sample.id not in answers.texts]
    if asked:
        outputs = answer_by_length(family, loaded, asked, cache_dir, batch_size=batch_size, max_tokens=max_new_tokens)
        for output in outputs:
            answers.add(output.sample_id, output.text or "")
    texts = [answers.texts[sample.id] for sample in samples]
    report = evaluate_answers(samples, texts, training_samples(data, train, DataConfig()))
    write_evaluation(report, out)
    return report


def run_evaluate(*, as_json: bool = False, **options: Any) -> int:
    """Evaluate and print the table, or with `as_json` what metrics.json holds; 0."""
    report = evaluate(**options)
    if as_json:
        print(json.dumps(report.to_json(), ensure_ascii=False))
    else:
        print_evaluation(report, Console())
    return 0

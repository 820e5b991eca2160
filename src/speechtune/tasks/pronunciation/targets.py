"""Pronunciation assessment as two tasks per utterance: scores (APA) and what was really said (MDD).

A task sample is a `Sample` whose `extra` holds `task` and either `labels` (from a corpus with human labels) or `target`
(the answer itself, from plain JSONL). The answer is made late, from what stands there: real JSON with fixed keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from speechtune.errors import ConfigError, ManifestError
from speechtune.types import Sample

Task = Literal["APA", "MDD"]
TASKS: tuple[Task, ...] = ("APA", "MDD")
SCORE_FIELDS = ("accuracy", "fluency", "prosodic", "total")
"""Keys of an APA answer, in order; each a whole number from 0 to 10."""
TRANSCRIPT_FIELDS = ("word_transcript", "phoneme_transcript")
"""Keys of an MDD answer, in order; phones are base phones with blanks between them."""
FIELDS: Mapping[Task, tuple[str, ...]] = {"APA": SCORE_FIELDS, "MDD": TRANSCRIPT_FIELDS}


def is_utterance(sample: Sample) -> bool:
    """Whether a sample carries human labels of pronunciation and no task yet."""
    return "labels" in sample.extra and "task" not in sample.extra


def task_samples(samples: Sequence[Sample], shares: Mapping[str, float], seed: int) -> list[Sample]:
    """Turn each labelled utterance into one sample per task, "ID#APA" and "ID#MDD"; other samples stay as they are.

    Args:
        samples: utterances with labels, and task samples.
        shares: per task the share (0 to 1) of the utterances that give a sample of it, chosen by seed and id.
        seed: of that choice.

    Raises:
        ConfigError: a share of an unknown task.
    """
    if unknown := sorted(set(shares) - set(TASKS)):
        raise ConfigError(f"data.tasks: no task {unknown[0]!r}; there are: {', '.join(TASKS)}")
    result: list[Sample] = []
    for sample in samples:
        if not is_utterance(sample):
            result.append(sample)
            continue
        for task in TASKS:
            digest = hashlib.sha256(f"{seed}:{task}:{sample.id}".encode()).digest()
            if int.from_bytes(digest[:8], "big") < shares.get(task, 0.0) * 2**64:
                result.append(replace(sample, id=f"{sample.id}#{task}", extra={**sample.extra, "task": task}))
    return result


def task_of(sample: Sample) -> Task:
    """The task of a task sample.

    Raises:
        ManifestError: it has none, or an unknown one.
    """
    task = sample.extra.get("task")
    if task not in TASKS:
        raise ManifestError(f"{sample.source or sample.id}: task {task!r} is none of {', '.join(TASKS)}")
    return task


def target_of(sample: Sample) -> dict[str, Any]:
    """The right answer to a task sample: whole-number scores, or words in lower case and realised phones.

    Raises:
        ManifestError: neither a target nor labels.
    """
    task = task_of(sample)
    given, labels = sample.extra.get("target"), sample.extra.get("labels")
    if given is not None:
        return {name: given[name] for name in FIELDS[task]}
    if labels is None:
        raise ManifestError(f"{sample.source or sample.id}: neither a target nor labels to learn from")
    if task == "APA":
        return {name: round(labels["scores"][name]) for name in SCORE_FIELDS}
    phones = [phone for word in labels["words"] for phone in word["realised"]]
    return {"word_transcript": sample.text.lower(), "phoneme_transcript": " ".join(phones)}


def canonical_phones(sample: Sample) -> list[str] | None:
    """The phones the text asks for, or None where the sample does not say."""
    labels = sample.extra.get("labels")
    return None if labels is None else [phone for word in labels["words"] for phone in word["phones"]]


def render_answer(answer: Mapping[str, Any]) -> str:
    """An answer as the JSON text a model learns to give."""
    return json.dumps(answer, ensure_ascii=False)

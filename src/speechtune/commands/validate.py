"""The verb `validate`: all issues of a manifest and what it holds, as tables or JSON."""

import math
import unicodedata
from bisect import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from speechtune.commands import print_json, wide_console
from speechtune.config import DataConfig
from speechtune.data.audio_checks import Progress, check_audio
from speechtune.data.manifest import read_samples
from speechtune.data.row_parser import ReadResult
from speechtune.data.rows import Split
from speechtune.data.sources import find_source, read_source
from speechtune.errors import Issue, printable
from speechtune.tasks.pronunciation.targets import MAX_CLIP_SECONDS, SCORE_FIELDS
from speechtune.types import AudioRef, Pronunciation, Sample

DURATION_EDGES_SECONDS = (0, 1, 2, 5, 10, 15, 20, 30, 60)
"""Lower edges of the duration histogram; the last bin is open."""

_ISSUES_SHOWN = 50
_GROUPS_SHOWN = 20
_SCRIPT_NAMES = {"CJK": "Chinese characters", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}


@dataclass(frozen=True, slots=True)
class Report:
    """What `validate` found; `issues` empty means that training accepts the manifest."""

    path: Path
    issues: list[Issue]
    statistics: dict[str, Any]
    notes: list[str]


def validate(path: Path, config: DataConfig, deep: bool = False, progress: Progress | None = None) -> Report:
    """Read data of any kind and check its audio: headers, or with `deep` every decoded sample.

    Raises ManifestError: there is no such file, or it is of no known layout; ModuleNotFoundError: pyarrow, which the
    hub's copy of Speechocean762 needs, is not installed.
    """
    source = find_source(path)
    results: dict[Split | None, ReadResult]
    if source is None:
        results = {None: read_samples(path, config)}
    else:  # a parquet file that names no split is read as training data
        splits: tuple[Split | None, ...] = source.splits or (None if source.format == "jsonl" else "train",)
        results = {split: read_source(source, split, config) for split in splits}
    samples = [sample for result in results.values() for sample in result.samples]
    check = check_audio(samples, config, deep, progress, MAX_CLIP_SECONDS if source else math.inf)
    issues = [issue for result in results.values() for issue in result.issues] + check.issues
    if source is None:
        issues.sort(key=lambda issue: issue.row)
    if "train" in results and "test" in results:
        issues += _overlaps(results["train"].samples, results["test"].samples)
    notes = [note for result in results.values() for note in result.notes]
    notes += check.notes
    if check.num_not_fetched:
        notes.append(f"{check.num_not_fetched} clip(s) given as URL were not fetched; a deep check fetches them")
    bad = {(issue.source, issue.sample_id, issue.row) for issue in issues}

    def valid(samples: Sequence[Sample]) -> list[Sample]:
        return [sample for sample in samples if (sample.source, sample.id, sample.row) not in bad]

    values = statistics(valid(samples), check.durations) | {"num_rows": sum(one.num_rows for one in results.values())}
    if source is not None and source.format == "jsonl":
        values["tasks"] = dict(Counter(sample.pronunciation.task for sample in valid(samples) if sample.pronunciation))
    elif source is not None:
        values["pronunciation"] = {split: label_statistics(valid(one.samples)) for split, one in results.items()}
    return Report(path, issues, values, notes)


def statistics(samples: Sequence[Sample], durations: Mapping[AudioRef, float]) -> dict[str, Any]:
    """Counts, hours, speakers, languages and the duration histogram of the targets.

    `durations` in seconds, from `check_audio`; a target that is not in it counts as unknown.
    """
    seconds = [durations[s.audio] for s in samples if s.audio is not None and s.audio in durations]
    histogram = Counter(bisect(DURATION_EDGES_SECONDS, value) - 1 for value in seconds)
    bins = [f"{low}-{high}" for low, high in pairwise(DURATION_EDGES_SECONDS)] + [f"{DURATION_EDGES_SECONDS[-1]}+"]
    return {
        "num_samples": len(samples),
        "hours": round(sum(seconds) / 3600, 4),
        "unknown_durations": len(samples) - len(seconds),
        "with_reference": sum(bool(sample.references) for sample in samples),
        "without_reference": sum(not sample.references for sample in samples),
        "speakers": dict(Counter(sample.speaker or "(not given)" for sample in samples).most_common()),
        "languages": dict(Counter(sample.language or guess_script(sample.text) for sample in samples).most_common()),
        "duration_histogram": {name: histogram[index] for index, name in enumerate(bins)},
    }


def label_statistics(samples: Sequence[Sample]) -> dict[str, Any]:
    """Counts of utterances, words, phones and errors, score histograms, and speakers by gender and age in years.

    `samples` as `read_speechocean` gives them. `prevalence` is the share of phones with an annotated
    mispronunciation; scores are binned to whole numbers, downwards.
    """
    labels = [sample.pronunciation or Pronunciation() for sample in samples]
    words = [word for one in labels for word in one.words]
    phones = Counter(phone for word in words for phone in word.phones)
    said = Counter(item.pronounced for word in words for item in word.mispronunciations)
    scores: dict[str, Counter[int]] = {name: Counter() for name in (*SCORE_FIELDS, "completeness")}
    for one in labels:
        for name, value in one.scores.items():
            scores[name][math.floor(value)] += 1
    people = {sample.speaker: one for sample, one in zip(samples, labels, strict=True)}
    ages = sorted(one.age for one in people.values() if one.age is not None)
    return {
        "utterances": len(samples),
        "speakers": len(people),
        "words": len(words),
        "phones": phones.total(),
        "mispronounced": said.total(),
        "prevalence": round(said.total() / max(phones.total(), 1), 5),
        "scores": {name: {str(k): counts[k] for k in sorted(counts)} for name, counts in scores.items() if counts},
        "phone_counts": dict(phones.most_common()),
        "pronounced_counts": dict(said.most_common()),
        "genders": dict(Counter(one.gender or "(not given)" for one in people.values()).most_common()),
        "ages": {str(age): count for age, count in Counter(ages).items()},
    }


def guess_script(text: str) -> str:
    """Most frequent script of the letters of `text`, from their Unicode names, e.g. "Latin script"."""
    scripts = Counter(map(_script, text))
    scripts.pop("", None)
    return scripts.most_common(1)[0][0] if scripts else "no letters"


def print_report(report: Report, console: Console) -> None:
    """Print notes, statistics and issues as tables."""
    values = report.statistics
    console.print(Text(str(report.path)))
    table = Table("what", "value")
    table.add_row("rows / valid samples", f"{values['num_rows']} / {values['num_samples']}")
    table.add_row("hours of target audio", f"{values['hours']:.2f}")
    table.add_row("with / without reference", f"{values['with_reference']} / {values['without_reference']}")
    for name in ("speakers", "languages"):
        groups = list(values[name].items())
        lines = [f"{group}: {count}" for group, count in groups[:_GROUPS_SHOWN]]
        lines += [f"... and {len(groups) - _GROUPS_SHOWN} more"] if len(groups) > _GROUPS_SHOWN else []
        table.add_row(f"{name} ({len(groups)})", Text("\n".join(lines)))
    lines = [f"{name:>9} s: {count}" for name, count in values["duration_histogram"].items() if count]
    table.add_row("durations", Text("\n".join(lines)))
    if "tasks" in values:
        table.add_row("tasks", Text("\n".join(f"{task}: {count}" for task, count in values["tasks"].items())))
    for split, labels in values.get("pronunciation", {}).items():
        table.add_row(split, Text("\n".join(_label_lines(labels))))
    console.print(table)
    for note in report.notes:
        console.print(Text(f"note: {note}"))
    if not report.issues:
        console.print("no issues", style="green")
        return
    console.print(f"{len(report.issues)} issue(s)", style="bold red")
    issues = Table("where", "sample", "issue", "message")
    for issue in report.issues[:_ISSUES_SHOWN]:
        issues.add_row(*map(Text, (issue.source, issue.sample_id, issue.code, issue.message)))
    console.print(issues)
    if len(report.issues) > _ISSUES_SHOWN:
        kinds = Counter(issue.code for issue in report.issues).most_common()
        counts = ", ".join(f"{count} {code}" for code, count in kinds)
        console.print(Text(f"... and {len(report.issues) - _ISSUES_SHOWN} more; in all: {counts}"))


def _overlaps(train: Sequence[Sample], test: Sequence[Sample]) -> list[Issue]:
    """Issues of test utterances whose id or speaker also stands in the training split: no test of unseen voices."""
    ids, speakers = {sample.id for sample in train}, {sample.speaker for sample in train}
    issues: list[Issue] = []
    for sample in test:
        what = "utterance" if sample.id in ids else f"speaker {sample.speaker}" if sample.speaker in speakers else ""
        if what:
            reason = f"the {what} also stands in the training split"
            issues.append(Issue(sample.source, sample.id, "split_overlap", printable(reason), sample.row))
    return issues


def _label_lines(values: Mapping[str, Any]) -> list[str]:
    """One split's labels for people: counts, then one line per histogram."""
    errors = f"{values['mispronounced']} of {values['phones']} ({values['prevalence']:.2%})"
    lines = [f"{values['utterances']} utterances, {values['speakers']} speakers, {values['words']} words"]
    lines.append(f"mispronounced phones: {errors}")
    groups = {name: values[name] for name in ("genders", "ages", "pronounced_counts", "phone_counts")}
    for name, counts in {**values["scores"], **groups}.items():
        shown = "  ".join(f"{value}: {count}" for value, count in counts.items())
        lines.append(f"{name.replace('_', ' ')}  {shown or '-'}")
    return lines


@lru_cache(maxsize=65536)
def _script(character: str) -> str:
    if not character.isalpha():
        return ""
    word = unicodedata.name(character, "").partition(" ")[0]
    return _SCRIPT_NAMES.get(word, f"{word.title()} script" if word else "")


def run_validate(manifest: Path, *, metadata_only: bool, as_json: bool, **limits: Any) -> int:
    """Validate a data file, and print what was found; 0, or 2 where a row is invalid.

    `limits` are fields of `DataConfig`: audio_root, allow_urls, min_seconds, max_seconds.
    """
    report = validate(manifest, DataConfig(**limits), deep=not metadata_only)
    if as_json:
        print_json(asdict(report), indent=2)
    else:
        print_report(report, wide_console())
    return 2 if report.issues else 0

"""Data of any kind -> samples ready for training: voice-cloning manifests and the formats of pronunciation data."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from speechtune.config import DataConfig, Paths
from speechtune.data import manifest
from speechtune.data.arrow import parquet_splits
from speechtune.data.audio_checks import check_audio
from speechtune.data.layouts import iterate_rows
from speechtune.data.pronunciation_rows import is_hub_copy, is_task_file, read_hub_copy, read_tasks
from speechtune.data.quarantine import keep_valid
from speechtune.data.row_parser import ReadResult
from speechtune.data.rows import SPLITS, Place, Row, Split
from speechtune.data.speechocean import is_speechocean, read_speechocean
from speechtune.tasks.pronunciation.targets import MAX_CLIP_SECONDS
from speechtune.types import Sample

_BEARABLE = ("silent", "clipped")  # these defects stop no training; quarantine takes them out


@dataclass(frozen=True, slots=True)
class Source:
    """Pronunciation data: its format, where it lies, the split the path names, and the splits that are there.

    JSONL has no splits.
    """

    format: Literal["folder", "hub", "jsonl"]
    path: Path
    split: Split | None = None
    splits: tuple[Split, ...] = ()


def find_source(path: Path) -> Source | None:
    """What pronunciation data `path` names; None for everything else, such as voice-cloning manifests.

    DIR/train and DIR/test name one split of DIR, whether or not there is such a folder.
    """
    if is_speechocean(path):
        return Source("folder", path, None, SPLITS)
    named: Split | None = next((split for split in SPLITS if split == path.name), None)
    if named and is_speechocean(path.parent):
        return Source("folder", path.parent, named, (named,))
    if is_hub_copy(path):
        splits = parquet_splits(path)
        alone = len(splits) == 1 and (named or path.suffix == ".parquet")  # else DIR with one split would pass for both
        return Source("hub", path, splits[0] if alone else None, splits)
    if named and not os.path.exists(path) and is_hub_copy(path.parent):
        return Source("hub", path.parent, named, (named,))
    return Source("jsonl", path) if is_task_file(path) else None


def read_source(source: Source, split: Split | None, config: DataConfig) -> ReadResult:
    """Read one split (None in JSONL) without touching the audio.

    Raises ManifestError: it cannot be read at all; ModuleNotFoundError: pyarrow, which the hub's copy needs, is not
    installed.
    """
    if source.format == "jsonl" or split is None:
        return read_tasks(source.path, config)
    if source.format == "hub":
        return read_hub_copy(source.path, split, config)
    return read_speechocean(source.path, split, config)


def load_samples(
    path: Path, config: DataConfig, quarantine_dir: Path | None = None, default_split: Split = "train"
) -> list[Sample]:
    """Samples of data of any kind, ready for encoding; a path that stands for two splits gives `default_split`.

    Voice-cloning manifests go to `manifest.load_samples`. Of pronunciation data every clip is decoded, and is an issue
    where it cannot be, holds NaN or is longer than 40 s; quarantine takes silent and clipped ones, too.

    Raises ManifestError: the data has issues, or quarantine would set aside more than `config.quarantine_limit`;
    ModuleNotFoundError: pyarrow, which the hub's copy needs, is not installed.
    """
    source = find_source(path)
    if source is None:
        return manifest.load_samples(path, config, quarantine_dir, default_split)
    result = read_source(source, None if source.format == "jsonl" else source.split or default_split, config)
    issues = check_audio(result.samples, config, deep=True, max_seconds=MAX_CLIP_SECONDS).issues
    if config.on_error == "fail":
        issues = [issue for issue in issues if issue.code not in _BEARABLE]
    rows: Iterable[Row]
    if source.format == "jsonl":
        rows = iterate_rows(Place(path))
    else:  # a row is no line of text to set aside: the quarantine file names its place
        first = {issue.row or issue.source: issue for issue in reversed([*result.issues, *issues])}
        rows = [Row(issue.row, issue.source) for issue in reversed(first.values())]
    return keep_valid(path, result, issues, config, quarantine_dir, rows)


def as_paths(value: Paths | None) -> tuple[Path, ...]:
    """The paths of an option that takes one or several."""
    return () if value is None else value if isinstance(value, tuple) else (value,)


def load_all(
    paths: Paths, config: DataConfig, quarantine_dir: Path | None = None, default_split: Split = "train"
) -> list[Sample]:
    """Samples of one or several data files in order, each as by `load_samples`.

    An id that an earlier file has taken gets the number of its file in front ("2:hold"): files of one name whose rows
    have no ids are common.
    """
    first, *others = as_paths(paths)
    samples = load_samples(first, config, quarantine_dir, default_split)
    taken = {sample.id for sample in samples} if others else set()
    for number, path in enumerate(others, 2):
        more = load_samples(path, config, quarantine_dir, default_split)
        more = [replace(one, id=f"{number}:{one.id}") if one.id in taken else one for one in more]
        taken.update(sample.id for sample in more)
        samples += more
    return samples

"""Manifests: files -> validated samples; every issue is collected, and raised once."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from speechtune.config import DataConfig
from speechtune.data.audio_checks import check_audio
from speechtune.data.chatml import read_row
from speechtune.data.quarantine import ReadResult, keep_sound
from speechtune.data.row_parser import Context
from speechtune.data.rows import Row, Shared, iterate_rows
from speechtune.errors import Issue, printable
from speechtune.types import Clip, Sample

logger = logging.getLogger("speechtune")


def read_samples(path: Path, config: DataConfig) -> ReadResult:
    """Read a manifest without touching its audio; rows with issues give no sample.

    Samples without a named reference in folder layouts borrow one of the same speaker, see `borrow_references`.

    Raises:
        ManifestError: there is no such file, or it is of no known layout.
    """
    folder = path if path.is_dir() else path.parent
    stem = path.resolve().name if path.is_dir() else path.stem
    samples: list[Sample] = []
    issues: list[Issue] = []
    notes: Counter[str] = Counter()
    first_row: dict[str, int] = {}
    num_rows, shared = 0, Shared()
    for row in iterate_rows(path):
        num_rows += 1
        context = Context(row, row_id(row, stem), folder, config, shared)
        sample = read_row(context)
        first = first_row.setdefault(context.sample_id, row.number)
        if first != row.number:
            context.issue("duplicate_id", f"the id is already taken by row {first}")
        issues += context.issues
        notes.update(context.notes)
        if sample is not None and not context.issues:
            samples.append(sample)
    if num_rows == 0:
        issues.append(Issue(f"{path}:1", "-", "empty_manifest", "holds no rows"))
    texts = [f"{text} ({count} rows)" for text, count in notes.items()]
    if any(sample.borrows_reference for sample in samples):
        samples = borrow_references(samples)
        alone = [sample.id for sample in samples if sample.borrows_reference and not sample.references]
        if alone:
            some = ", ".join(alone[:5]) + (", ..." if len(alone) > 5 else "")
            texts.append(f"{len(alone)} sample(s) without reference, their speaker has no other utterance: {some}")
    return ReadResult(samples, issues, texts, num_rows)


def borrow_references(samples: Sequence[Sample]) -> list[Sample]:
    """Give each sample of a folder layout without own reference the next utterance of its speaker, cyclic by order.

    A speaker's only utterance stays without reference; samples that name a reference are returned as they are.
    """
    if not any(sample.borrows_reference for sample in samples):
        return list(samples)
    by_speaker: defaultdict[str | None, list[Sample]] = defaultdict(list)
    position: dict[str, int] = {}
    for sample in samples:
        position[sample.id] = len(by_speaker[sample.speaker])
        by_speaker[sample.speaker].append(sample)
    result: list[Sample] = []
    for sample in samples:
        if not sample.borrows_reference:
            result.append(sample)
            continue
        others = by_speaker[sample.speaker] if sample.speaker is not None else []
        start = position[sample.id] + 1
        lenders = (others[(start + step) % len(others)] for step in range(len(others) - 1))
        lender = next((other for other in lenders if other.audio != sample.audio), None)
        clips = () if lender is None or lender.audio is None else (Clip(lender.audio, lender.text),)
        result.append(replace(sample, references=clips))
    return result


def load_samples(path: Path, config: DataConfig, quarantine_dir: Path | None = None) -> list[Sample]:
    """Samples of a manifest ready for encoding, with the headers of their audio checked.

    With `config.on_error` "quarantine", invalid rows are appended to `quarantine-<stem>.jsonl` in `quarantine_dir`
    (None: beside the manifest) and the other samples are returned.

    Raises:
        ManifestError: the manifest has issues, or quarantine would set aside more than `config.quarantine_limit`.
    """
    result = read_samples(path, config)
    deep = config.on_error == "quarantine"  # else a clip that does not decode stops the encoding
    issues = check_audio(result.samples, config, deep=deep).issues
    return borrow_references(keep_sound(path, result, issues, config, quarantine_dir, iterate_rows(path)))


def row_id(row: Row, stem: str) -> str:
    """The id a row gives itself, else the stem of its file and its number."""
    value = row.value if isinstance(row.value, dict) else {}
    misc = value.get("misc")
    for given in (value.get("id"), misc.get("id") if isinstance(misc, dict) else None):
        if (isinstance(given, str) and given.strip()) or (isinstance(given, int) and not isinstance(given, bool)):
            return printable(str(given))
    return f"{printable(stem)}-{row.number}"

"""Manifests of voice cloning -> samples; every issue is collected, and all are raised together."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from speechtune.config import DataConfig
from speechtune.data.audio_checks import check_audio
from speechtune.data.chatml import read_row
from speechtune.data.quarantine import keep_valid
from speechtune.data.row_parser import ReadResult, read_rows
from speechtune.data.rows import iterate_rows
from speechtune.errors import some
from speechtune.types import Clip, Sample


def read_samples(path: Path, config: DataConfig) -> ReadResult:
    """Read a manifest without touching its audio; rows with issues give no sample.

    Samples without a named reference in folder layouts borrow one of the same speaker, see `borrow_references`.

    Raises ManifestError: there is no such file, or it is of no known layout.
    """
    result = read_rows(path, iterate_rows(path), config, read_row)
    samples = borrow_references(result.samples)
    notes = result.notes
    if alone := [sample.id for sample in samples if sample.borrows_reference and not sample.references]:
        reason = "sample(s) without reference, their speaker has no other utterance"
        notes.append(f"{len(alone)} {reason}: {some(alone)}")
    return ReadResult(samples, result.issues, notes, result.num_rows)


def borrow_references(samples: Sequence[Sample]) -> list[Sample]:
    """Give each sample of a folder layout without own reference the next utterance of its speaker, cyclic by order.

    A speaker's only utterance stays without reference; samples that name a reference are returned as they are.
    """
    if not any(sample.borrows_reference for sample in samples):
        return list(samples)  # the tables below would cost a million rows 100 MB
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

    Raises ManifestError: the manifest has issues, or quarantine would set aside more than `config.quarantine_limit`.
    """
    result = read_samples(path, config)
    deep = config.on_error == "quarantine"  # else a clip that does not decode stops the encoding
    issues = check_audio(result.samples, config, deep=deep).issues
    return borrow_references(keep_valid(path, result, issues, config, quarantine_dir, iterate_rows(path)))

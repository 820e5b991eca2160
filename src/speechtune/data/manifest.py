"""Manifests of voice cloning -> samples; every issue is collected, and all are raised together."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from speechtune.config import DataConfig
from speechtune.data.arrow import left_out
from speechtune.data.audio_checks import check_audio
from speechtune.data.layouts import find_layout, iterate_rows
from speechtune.data.plain_rows import read_row
from speechtune.data.quarantine import keep_valid
from speechtune.data.row_parser import ReadResult, read_rows
from speechtune.data.rows import Place, Split
from speechtune.errors import some
from speechtune.types import Clip, Sample


def read_samples(path: Path, config: DataConfig, split: Split = "train") -> ReadResult:
    """Read data of voices without touching its audio; rows with issues give no sample.

    Of a folder with several splits the one named is read. Samples without a reference of their own borrow one of the
    same speaker, see `borrow_references`.

    Raises ManifestError: there is no such file, or it is of no known layout.
    """
    _, place = find_layout(Place(path, split))
    # of what lies in a folder, paths are relative to the file that names them
    folder = place.path if place.path.is_dir() else place.path.parent
    result = read_rows(path, iterate_rows(place), config, read_row, folder=folder)
    samples, notes = name_references(result.samples)
    samples = borrow_references(samples)
    notes = [*result.notes, *notes, *left_out(place)]
    if place.path != path and not place.path.name.startswith("metadata."):
        notes.append(f"of this folder {place.path.name} is read")
    if alone := [sample.id for sample in samples if sample.borrows_reference and not sample.references]:
        reason = "sample(s) without reference, their speaker is not named or has no other utterance"
        notes.append(f"{len(alone)} {reason}: {some(alone)}")
    return ReadResult(samples, result.issues, notes, result.num_rows)


def name_references(samples: Sequence[Sample]) -> tuple[list[Sample], list[str]]:
    """Give references without text that of the sample whose clip they are; with a note on those that stay without."""
    if all(clip.text for sample in samples for clip in sample.references):
        return list(samples), []
    texts = {sample.audio: sample.text for sample in samples}

    def named(clips: Sequence[Clip]) -> tuple[Clip, ...]:
        return tuple(clip if clip.text else Clip(clip.audio, texts.get(clip.audio, "")) for clip in clips)

    result = [replace(sample, references=named(sample.references)) for sample in samples]
    silent = [sample.id for sample in result if any(not clip.text for clip in sample.references)]
    reason = "sample(s) whose reference has no text ('ref_text'): its words must be guessed from its sound"
    return result, [f"{len(silent)} {reason}: {some(silent)}"] if silent else []


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


def load_samples(
    path: Path, config: DataConfig, quarantine_dir: Path | None = None, split: Split = "train"
) -> list[Sample]:
    """Samples of a manifest ready for encoding, with the headers of their audio checked.

    With `config.on_error` "quarantine", invalid rows are appended to `quarantine-<stem>.jsonl` in `quarantine_dir`
    (None: beside the manifest) and the other samples are returned.

    Raises ManifestError: the manifest has issues, or quarantine would set aside more than `config.quarantine_limit`.
    """
    result = read_samples(path, config, split)
    deep = config.on_error == "quarantine"  # else a clip that does not decode stops the encoding
    issues = check_audio(result.samples, config, deep=deep).issues
    return borrow_references(keep_valid(path, result, issues, config, quarantine_dir, iterate_rows(Place(path, split))))

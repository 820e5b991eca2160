"""A recording whose contents are known by construction, through all steps with the real networks."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from recording import judge

from conftest import Case, quiet
from speechtune.config import DataConfig
from speechtune.data.audio_checks import check_audio
from speechtune.data.manifest import read_samples
from speechtune.data.text_checks import plain
from speechtune.preparation.prepare import prepare

pytestmark = pytest.mark.slow


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_sentences_come_back_whole_and_the_rest_is_rejected_for_the_right_reason(case: Case) -> None:
    found = judge(case.parts, case.out)
    print(found)
    assert found.whole >= 0.95 and not found.torn
    assert all(share >= 0.95 for share in found.reasons.values()), found.reasons
    assert found.wer <= 0.1


def test_of_each_repeated_sentence_one_take_is_kept(case: Case) -> None:
    kept = Counter(plain(row["text"]) for row in rows(case.out / "manifest.jsonl"))
    said = Counter(plain(part.text) for part in case.parts if part.kind in ("sentence", "repeated"))
    assert [count for count in said.values()].count(2) == 2, "the recording holds two sentences twice"
    assert set(kept.values()) == {1}
    duplicates = [row for row in rows(case.out / "rejected.jsonl") if row["reason"] == "duplicate"]
    assert len(duplicates) == 2
    assert {plain(row["transcript"]) for row in duplicates} <= set(kept)


def test_pieces_do_not_overlap_and_clips_are_those_parts_of_the_recording(case: Case) -> None:
    manifest = rows(case.out / "manifest.jsonl")
    pieces = [*manifest, *(row for row in rows(case.out / "rejected.jsonl") if "id" in row)]
    spans = sorted((row["start"], row["end"]) for row in pieces)
    assert all(first[1] <= second[0] for first, second in pairwise(spans))
    recording, rate = soundfile.read(case.recording)
    for row in manifest:
        clip, clip_rate = soundfile.read(case.out / row["audio"])
        assert clip_rate == 24_000 and np.abs(clip).max() < 1
        assert len(clip) / clip_rate == pytest.approx(row["end"] - row["start"], abs=1e-3)
        # the same sound, but for its loudness: compared by its level over time
        part = recording[round(row["start"] * rate) : round(row["end"] * rate)]
        levels = [np.array([np.square(s).mean() for s in np.array_split(x, 40)]) for x in (clip, part)]
        assert np.corrcoef(*levels)[0, 1] > 0.999


def test_training_and_validation_take_the_folder(case: Case) -> None:
    manifest = {row["id"]: row for row in rows(case.out / "manifest.jsonl")}
    config = DataConfig()
    train, test = (read_samples(case.out, config, split) for split in ("train", "test"))
    for result in (train, test, read_samples(case.out / "manifest.jsonl", config)):
        assert not result.issues and not check_audio(result.samples, config, deep=True).issues
    assert {s.id for s in train.samples} | {s.id for s in test.samples} == set(manifest)
    assert test.samples and not {plain(s.text) for s in train.samples} & {plain(s.text) for s in test.samples}
    paths = {str(case.out / row["audio"]): row for row in manifest.values()}
    for sample in [*train.samples, *test.samples]:
        (reference,) = sample.references
        lender = paths[str(reference.audio.path)]
        assert reference.text == lender["text"] != sample.text
        assert 3 <= lender["duration"] <= 8 and lender["decisions"]["split"] == "train"


def test_a_rerun_computes_nothing_and_gives_the_same(case: Case, copy_of: Callable[[], Path]) -> None:
    out = copy_of()
    files = ("manifest.jsonl", "train.jsonl", "test.jsonl", "rejected.jsonl")
    before = {name: (out / name).read_bytes() for name in files}
    names = case.prepared.request.scorer_names
    asr, mos, encoder = (NeverAsked(names[job]) for job in ("asr", "mos", "speaker"))
    prepare(replace(case.prepared.request, out=out, asr=asr, mos=mos, speaker_encoder=encoder), quiet)
    with pytest.raises(AssertionError, match="asked"):  # results of another recogniser do not count
        prepare(replace(case.prepared.request, out=out, asr=NeverAsked("another")), quiet)
    assert {name: (out / name).read_bytes() for name in files} == before


class NeverAsked:
    """Stands for any scorer by its name, and fails when it is asked."""

    languages = frozenset({"en"})

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"{name} asked again")

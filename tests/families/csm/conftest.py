"""Fixtures of the CSM tests: a tiny base with real speech in its codec, and cases on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from csm_cases import Case, family_on, make_case, plain_model
from helpers import DemoClip
from speechtune.audio import read_audio
from speechtune.families.csm import tiny
from speechtune.families.csm.family import CsmFamily
from speechtune.types import Audio, AudioRef


@pytest.fixture(scope="session")
def speech(demo_clips: list[DemoClip]) -> list[Audio]:
    """Some seconds of it, for codebooks."""
    return [read_audio(AudioRef(path=str(clip.path)), 24_000) for clip in demo_clips[:4]]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, speech: list[Audio]) -> Path:
    """A model folder: two layers, hidden size 64, 8 codebooks of 64 codes, its codec inside; do not write to it."""
    folder = tmp_path_factory.mktemp("csm") / "base"
    tiny.make_model(folder, speech)
    return folder


@pytest.fixture(scope="session")
def scaled_base(tmp_path_factory: pytest.TempPathFactory, speech: list[Audio]) -> Path:
    """The same with outputs that an adapter can make sure."""
    folder = tmp_path_factory.mktemp("csm-scaled") / "base"
    tiny.make_model(folder, speech, output_scale=10.0)
    return folder


@pytest.fixture(scope="session")
def family(base: Path) -> CsmFamily:
    """All frames in the depth decoder."""
    return family_on(base)


@pytest.fixture
def native(base: Path) -> Any:
    """The base as plain transformers loads it."""
    return plain_model(base).eval()


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="session")
def cases(family: CsmFamily, demo_clips: list[DemoClip]) -> list[Case]:
    """Utterances of 10 and 14 frames, the first with a reference turn, the second alone."""
    first, second, _, fourth = demo_clips[:4]
    return [make_case(family, first, 10, second), make_case(family, fourth, 14, speaker="3")]


@pytest.fixture(scope="session")
def manifest(tmp_path_factory: pytest.TempPathFactory, demo_clips: list[DemoClip]) -> Path:
    """Four clips of a second, two by each of two speakers, who lend each other references."""
    speakers = sorted({clip.speaker for clip in demo_clips})[:2]
    chosen = [[clip for clip in demo_clips if clip.speaker == speaker][:2] for speaker in speakers]
    rows = [
        {
            "audio": str(clip.path),
            "offset": 0.3,
            "duration": 1.0 + 0.1 * number,
            "text": " ".join(clip.text.split()[:2]),
            "speaker": clip.speaker,
        }
        for number, clip in enumerate(clip for own in chosen for clip in own)
    ]
    path = tmp_path_factory.mktemp("csm-data") / "train.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def _on_the_cpu() -> Any:
    """Also where there is a GPU: another precision and order of sums would be another test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield

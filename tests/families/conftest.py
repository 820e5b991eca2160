"""Fixtures of the family tests: per family a tiny base, real utterances, and a model that has learnt them by heart."""

from __future__ import annotations

from pathlib import Path

import phi4_cases
import pytest
from higgs_cases import Case, family_on, make_case, train
from transformers import AutoTokenizer, DacFeatureExtractor, HiggsAudioV2Processor, PreTrainedTokenizerBase

from helpers import DemoClip
from speechtune.families import tiny_phi4
from speechtune.families.base import Sample
from speechtune.families.higgs_audio_v2 import HiggsAudioV2Family
from speechtune.families.phi4_multimodal import Phi4MultimodalFamily
from speechtune.run import Outcome, run_training


@pytest.fixture(scope="session")
def tiny_family(tiny_base: Path) -> HiggsAudioV2Family:
    """The family on the tiny base; its models are loaded afresh by each test."""
    return family_on(tiny_base / "model", tiny_base / "codec")


@pytest.fixture(scope="session")
def tokenizer(tiny_base: Path) -> PreTrainedTokenizerBase:
    """The tiny base's tokenizer as transformers loads it."""
    return AutoTokenizer.from_pretrained(tiny_base / "model")


@pytest.fixture(scope="session")
def cases(tiny_family: HiggsAudioV2Family, demo_clips: list[DemoClip]) -> list[Case]:
    """Two utterances of 12 and 17 frames with references of 8 and 6, cut out of real speech."""
    first, second, third, fourth = demo_clips[:4]
    return [
        make_case(tiny_family, first, 12, second, 8),
        make_case(tiny_family, fourth, 17, third, 6),
    ]


@pytest.fixture(scope="session")
def overfitted(tiny_family: HiggsAudioV2Family, cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder trained in full on `family.losses` until it knows both utterances by heart."""
    model = train(tiny_family, cases)
    folder = tmp_path_factory.mktemp("overfitted") / "model"
    model.save_pretrained(folder)
    tiny_family.save_assets(folder)
    return folder


@pytest.fixture(scope="session")
def native_processor(tiny_family: HiggsAudioV2Family, tokenizer: PreTrainedTokenizerBase) -> HiggsAudioV2Processor:
    """The native processor with the tiny tokenizer and codec, and the released one's feature extractor."""

    class Processor(HiggsAudioV2Processor):
        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> type:
            """Without torchaudio transformers offers a placeholder for the codec class, and nothing would fit it."""
            return type(argument)

    extractor = DacFeatureExtractor(sampling_rate=24_000, hop_length=1)
    return Processor(extractor, tokenizer, tiny_family.codec.model)


@pytest.fixture(scope="session")
def phi4_samples(demo_clips: list[DemoClip]) -> list[Sample]:
    """Eight pieces of real speech of different lengths, each with both tasks."""
    return phi4_cases.samples_of(demo_clips[:8])


@pytest.fixture(scope="session")
def phi4_base(tmp_path_factory: pytest.TempPathFactory, demo_clips: list[DemoClip]) -> Path:
    """A tiny Phi-4-multimodal with a speech LoRA beside it; do not write to it."""
    folder = tmp_path_factory.mktemp("phi4") / "base"
    texts = [clip.text for clip in demo_clips[:8]]
    tiny_phi4.make_model(folder, texts, output_scale=10.0, speech_lora_rank=4)
    return folder


@pytest.fixture(scope="session")
def phi4_family(phi4_base: Path) -> Phi4MultimodalFamily:
    """The family on the tiny base, its speech LoRA merged."""
    return phi4_cases.family_on(phi4_base)


@pytest.fixture(scope="session")
def phi4_rows(tmp_path_factory: pytest.TempPathFactory, phi4_samples: list[Sample]) -> Path:
    """The samples as JSONL."""
    return phi4_cases.write_rows(tmp_path_factory.mktemp("phi4-data") / "rows.jsonl", phi4_samples)


@pytest.fixture(scope="session")
def phi4_run(tmp_path_factory: pytest.TempPathFactory, phi4_base: Path, phi4_rows: Path) -> Outcome:
    """A run that has learnt all samples by heart with LoRA; do not write to its folder."""
    return run_training(phi4_cases.run_config(tmp_path_factory.mktemp("phi4-run"), phi4_base, phi4_rows))

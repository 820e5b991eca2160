"""Fixtures for all tests: the demo clips that ship with speechtune, a tiny base made of them, configurations."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in every subprocess
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
import torch
from transformers import AutoTokenizer, DacFeatureExtractor, HiggsAudioV2Processor, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

import phi4_cases
from adapter_helpers import train_adapter
from helpers import DemoClip, merged, read_demo_clips
from higgs_cases import Case, family_on, make_case, train
from speechtune.audio import read_audio
from speechtune.config import RunConfig
from speechtune.families import build_config
from speechtune.families.higgs_audio_v2 import tiny
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
from speechtune.families.phi4_multimodal import tiny as tiny_phi4
from speechtune.families.phi4_multimodal.family import Phi4MultimodalFamily
from speechtune.training.run import Outcome, run_training
from speechtune.types import AudioRef, Sample

CODEC_CLIPS = 6  # 20 s of speech: enough rows to draw 1024 codes from


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two cores are shared by several test processes; more threads only wait for one another."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state in the class: a test that started it must not decide how the next one runs."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None and (state.PartialState._shared_state or state.AcceleratorState._shared_state):
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(scope="session")
def demo_clips() -> list[DemoClip]:
    """Rows of the shipped clips.jsonl with absolute paths: real speech of four speakers in four languages."""
    return read_demo_clips()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory, demo_clips: list[DemoClip]) -> Path:
    """A folder with `model/` (two layers, hidden size 64, text head, tokenizer) and `codec/`; do not write to it."""
    folder = tmp_path_factory.mktemp("tiny-base")
    tiny.make_model(folder / "model", hidden_size=64, num_layers=2)
    speech = [read_audio(AudioRef(path=str(clip.path)), 24_000) for clip in demo_clips[:CODEC_CLIPS]]
    tiny.make_codec(folder / "codec", speech)
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of encoded clips for the whole session."""
    return tmp_path_factory.mktemp("encoded")


@pytest.fixture
def make_config(tmp_path: Path, tiny_base: Path, cache_dir: Path) -> Callable[..., RunConfig]:
    """Build a `RunConfig` on the tiny base; keyword arguments are sections merged over the defaults.

    `make_config(train={"max_steps": 3}, data={"train": path})`; the run directory is `tmp_path / "output"`.
    """

    def build(**overrides: Any) -> RunConfig:
        defaults = {
            "family": "higgs_audio_v2",
            "output_dir": tmp_path / "output",
            "model": {"path": str(tiny_base / "model"), "codec_path": str(tiny_base / "codec")},
            "data": {"cache_dir": cache_dir},
            "tracking": {"trackers": ()},
        }
        return build_config(merged(defaults, overrides), "test")

    return build


@pytest.fixture(scope="session")
def write_chatml(demo_clips: list[DemoClip]) -> Callable[[Path, Sequence[DemoClip]], Path]:
    """Write the original pipeline's ChatML: each clip as target, the speaker's next clip as reference."""

    def write(path: Path, rows: Sequence[DemoClip]) -> Path:
        path.write_text(json.dumps([_chatml_row(clip, demo_clips) for clip in rows], ensure_ascii=False), "utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def adapter_run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: Path,
    cache_dir: Path,
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
) -> Path:
    """The folder of a finished run with an adapter; do not write to it."""
    return train_adapter(tmp_path_factory.mktemp("trained") / "run", tiny_base, cache_dir, write_chatml, demo_clips)


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


def _chatml_row(target: DemoClip, clips: Sequence[DemoClip]) -> dict[str, Any]:
    voice = [clip for clip in clips if clip.speaker == target.speaker]
    reference = voice[(voice.index(target) + 1) % len(voice)]
    instruction = f"Please generate speech for given text in reference audio's voice: {target.text}"
    user = [
        {"type": "text", "text": reference.text},
        {"type": "audio", "audio_url": str(reference.path)},
        {"type": "text", "text": instruction},
    ]
    assistant = [{"type": "text", "text": target.text}, {"type": "audio", "audio_url": str(target.path)}]
    return {
        "messages": [
            {"role": "system", "content": "Generate speech in the provided voice."},
            {"role": "user", "content": user},
            {"role": "assistant", "content": assistant},
        ],
        "speaker": target.speaker,
        "start_index": 2,
        "misc": {
            "ref_transcript": reference.text,
            "target_transcript": target.text,
            "language": target.language,
        },
    }

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
from transformers.utils import logging as transformers_logging

from adapter_helpers import train_adapter
from helpers import DemoClip, merged, read_demo_clips
from speechtune.audio import read_audio
from speechtune.config import RunConfig, build_config
from speechtune.families import tiny
from speechtune.families.base import AudioRef

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
    speech = [read_audio(AudioRef(path=clip.path), 24_000) for clip in demo_clips[:CODEC_CLIPS]]
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

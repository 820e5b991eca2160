"""Time of encoding real clips against the native codec class called clip by clip, in pairs, on two threads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from save import timed
from transformers.models.higgs_audio_v2_tokenizer.configuration_higgs_audio_v2_tokenizer import (
    HiggsAudioV2TokenizerConfig,
)

import speechtune
from speechtune.audio import read_audio
from speechtune.families.base import Audio, AudioRef
from speechtune.families.higgs_codec import HiggsCodec, codec_class
from speechtune.families.tiny import codec_from_config, draw_codebooks

PAIRS = 5
THREADS = 2
CLIPS = {"small": 24, "released shape": 6}


def released_shape() -> Any:
    """A codec with the dimensions of the released one (200 M parameters) and random weights."""
    strides = {"downsampling_ratios": [8, 5, 4, 2, 3], "upsampling_ratios": [8, 5, 4, 2, 3]}
    acoustic = {"model_type": "dac", "encoder_hidden_size": 64, "decoder_hidden_size": 1024, "hidden_size": 256}
    config = HiggsAudioV2TokenizerConfig(
        target_bandwidths=[0.5, 1, 1.5, 2],
        acoustic_model_config=acoustic | strides,
        semantic_model_config={"model_type": "hubert", "mask_time_prob": 0.0},
    )
    return codec_class()(config).eval()


SHAPES: dict[str, Callable[[], Any]] = {"small": codec_from_config, "released shape": released_shape}


def demo_clips(count: int) -> list[Audio]:
    """Shipped recordings of several lengths at 24 kHz."""
    paths = sorted((Path(speechtune.__file__).parent / "assets" / "demo-voices").rglob("*.flac"))
    return [read_audio(AudioRef(path), 24_000) for path in paths[:: max(1, len(paths) // count)][:count]]


@torch.inference_mode()
def encode_natively(codec: Any, clips: list[Audio]) -> list[np.ndarray]:
    """What a plain script does."""
    waves = [torch.from_numpy(clip.samples)[None, None] for clip in clips]
    return [codec.encode(wave_11T).audio_codes[0].T.to(torch.int16).numpy() for wave_11T in waves]


def encode_pair(native: Any, ours: HiggsCodec, clips: list[Audio]) -> tuple[float, float, int]:
    """Native seconds, our seconds, and the number of codes that differ."""
    codes: list[list[np.ndarray]] = []
    native_seconds = timed(lambda: codes.append(encode_natively(native, clips)))
    our_seconds = timed(lambda: codes.append(ours.encode(clips)))
    return native_seconds, our_seconds, sum(int((a != b).sum()) for a, b in zip(*codes, strict=True))


def measure(pairs: int = PAIRS) -> dict[str, list[float]]:
    """Native time over ours (above 1: ours is faster), and the codes that differ, which must be none.

    One pair per codec goes before them unmeasured: the first passes allocate.
    """
    torch.set_num_threads(THREADS)
    result: dict[str, list[float]] = {}
    for shape, make in SHAPES.items():
        clips = demo_clips(CLIPS[shape])
        torch.manual_seed(0)
        native = make()
        draw_codebooks(native, clips[:2])
        with tempfile.TemporaryDirectory(dir=".") as folder:
            native.save_pretrained(folder)
            ours = HiggsCodec(folder)
        for pair in range(pairs + 1):
            native_seconds, our_seconds, differing = encode_pair(native, ours, clips)
            if pair:
                result.setdefault(f"{shape}: native / ours", []).append(native_seconds / our_seconds)
                result.setdefault(f"{shape}: our seconds", []).append(our_seconds)
                result.setdefault(f"{shape}: codes that differ", []).append(differing)
    return result


if __name__ == "__main__":
    for what, values in measure().items():
        print(f"{what:36} {' '.join(f'{value:.2f}' for value in values)}")

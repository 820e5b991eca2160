"""Time of encoding real clips against the native codec class called clip by clip, in pairs, on two threads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
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
from speechtune.families.higgs_audio_v2.codec import HiggsCodec, codec_class
from speechtune.families.higgs_audio_v2.tiny import codec_from_config, draw_codebooks
from speechtune.types import Audio, AudioRef

PAIRS = 5
THREADS = 2
SHORT = 16
SHORT_SECONDS = (1.0, 3.0)


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


def demo_clips(count: int) -> list[Audio]:
    """Shipped recordings of several lengths at 24 kHz."""
    paths = sorted((Path(speechtune.__file__).parent / "assets" / "demo-voices").rglob("*.flac"))
    return [read_audio(AudioRef(str(path)), 24_000) for path in paths[:: max(1, len(paths) // count)][:count]]


def short_clips() -> list[Audio]:
    """The beginnings of recordings: 1 to 3 s, as in many data sets."""
    least, most = SHORT_SECONDS
    seconds = [least + (most - least) * i / (SHORT - 1) for i in range(SHORT)]
    clips = zip(demo_clips(SHORT), seconds, strict=True)
    return [Audio(clip.samples[: int(length * clip.sampling_rate)], clip.sampling_rate) for clip, length in clips]


SHAPES: dict[str, tuple[Callable[[], Any], dict[str, Callable[[], list[Audio]]]]] = {
    "small": (codec_from_config, {"": partial(demo_clips, 24)}),
    "released shape": (released_shape, {"": partial(demo_clips, 6), ", short clips": short_clips}),
}
"""Codecs, and the clips that each encodes."""


@torch.inference_mode()
def encode_natively(codec: Any, clips: list[Audio]) -> list[np.ndarray]:
    """What a plain script does."""
    waves = [torch.from_numpy(clip.samples)[None, None] for clip in clips]
    return [codec.encode(wave_11T).audio_codes[0].T.to(torch.int16).numpy() for wave_11T in waves]


def encode_pair(native: Any, ours: HiggsCodec, clips: list[Audio]) -> tuple[float, float, float]:
    """Native seconds, our seconds, and the share of codes that differ."""
    codes: list[list[np.ndarray]] = []
    native_seconds = timed(lambda: codes.append(encode_natively(native, clips)))
    our_seconds = timed(lambda: codes.append(ours.encode(clips)))
    return native_seconds, our_seconds, float((np.concatenate(codes[0]) != np.concatenate(codes[1])).mean())


def measure(pairs: int = PAIRS) -> dict[str, list[float]]:
    """Native time over ours (above 1: ours is faster), and the share of codes that differ.

    One pair per set of clips goes before them unmeasured: the first passes allocate.
    """
    torch.set_num_threads(THREADS)
    result: dict[str, list[float]] = {}
    for shape, (make, sets) in SHAPES.items():
        torch.manual_seed(0)
        native = make()
        draw_codebooks(native, demo_clips(6)[:2])
        with tempfile.TemporaryDirectory(dir=".") as folder:
            native.save_pretrained(folder)
            ours = HiggsCodec(folder)
        for name, make_clips in sets.items():
            clips = make_clips()
            for pair in range(pairs + 1):
                native_seconds, our_seconds, differing = encode_pair(native, ours, clips)
                if pair:
                    result.setdefault(f"{shape}{name}: native / ours", []).append(native_seconds / our_seconds)
                    result.setdefault(f"{shape}{name}: our seconds", []).append(our_seconds)
                    result.setdefault(f"{shape}{name}: share of codes that differ", []).append(differing)
    return result


if __name__ == "__main__":
    for what, values in measure().items():
        print(f"{what:56} {' '.join(f'{value:.3g}' for value in values)}")

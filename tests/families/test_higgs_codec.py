"""The codec: the resampler inside it, loading without torchaudio, and codes that do not depend on the batch."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from higgs_cases import drop_tensors, family_on
from safetensors.torch import load_file

from helpers import DemoClip
from speechtune.audio import read_audio
from speechtune.errors import AudioError, ConfigError
from speechtune.families.base import Audio, AudioRef
from speechtune.families.higgs_audio_v2 import HiggsAudioV2Family
from speechtune.families.higgs_codec import HiggsCodec, sinc_resample
from speechtune.families.tiny import codec_from_config, draw_codebooks


@pytest.fixture(scope="module")
def speech(demo_clips: list[DemoClip]) -> list[Audio]:
    """Three clips of different length at 24 kHz."""
    return [read_audio(AudioRef(path=clip.path, duration_seconds=2.0), 24_000) for clip in demo_clips[3:6]]


def windowed_sinc(samples: np.ndarray, orig: int, new: int, position: int) -> float:
    """One output sample of torchaudio's default resampler, as a sum in float64 over all input samples.

    Hann-windowed sinc, six zero crossings to each side, cut off at 0.99 of the lower Nyquist frequency.
    """
    cutoff = 0.99 * min(orig, new)
    total = 0.0
    for index, value in enumerate(samples.tolist()):
        t = (index / orig - position / new) * cutoff
        if abs(t) < 6:
            sinc = 1.0 if t == 0 else math.sin(math.pi * t) / (math.pi * t)
            total += value * sinc * math.cos(math.pi * t / 12) ** 2 * cutoff / orig
    return total


@pytest.mark.parametrize(("orig", "new"), [(24_000, 16_000), (16_000, 24_000), (44_100, 24_000), (48_000, 24_000)])
def test_resampler_is_the_windowed_sinc(orig: int, new: int) -> None:
    """The semantic branch was trained behind torchaudio's filter: another one would change the codes."""
    random = np.random.default_rng(0)
    samples = random.standard_normal(1501).astype(np.float32)
    resampled = sinc_resample(torch.from_numpy(samples), orig, new).numpy()
    assert resampled.shape == (math.ceil(1501 * new / orig),)
    positions = [0, 1, len(resampled) - 1, *random.integers(0, len(resampled), 20).tolist()]
    expected = [windowed_sinc(samples, orig, new, position) for position in positions]
    np.testing.assert_allclose(resampled[positions], expected, atol=1e-5)


def test_resampler_keeps_leading_dimensions() -> None:
    """Each channel by itself; equal rates change nothing."""
    waves = torch.randn(2, 3, 700, generator=torch.Generator().manual_seed(0))
    resampled = sinc_resample(waves, 24_000, 16_000)
    assert resampled.shape == (2, 3, 467)
    torch.testing.assert_close(resampled[1, 2], sinc_resample(waves[1, 2], 24_000, 16_000))
    assert sinc_resample(waves, 24_000, 24_000) is waves


@pytest.mark.skipif(importlib.util.find_spec("torchaudio") is not None, reason="torchaudio is installed")
def test_no_trace_of_torchaudio_is_left(tiny_family: HiggsAudioV2Family) -> None:
    """A stand-in left in `sys.modules` breaks libraries that look for torchaudio (`find_spec` raises ValueError)."""
    assert tiny_family.codec.num_codebooks == 8
    assert not [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]
    assert importlib.util.find_spec("torchaudio") is None


BROKEN_TORCHAUDIO = """
import importlib.util, sys
import numpy as np
from speechtune.families.base import Audio
from speechtune.families.higgs_codec import HiggsCodec
codes = HiggsCodec(sys.argv[1]).encode([Audio(np.load(sys.argv[2]), 24_000)])[0]
left = [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]
assert not left, left
assert importlib.util.find_spec("torchaudio") is not None
np.save(sys.argv[3], codes)
"""


def test_codec_loads_beside_a_broken_torchaudio(
    tiny_base: Path, tiny_family: HiggsAudioV2Family, speech: list[Audio], tmp_path: Path
) -> None:
    """The newest torchaudio wheel is a CUDA build: beside CPU torch its import dies half-way with an OSError."""
    package = tmp_path / "site" / "torchaudio"
    package.mkdir(parents=True)
    (package / "half.py").write_text("")
    (package / "__init__.py").write_text("from . import half\nraise OSError('libc10_cuda.so: cannot open')\n")
    np.save(tmp_path / "wave.npy", speech[0].samples)
    source = str(Path(importlib.util.find_spec("speechtune").origin).parents[1])  # type: ignore[union-attr, arg-type]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), source])}
    arguments = [str(tiny_base / "codec"), str(tmp_path / "wave.npy"), str(tmp_path / "codes.npy")]
    done = subprocess.run(
        [sys.executable, "-c", BROKEN_TORCHAUDIO, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "codes.npy"), tiny_family.encode_audio(speech[:1])[0])


@pytest.mark.parametrize(("num_samples", "frames"), [(24_000, 25), (960 * 12, 12), (960 * 14, 14)])
def test_frames_and_codebooks(
    tiny_family: HiggsAudioV2Family, speech: list[Audio], num_samples: int, frames: int
) -> None:
    """25 frames a second; 8 codebooks; codes fit int16 and are no stream ids."""
    codes = tiny_family.encode_audio([Audio(speech[0].samples[:num_samples], 24_000)])[0]
    assert codes.shape == (frames, 8)
    assert codes.dtype == np.int16
    assert codes.min() >= 0 and codes.max() < 1024


def test_batch_mates_do_not_change_codes(tiny_family: HiggsAudioV2Family, speech: list[Audio]) -> None:
    """Padding clips to a common length would change their codes; inference encodes them one by one."""
    clips = [Audio(audio.samples[: 24_000 + 5000 * i], 24_000) for i, audio in enumerate(speech)]
    together = tiny_family.encode_audio(clips)
    for clip, codes in zip(clips, together, strict=True):
        np.testing.assert_array_equal(codes, tiny_family.encode_audio([clip])[0])
    assert len({codes.tobytes() for codes in together}) == 3


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts back the number of threads that torch had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads_of_ours", [1, 3])
def test_codes_are_those_of_the_native_class(tmp_path: Path, demo_clips: list[DemoClip], threads_of_ours: int) -> None:
    """Fault: torch rounds 1x1 convolutions and weight norms otherwise with one thread, and codes at a tie flipped.

    Wide enough for that to be seen: each of the convolutions' outputs is compared, not only the codes.
    """
    clips = [read_audio(AudioRef(clip.path), 24_000) for clip in demo_clips[:12:2]]
    torch.set_num_threads(2)
    torch.manual_seed(0)
    native = codec_from_config(width=8)
    draw_codebooks(native, clips[:2])
    native.save_pretrained(tmp_path)
    ours = HiggsCodec(str(tmp_path))
    seen: dict[str, list[torch.Tensor]] = {"native": [], "ours": []}
    for name, model in (("native", native), ("ours", ours.model)):
        model.fc.register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[0].clone()))
    with torch.inference_mode():
        waves = [torch.from_numpy(clip.samples)[None, None] for clip in clips]
        expected = [native.encode(wave).audio_codes[0].T.numpy() for wave in waves]
    torch.set_num_threads(threads_of_ours)
    found = ours.encode(clips)
    assert torch.get_num_threads() == threads_of_ours
    for codes, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(codes, wanted)
    embeddings = {given.shape: given for given in seen["ours"]}
    assert len(embeddings) == len({clip.samples.shape for clip in clips}) > 3
    for given in seen["native"]:
        assert torch.equal(embeddings[given.shape], given)


def test_codes_decode_to_audio_of_their_length(tiny_family: HiggsAudioV2Family, speech: list[Audio]) -> None:
    """40 ms of audio per frame, and silence of length 0 for no frames."""
    codes = tiny_family.encode_audio(speech[:1])[0]
    (decoded,) = tiny_family.codec.decode([codes])
    assert (len(decoded.samples), decoded.sampling_rate) == (len(codes) * 960, 24_000)
    assert decoded.samples.dtype == np.float32 and np.isfinite(decoded.samples).all()
    assert len(tiny_family.codec.decode([codes[:0]])[0].samples) == 0


def test_wrong_sampling_rate_is_refused(tiny_family: HiggsAudioV2Family, speech: list[Audio]) -> None:
    """Fault: samples of 16 kHz taken as 24 kHz in silence (2 s become 34 frames instead of 50)."""
    with pytest.raises(AudioError, match="wants 24000 Hz, got 16000 Hz"):
        tiny_family.encode_audio([Audio(speech[0].samples, 16_000)])


def test_codec_of_another_shape_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    """A codec with 4 codebooks does not belong to a model with 8."""
    folder = Path(shutil.copytree(tiny_base / "codec", tmp_path / "codec"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"target_bandwidths": [0.5, 1.0]}))
    drop_tensors(folder, r"quantizer\.quantizers\.[4-7]\.")
    with pytest.raises(ConfigError, match="4 codebooks, the model has 8"):
        _ = family_on(tiny_base / "model", folder).codec


@pytest.mark.parametrize("fault", ["empty folder", "no folder", "a model", "truncated", "missing tensors"])
def test_what_is_no_codec_is_refused(tiny_base: Path, tmp_path: Path, fault: str) -> None:
    """Codes out of weights that were never there would train a model on noise."""
    folder = tmp_path / "codec"
    if fault == "empty folder":
        folder.mkdir()
    elif fault == "a model":
        folder = tiny_base / "model"
    elif fault != "no folder":
        shutil.copytree(tiny_base / "codec", folder)
    weights = folder / "model.safetensors"
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif fault == "missing tensors":
        drop_tensors(folder, r"quantizer\.quantizers\.0\.codebook\.embed$")
        assert "quantizer.quantizers.0.codebook.embed" not in load_file(weights)
    with pytest.raises(ConfigError, match="codec_path"):
        _ = family_on(tiny_base / "model", folder).codec

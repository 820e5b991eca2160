"""The codec: the resampler inside it, loading without torchaudio, and codes that do not depend on the batch."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.models.dac.modeling_dac import DacResidualUnit

from helpers import DemoClip
from higgs_cases import drop_tensors, family_on
from speechtune.audio import read_audio
from speechtune.errors import AudioError, ConfigError
from speechtune.families.higgs_audio_v2 import codec as higgs_codec
from speechtune.families.higgs_audio_v2 import codec_cpu as higgs_codec_cpu
from speechtune.families.higgs_audio_v2.codec import HiggsCodec, sinc_resample
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
from speechtune.families.higgs_audio_v2.tiny import codec_from_config, draw_codebooks
from speechtune.types import Audio, AudioRef


@pytest.fixture(scope="module")
def speech(demo_clips: list[DemoClip]) -> list[Audio]:
    """Three clips of different length at 24 kHz."""
    return [read_audio(AudioRef(path=str(clip.path), duration_seconds=2.0), 24_000) for clip in demo_clips[3:6]]


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


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, demo_clips: list[DemoClip]) -> tuple[Any, HiggsCodec]:
    """Native and ours, with the same weights: wide enough to take every kernel."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    native = codec_from_config(width=8)
    clips = [read_audio(AudioRef(str(clip.path)), 24_000) for clip in demo_clips[:3:2]]
    draw_codebooks(native, clips)
    native.save_pretrained(folder)
    return native, HiggsCodec(str(folder))


def embeddings(model: Any, encode: Callable[[], object]) -> dict[int, torch.Tensor]:
    """What is quantized while `encode` runs, (F, D), by the number of frames."""
    seen: dict[int, torch.Tensor] = {}
    hook = model.fc.register_forward_hook(lambda _, given, result: seen.update({result.shape[1]: result[0].clone()}))
    try:
        encode()
    finally:
        hook.remove()
    return seen


def needless_distance(native: Any, embedding_FD: torch.Tensor, codes_FK: np.ndarray) -> float:
    """By how much a chosen entry is farther than the nearest, at most, as a share of the squared lengths; in float64.

    Each codebook gets what the chosen entries before it have left: one choice at a tie changes all that follow.
    """
    left_FD, worst = embedding_FD.double(), 0.0
    for quantizer, code_F in zip(native.quantizer.quantizers, torch.from_numpy(codes_FK.T).long(), strict=True):
        project, entries_ND = quantizer.project_in, quantizer.codebook.embed.double()
        target_FD = left_FD @ project.weight.double().T + project.bias.double()
        distance_FN = torch.cdist(target_FD, entries_ND, compute_mode="donot_use_mm_for_euclid_dist").square()
        excess_F = distance_FN.gather(1, code_F[:, None])[:, 0] - distance_FN.amin(1)
        scale_F = target_FD.square().sum(1) + entries_ND[code_F].square().sum(1)
        worst = max(worst, float((excess_F / scale_F).max()))
        left_FD = left_FD - quantizer.decode(code_F[None])[0].T.double()
    return worst


def test_codes_are_the_nearest_of_what_the_native_class_quantizes(
    wide: tuple[Any, HiggsCodec], demo_clips: list[DemoClip]
) -> None:
    """The same embedding up to rounding, and codes that differ from the native ones at a tie only."""
    native, ours = wide
    clips = [read_audio(AudioRef(str(clip.path)), 24_000) for clip in demo_clips[:12:2]]
    waves = [torch.from_numpy(clip.samples)[None, None] for clip in clips]
    expected: list[np.ndarray] = []
    with torch.inference_mode():
        wanted = embeddings(
            native, lambda: expected.extend(native.encode(wave).audio_codes[0].T.numpy() for wave in waves)
        )
        found: list[np.ndarray] = []
        given = embeddings(ours.model, lambda: found.extend(ours.encode(clips)))
        assert wanted.keys() == given.keys() and len(wanted) > 3
        for frames, embedding_FD in wanted.items():
            assert (given[frames] - embedding_FD).norm() < 1e-5 * embedding_FD.norm()
        for codes in found:
            if len(codes) in wanted and sum(len(codes) == len(others) for others in found) == 1:
                assert needless_distance(native, wanted[len(codes)], codes) < 1e-5
                assert needless_distance(native, wanted[len(codes)], codes[::-1].copy()) > 1e-2
    differing = sum(int((codes != others).sum()) for codes, others in zip(found, expected, strict=True))
    assert differing <= 1e-3 * sum(codes.size for codes in expected)


@pytest.mark.usefixtures("threads")
def test_codes_depend_on_the_clip_alone(wide: tuple[Any, HiggsCodec], demo_clips: list[DemoClip]) -> None:
    """Issue: sums in another order with another number of threads, and other codes at ties."""
    ours = wide[1]
    clips = [read_audio(AudioRef(str(clip.path)), 24_000) for clip in demo_clips[:6]]
    torch.set_num_threads(2)
    expected = ours.encode(clips)
    orders = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [4], [2, 0]]
    for threads_of_ours, order in zip([1, 3, 3, 1], orders, strict=True):
        torch.set_num_threads(threads_of_ours)
        found = ours.encode([clips[i] for i in order])
        assert torch.get_num_threads() == threads_of_ours
        for i, codes in zip(order, found, strict=True):
            np.testing.assert_array_equal(codes, expected[i])


def test_without_onednn_the_layers_are_the_native_ones(
    wide: tuple[Any, HiggsCodec], demo_clips: list[DemoClip], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch has not the operators: nothing but the weight norms is changed, and the codes are kept apart."""
    folder = Path(wide[1].model.config._name_or_path)
    key = family_on(folder, folder).encode_key
    monkeypatch.setattr(higgs_codec, "is_available", lambda: False)
    assert family_on(folder, folder).encode_key == key.replace("cpu layers", "native layers") != key
    plain = HiggsCodec(str(folder))
    assert not [module for module in plain.model.modules() if type(module).__module__ == higgs_codec_cpu.__name__]
    clip = read_audio(AudioRef(str(demo_clips[0].path)), 24_000)
    different = plain.encode([clip])[0] != wide[1].encode([clip])[0]
    assert different.mean() <= 5e-3


def test_batches_and_decoding_are_the_native_ones(wide: tuple[Any, HiggsCodec], speech: list[Audio]) -> None:
    """A batch of several takes the native layers; audio from codes differs by rounding."""
    native, ours = wide
    waves_21T = torch.from_numpy(np.stack([audio.samples[:40_000] for audio in speech[:2]]))[:, None]
    with torch.inference_mode():
        codes_2KF = native.encode(waves_21T).audio_codes
        assert (ours.model.encode(waves_21T).audio_codes != codes_2KF).float().mean() <= 5e-3
        wanted = native.decode(codes_2KF).audio_values
        torch.testing.assert_close(ours.model.decode(codes_2KF).audio_values, wanted, rtol=1e-5, atol=1e-6)
    for codes_KF, wave in zip(codes_2KF, wanted, strict=True):
        (decoded,) = ours.decode([codes_KF.T.numpy()])
        np.testing.assert_allclose(decoded.samples, wave[0].numpy(), atol=1e-5 * float(wave.abs().max()))


@pytest.mark.parametrize("dilation", [1, 9])
@pytest.mark.parametrize("length", [1, 5, 27, 64, 65, 150, 640])
def test_a_residual_unit_in_pieces_is_the_whole(monkeypatch: pytest.MonkeyPatch, dilation: int, length: int) -> None:
    """No seam, and no end shorter than what the convolution sees, shows."""
    if not higgs_codec_cpu.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(higgs_codec_cpu, "TILE_VALUES", 1)
    monkeypatch.setattr(higgs_codec_cpu, "TILE_STEPS", 64)
    torch.manual_seed(0)
    unit = DacResidualUnit(16, dilation).eval().requires_grad_(False)
    values_1CT = torch.randn(1, 16, length)
    with torch.inference_mode():
        expected = unit(values_1CT)
        higgs_codec_cpu.use_clip_layers(unit.modules())
        torch.testing.assert_close(unit(values_1CT.clone()), expected, rtol=1e-5, atol=1e-6)


def test_codes_decode_to_audio_of_their_length(tiny_family: HiggsAudioV2Family, speech: list[Audio]) -> None:
    """40 ms of audio per frame, and silence of length 0 for no frames."""
    codes = tiny_family.encode_audio(speech[:1])[0]
    (decoded,) = tiny_family.codec.decode([codes])
    assert (len(decoded.samples), decoded.sampling_rate) == (len(codes) * 960, 24_000)
    assert decoded.samples.dtype == np.float32 and np.isfinite(decoded.samples).all()
    assert len(tiny_family.codec.decode([codes[:0]])[0].samples) == 0


def test_wrong_sampling_rate_is_refused(tiny_family: HiggsAudioV2Family, speech: list[Audio]) -> None:
    """Issue: samples of 16 kHz taken as 24 kHz in silence (2 s become 34 frames instead of 50)."""
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


@pytest.mark.parametrize("issue", ["empty folder", "no folder", "a model", "truncated", "missing tensors"])
def test_what_is_no_codec_is_refused(tiny_base: Path, tmp_path: Path, issue: str) -> None:
    """Codes out of weights that were never there would train a model on noise."""
    folder = tmp_path / "codec"
    if issue == "empty folder":
        folder.mkdir()
    elif issue == "a model":
        folder = tiny_base / "model"
    elif issue != "no folder":
        shutil.copytree(tiny_base / "codec", folder)
    weights = folder / "model.safetensors"
    if issue == "truncated":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif issue == "missing tensors":
        drop_tensors(folder, r"quantizer\.quantizers\.0\.codebook\.embed$")
        assert "quantizer.quantizers.0.codebook.embed" not in load_file(weights)
    with pytest.raises(ConfigError, match="codec_path"):
        _ = family_on(tiny_base / "model", folder).codec

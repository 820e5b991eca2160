"""The codec made of WORLD's analysis and tables: what codes mean, what they depend on, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from helpers import DemoClip
from higgs_cases import family_on
from speechtune.audio import audio_info, read_audio
from speechtune.cache.encode import encode_samples
from speechtune.errors import ConfigError
from speechtune.families.higgs_audio_v2.codec import HiggsCodec, load_codec
from speechtune.families.higgs_audio_v2.codec_world import (
    FRAME_SAMPLES,
    WorldCodec,
    analyse,
    nearest,
    scale_pitch,
    synthesise,
)
from speechtune.families.higgs_audio_v2.world_synthesis import AT_ONCE, place_pulses, render
from speechtune.types import Audio, AudioRef, Sample

pytest.importorskip("pyworld", reason="the codec's vocoder: pip install 'speechtune[demo]'")
SIZE, SMALL = 64, 16


def write_codec(folder: Path, clips: list[Audio], size: int = SIZE) -> Path:
    """A codec whose entries are drawn from the frames of clips; the last stage and aperiodicity have fewer."""
    features = [analyse(clip.samples) for clip in clips]
    envelope, pitch, aperiodicity = (
        np.concatenate([getattr(f, name) for f in features]) for name in ("envelope", "pitch", "aperiodicity")
    )
    draw, mean = np.random.default_rng(0), envelope.mean(axis=0)
    _, _, axes = np.linalg.svd(envelope - mean, full_matrices=False)
    components = axes[:32]
    tables = {"mean": mean, "components": components, "pitch": draw.permutation(scale_pitch(pitch))[:size]}
    tables["aperiodicity"] = draw.permutation(aperiodicity)[:SMALL]
    residual = (envelope - mean) @ components.T
    for stage in range(6):
        entries = draw.permutation(residual)[: size if stage < 5 else SMALL]
        tables[f"envelope.{stage}"] = entries
        residual = residual - entries[nearest(residual, entries)]
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: np.ascontiguousarray(table, np.float32) for name, table in tables.items()}
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "world_rvq", "num_codebooks": 8, "sampling_rate": 16_000}), encoding="utf-8"
    )
    return folder


@pytest.fixture(scope="module")
def clips(demo_clips: list[DemoClip]) -> list[Audio]:
    return [read_audio(AudioRef(str(clip.path)), 16_000) for clip in demo_clips[:5]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, clips: list[Audio]) -> Path:
    return write_codec(tmp_path_factory.mktemp("world") / "codec", clips)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_codes_are_the_nearest_entries_stage_by_stage(folder: Path, clips: list[Audio]) -> None:
    codec, tables = WorldCodec(str(folder)), load_file(folder / "model.safetensors")
    features, (codes_FK,) = analyse(clips[0].samples), codec.encode(clips[:1])
    assert codes_FK.dtype == np.int16 and codes_FK.shape == (-(-len(clips[0].samples) // FRAME_SAMPLES), 8)
    left_FD = (features.envelope - tables["mean"]) @ tables["components"].astype(np.float64).T
    for stage, column in zip(range(6), (0, 2, 3, 4, 5, 6), strict=True):
        entries_VD = tables[f"envelope.{stage}"].astype(np.float64)
        distances_FV = np.linalg.norm(left_FD[:, None] - entries_VD[None], axis=2)
        np.testing.assert_array_equal(codes_FK[:, column], distances_FV.argmin(axis=1))
        left_FD = left_FD - entries_VD[codes_FK[:, column]]
    back = codec.features(codes_FK)
    np.testing.assert_allclose(
        (back.envelope - tables["mean"]) @ tables["components"].T + left_FD,
        (features.envelope - tables["mean"]) @ tables["components"].T,
        atol=1e-4,
    )
    for column, name, given in ((1, "pitch", scale_pitch(features.pitch)), (7, "aperiodicity", features.aperiodicity)):
        distances_FV = np.linalg.norm(given[:, None] - tables[name].astype(np.float64)[None], axis=2)
        np.testing.assert_array_equal(codes_FK[:, column], distances_FV.argmin(axis=1))


def test_features_keep_speech_and_its_pitch(clips: list[Audio]) -> None:
    """Analysed again, what was synthesised has the pitch it was made with, where it is voiced."""
    features = analyse(clips[0].samples)
    again = analyse(synthesise(features))
    assert len(again.pitch) == len(features.pitch)
    voiced = (features.pitch[:, 4:] > 0.5) & (again.pitch[:, 4:] > 0.5)
    assert voiced.mean() > 0.3
    semitones = 12 / np.log(2) * np.abs(again.pitch[:, :4] - features.pitch[:, :4])[voiced]
    assert np.median(semitones) < 0.2


def world_noise(count: int) -> np.ndarray:
    """WORLD's own draws: twelve of Marsaglia's xorshift a number."""
    x, y, z, w, draws = 123456789, 362436069, 521288629, 88675123, []
    for _ in range(12 * count):
        t = (x ^ (x << 11)) & 0xFFFFFFFF
        x, y, z, w = y, z, w, (w ^ (w >> 19)) ^ (t ^ (t >> 8))
        draws.append(w >> 4)
    return np.asarray(draws).reshape(count, 12).sum(axis=1) / 2**28 - 6


def test_synthesis_is_that_of_world(clips: list[Audio]) -> None:
    """Given WORLD's noise, its samples: for speech of more pulses than are computed at a time, voiced and unvoiced."""
    import pyworld

    wave = clips[0].samples[: 50 * FRAME_SAMPLES].astype(np.float64)
    pitch, power, aperiodicity = pyworld.wav2world(wave, 16_000, frame_period=10.0)
    values = [values[:200] for values in (pitch, power, aperiodicity)]
    wanted = pyworld.synthesize(*values, 16_000, 10.0)
    pulses = place_pulses(values[0], len(wanted), 16_000)
    assert len(wanted) == 200 * 160 and len(pulses.starts) > AT_ONCE and 0.1 < pulses.voiced.mean() < 0.9
    noise = np.zeros(len(wanted))
    noise[pulses.starts[0] :] = world_noise(len(wanted) - pulses.starts[0])
    found = render(*values, noise, 16_000)
    assert found.dtype == np.float32 and np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(render(*values, noise[::-1], 16_000) - wanted).max() > 0.01 * np.abs(wanted).max()


def test_a_clip_without_pulses_is_silent() -> None:
    """Two frames at 17 Hz hold none."""
    assert not render(np.full(2, 17.0), np.ones((2, 513)), np.ones((2, 513)), np.ones(320), 16_000).any()


def test_voiced_speech_is_found_voiced(clips: list[Audio]) -> None:
    """Measured against WORLD's slow, careful tracker; the fast one alone finds three quarters of what that finds."""
    import pyworld

    found, wanted = [], []
    for clip in clips[:2]:
        num_frames = -(-len(clip.samples) // FRAME_SAMPLES)
        wave = np.zeros(num_frames * FRAME_SAMPLES)
        wave[: len(clip.samples)] = clip.samples
        pitch, _ = pyworld.harvest(wave, 16_000, 60.0, 500.0, frame_period=10.0)
        wanted.append(pitch[: 4 * num_frames] > 0)
        found.append(analyse(clip.samples).pitch[:, 4:].ravel() > 0.5)
    assert np.concatenate(found)[np.concatenate(wanted)].mean() > 0.9


def test_loudness_does_not_count_and_the_end_is_padded(folder: Path, clips: list[Audio]) -> None:
    codec, samples = WorldCodec(str(folder)), clips[1].samples[: 50 * FRAME_SAMPLES + 1]
    loud, quiet = codec.encode([Audio(samples, 16_000), Audio(samples * np.float32(0.125), 16_000)])
    assert len(loud) == 51
    assert (loud != quiet).mean() < 0.01  # the same but for rounding in the vocoder's analysis
    assert codec.decode([loud])[0].samples.dtype == np.float32
    assert len(codec.decode([loud])[0].samples) == 51 * FRAME_SAMPLES


@pytest.mark.usefixtures("threads")
def test_codes_depend_on_the_clip_alone(folder: Path, clips: list[Audio]) -> None:
    codec = WorldCodec(str(folder))
    torch.set_num_threads(2)
    expected = codec.encode(clips)
    for threads_of_ours, order in ((1, [4, 3, 2, 1, 0]), (3, [2]), (1, [1, 1, 4])):
        torch.set_num_threads(threads_of_ours)
        for i, codes in zip(order, codec.encode([clips[i] for i in order]), strict=True):
            np.testing.assert_array_equal(codes, expected[i])


def test_a_frame_is_quantised_the_same_alone_and_among_others() -> None:
    """Products by BLAS would sum in an order that depends on the number of rows, and decide ties by it."""
    draw = np.random.default_rng(0)
    values_FD = draw.normal(size=(300, 64))
    near_FD = values_FD + 0.1 * draw.normal(size=(300, 64))
    entries_VD = np.concatenate([near_FD, 2 * values_FD - near_FD])  # its mirror image is as near: rounding decides
    together = nearest(values_FD, entries_VD)
    alone = np.concatenate([nearest(values_FD[i : i + 1], entries_VD) for i in range(300)])
    np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("samples", [0, 1, 959, 5000])
def test_silence_and_very_short_clips(folder: Path, samples: int) -> None:
    codec = WorldCodec(str(folder))
    (codes_FK,) = codec.encode([Audio(np.zeros(samples, np.float32), 16_000)])
    assert codes_FK.shape == (-(-samples // FRAME_SAMPLES), 8)
    (audio,) = codec.decode([codes_FK])
    assert len(audio.samples) == len(codes_FK) * FRAME_SAMPLES and np.isfinite(audio.samples).all()


def test_a_code_beyond_its_codebook_is_taken_for_the_last(folder: Path) -> None:
    """Codebooks may differ in size, and a model has as many ids for each as for the largest."""
    codec = WorldCodec(str(folder))
    assert (codec.codebook_size, codec.num_codebooks, codec.sampling_rate) == (SIZE, 8, 16_000)
    codes_FK = np.full((3, 8), SIZE - 1, np.int16)
    last_FK = codes_FK.copy()
    last_FK[:, 6:] = SMALL - 1
    np.testing.assert_array_equal(codec.decode([codes_FK])[0].samples, codec.decode([last_FK])[0].samples)


def test_the_family_takes_the_codec_that_the_folder_names(folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    family = family_on(tiny_base / "model", folder)
    assert isinstance(family.codec, WorldCodec)
    assert isinstance(load_codec(str(tiny_base / "codec"), None, "cpu"), HiggsCodec)
    key = family.encode_key
    assert "WORLD layers" in key
    copy = tmp_path / "copy"
    copy.mkdir()
    tables = load_file(folder / "model.safetensors")
    tables["pitch"][0, 0] += 1
    save_file(tables, copy / "model.safetensors")
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert family_on(tiny_base / "model", copy).encode_key != key


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no table", "tables are missing: ['envelope.3']"),
        ("other type", "no usable codec there"),
        ("no weights", "model.safetensors"),
    ],
)
def test_an_incomplete_codec_is_refused_by_its_option(
    folder: Path, tiny_base: Path, tmp_path: Path, fault: str, message: str
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    tables = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if fault == "no table":
        del tables["envelope.3"]
    if fault == "other type":
        config["model_type"] = "of_another"
    if fault != "no weights":
        save_file(tables, copy / "model.safetensors")
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        _ = family_on(tiny_base / "model", copy).codec
    assert f"model.codec_path={copy}" in str(caught.value) and message in str(caught.value)


def test_without_the_vocoder_the_install_line_is_named(
    folder: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyworld", None)
    with pytest.raises(ConfigError, match=r"pyworld is missing: pip install 'speechtune\[demo\]'"):
        _ = family_on(tiny_base / "model", folder).codec


def test_a_codec_at_another_rate_gets_audio_at_its_rate(
    folder: Path, tiny_base: Path, tmp_path: Path, demo_clips: list[DemoClip]
) -> None:
    """Guards against audio read at the released codec's rate: it is then encoded at two thirds of its pace."""
    family = family_on(tiny_base / "model", folder)
    assert family.sampling_rate == 16_000
    clip = AudioRef(str(demo_clips[0].path))
    sample = Sample("clip", demo_clips[0].text, clip)
    (codes_FK,) = encode_samples(family, [sample], tmp_path, quiet=True).features(0)
    assert len(codes_FK) == math.ceil(audio_info(clip).duration_seconds * 25)
    assert family_on(tiny_base / "model", tiny_base / "codec").sampling_rate == 24_000

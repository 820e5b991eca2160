"""The codec: Mimi's codes of each clip alone, in float32, from wherever its weights are kept."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from csm_cases import CODEBOOKS, family_on, plain_model
from speechtune.errors import AudioError, ConfigError
from speechtune.families.csm.family import CsmFamily
from speechtune.types import Audio


@pytest.fixture
def clips(speech: list[Audio]) -> list[Audio]:
    """Of different lengths, none of them a whole number of frames."""
    return [Audio(speech[i].samples[: 20_000 + 7_777 * i], 24_000) for i in range(3)]


def test_codes_are_the_native_codec_s(family: CsmFamily, native: Any, clips: list[Audio]) -> None:
    """Of the codec inside the model, clip by clip; ceil(n / 1920) frames."""
    for clip, codes in zip(clips, family.encode_audio(clips), strict=True):
        with torch.no_grad():
            expected = native.codec_model.encode(torch.from_numpy(clip.samples)[None, None]).audio_codes[0].T
        np.testing.assert_array_equal(codes, expected)
        assert codes.shape == (-(-len(clip.samples) // 1920), CODEBOOKS) and codes.dtype == np.int16
        assert all(len(np.unique(codes[:, k])) > 3 for k in range(CODEBOOKS))


def test_codes_depend_on_the_clip_alone(family: CsmFamily, native: Any, clips: list[Audio]) -> None:
    """Neither on batch mates nor on threads; padded on the right, the last frame would have other codes."""
    together = family.encode_audio(clips)
    torch.set_num_threads(2)
    try:
        threaded = family.encode_audio(clips)
    finally:
        torch.set_num_threads(1)
    for clip, codes, other in zip(clips, together, threaded, strict=True):
        np.testing.assert_array_equal(family.encode_audio([clip])[0], codes)
        np.testing.assert_array_equal(other, codes)
    padded = np.pad(clips[0].samples, (0, 24_000))
    with torch.no_grad():
        more = native.codec_model.encode(torch.from_numpy(padded)[None, None]).audio_codes[0].T.numpy()
    frames = len(together[0])
    assert (more[: frames - 1] == together[0][:-1]).all() and (more[frames - 1] != together[0][-1]).any()


def test_decoding_is_the_native_codec_s(family: CsmFamily, native: Any, clips: list[Audio]) -> None:
    codes = family.encode_audio(clips)
    for one, audio in zip(codes, family.codec.decode(codes), strict=True):
        with torch.no_grad():
            expected = native.codec_model.decode(torch.from_numpy(one.astype(np.int64).T)[None]).audio_values[0, 0]
        np.testing.assert_array_equal(audio.samples, expected)


def test_a_codec_of_its_own_has_the_same_key(base: Path, family: CsmFamily, native: Any, tmp_path: Path) -> None:
    """Cached codes stay valid: the key is the codec's weights, not their place. Another codec has another key."""
    native.codec_model.save_pretrained(tmp_path / "mimi")
    other = family_on(base, model={"codec_path": str(tmp_path / "mimi")})
    assert other.encode_key == family.encode_key
    assert other.parts == {"codec": (str(tmp_path / "mimi"), None)} and family.parts == {}
    native.codec_model.quantizer.acoustic_residual_vector_quantizer.layers[2].codebook.embed_sum[3] += 0.5
    native.codec_model.save_pretrained(tmp_path / "changed")
    changed = family_on(base, model={"codec_path": str(tmp_path / "changed")})
    assert changed.encode_key != family.encode_key
    inside = family_on(base, model={"codec_path": str(base)})
    assert inside.encode_key == family.encode_key


def test_a_codec_kept_in_half_precision_computes_in_float32(base: Path, tmp_path: Path, clips: list[Audio]) -> None:
    """`dtype=bfloat16` for the base must not reach the codec."""
    half = plain_model(base, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    shutil.copy(base / "tokenizer.json", tmp_path / "half")
    family = family_on(tmp_path / "half")
    assert {p.dtype for p in family.codec.model.parameters()} == {torch.float32}
    kept: Any = plain_model(tmp_path / "half", dtype=torch.float32)
    with torch.no_grad():
        expected = kept.codec_model.encode(torch.from_numpy(clips[0].samples)[None, None]).audio_codes[0].T
    np.testing.assert_array_equal(family.encode_audio(clips[:1])[0], expected)


def drop_codec(folder: Path) -> None:
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if "downsample" not in name}
    save_file(kept, file, metadata={"format": "pt"})


def test_codecs_that_do_not_fit_are_refused(base: Path, native: Any, tmp_path: Path) -> None:
    """Missing weights, other codebooks, another kind of model: one error that names the option."""
    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    drop_codec(broken)
    with pytest.raises(ConfigError, match=f"model.path={re.escape(str(broken))}.*weights of the codec are missing"):
        _ = family_on(broken).codec
    config = native.codec_model.config
    config.num_quantizers = 4
    type(native.codec_model)(config).save_pretrained(tmp_path / "four")
    with pytest.raises(ConfigError, match=r"model.codec_path=.*4 codebooks at 24000 Hz.*wants 8"):
        _ = family_on(base, model={"codec_path": str(tmp_path / "four")}).codec
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"model.codec_path=.*'llama', neither 'mimi'"):
        _ = family_on(base, model={"codec_path": str(other)}).codec


def test_another_rate_is_refused(family: CsmFamily) -> None:
    """The native processor takes 16 kHz for 24 in silence."""
    with pytest.raises(AudioError, match="wants 24000 Hz, got 16000 Hz"):
        family.encode_audio([Audio(np.zeros(16_000, np.float32), 16_000)])

"""Whisper conditioning: what is heard, where it is added, and that nothing else changes."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.models.whisper.modeling_whisper as native_whisper
from torch import nn
from torch.nn import functional
from transformers import WhisperFeatureExtractor, WhisperModel

from helpers import WAYS, DemoClip, native_batch, overfit
from higgs_cases import FP32, Case, family_on, mean_loss
from speechtune.audio import read_audio
from speechtune.cache.encode import encode_samples
from speechtune.errors import ConfigError, ManifestError
from speechtune.families.higgs_audio_v2 import tiny
from speechtune.families.higgs_audio_v2.conditioning import reference_rows
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
from speechtune.families.higgs_audio_v2.forward import target_states
from speechtune.types import Audio, AudioRef, Batch, Clip, GenerationOptions, Sample

GREEDY = GenerationOptions(temperature=0, max_new_tokens=12)
POSITIONS = 3


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper that hears two seconds at once."""
    folder = tmp_path_factory.mktemp("whisper") / "tiny"
    tiny.make_whisper(folder)
    return folder


def conditioned_family(tiny_base: Path, whisper: Path, **more: Any) -> HiggsAudioV2Family:
    values = {"reference_conditioning": "whisper", "whisper_path": str(whisper)}
    sections = {name: more.pop(name) for name in ("batch", "speed") if name in more}
    return family_on(tiny_base / "model", tiny_base / "codec", **sections, **values, **more)


@pytest.fixture(params=WAYS, ids=str)
def family(tiny_base: Path, whisper: Path, request: pytest.FixtureRequest) -> HiggsAudioV2Family:
    """Packed or padded, the layers fast or native."""
    return conditioned_family(tiny_base, whisper, reference_positions=POSITIONS, **request.param)


@pytest.fixture(scope="module")
def heard(tiny_base: Path, whisper: Path, cases: list[Case]) -> list[list[np.ndarray]]:
    """What Whisper hears in each case's reference."""
    encoder = conditioned_family(tiny_base, whisper).reference_encoder
    assert encoder is not None
    return [encoder.encode_audio([read_audio(case.sample.references[0].audio, 16_000)]) for case in cases]


def batch_of(family: HiggsAudioV2Family, cases: Sequence[Case], heard: Sequence[list[np.ndarray]]) -> Batch:
    """Both cases, and between them one without a reference."""
    items = [family.encode(case.sample, [*case.features, *extra]) for case, extra in zip(cases, heard, strict=True)]
    alone = replace(cases[0].sample, id="alone", references=())
    return family.collate([items[0], family.encode(alone, cases[0].features[1:]), items[1]])


def model_of(family: HiggsAudioV2Family, *, gate: float | None = None) -> Any:
    """The base with a projector, its gate open as far as `gate` says."""
    model: Any = family.load(FP32)
    family.add_to_base(model, None, training=True)
    if gate is not None:
        with torch.no_grad():
            model.reference_projector.gate.copy_(gate * torch.linspace(-1, 1, len(model.reference_projector.gate)))
    return model.eval()


def states(family: HiggsAudioV2Family, model: Any, batch: Batch) -> torch.Tensor:
    """Hidden states at all targets, audio first."""
    with torch.no_grad():
        return torch.cat(family._target_states(model, batch))


def test_whisper_hears_what_the_native_class_hears(whisper: Path, tiny_base: Path, demo_clips: list[DemoClip]) -> None:
    """Whole windows and a rest, each padded as Whisper was trained; a neighbour changes nothing, to the bit."""
    encoder = conditioned_family(tiny_base, whisper).reference_encoder
    assert encoder is not None
    speech = np.concatenate([read_audio(AudioRef(str(clip.path)), 16_000).samples for clip in demo_clips[:3]])
    assert len(speech) >= 80_100
    long = Audio(speech[:80_100], 16_000)
    short = Audio(long.samples[:5000], 16_000)
    alone = encoder.encode_audio([long])[0]
    together = encoder.encode_audio([short, long])
    np.testing.assert_array_equal(together[1], alone)
    assert len(alone) == 100 + 100 + 51 and len(together[0]) == 16  # a position for every 320 samples begun
    native = WhisperModel.from_pretrained(whisper).encoder.eval()
    extractor = WhisperFeatureExtractor.from_pretrained(whisper)
    for start, expected in ((0, alone[:100]), (64_000, alone[200:])):
        piece = np.pad(long.samples[start : start + 32_000], (0, max(0, start + 32_000 - len(long.samples))))
        mel = extractor(piece, sampling_rate=16_000, return_tensors="pt")["input_features"]
        with torch.no_grad():
            states = native(mel).last_hidden_state[0, : len(expected)].numpy()
        np.testing.assert_allclose(expected.astype(np.float32), states, atol=2e-3)


@pytest.mark.parametrize("positions", [None, 1, 3, 50])
def test_each_row_gets_its_share_of_the_clip(positions: int | None) -> None:
    """In loops: row r holds frame r - 1 of the first codebook, and the mean over that frame's share."""
    rng = np.random.default_rng(0)
    codes, sound = np.zeros((7, 8), np.int16), rng.normal(size=(15, 4)).astype(np.float16)
    count = positions or 7
    expected = []
    for row in range(7 + 9):
        share = min(max(row - 1, 0), 6) * count // 7
        first, end = share * 15 // count, -(-(share + 1) * 15 // count)
        expected.append(sound[first:end].astype(np.float64).mean(axis=0))
    found = reference_rows([codes, codes], [sound, 2 * sound], positions, 4)
    np.testing.assert_allclose(found[:16], expected, atol=1e-6)
    np.testing.assert_allclose(found[16:], 2 * np.asarray(expected), atol=2e-6)
    assert reference_rows([], [], positions, 4).shape == (0, 4)


def test_a_closed_gate_is_the_base(
    family: HiggsAudioV2Family, tiny_base: Path, cases: list[Case], heard: list[list[np.ndarray]]
) -> None:
    """Bit for bit, in every way to compute it: states, losses, greedy rows; with references and without."""
    batch, model = batch_of(family, cases, heard), model_of(family)
    plain_batch, base = replace(batch, inputs=dict(batch.inputs)), family.load(FP32).eval()
    assert torch.equal(states(family, model, batch), torch.cat(target_states(base.model, plain_batch)))
    prompts = [(replace(case.sample, audio=None), case.features[:1]) for case in cases]
    prompts.insert(1, (replace(cases[0].sample, id="alone", references=(), audio=None), []))
    asked = [
        (sample, [*codes, *extra]) for (sample, codes), extra in zip(prompts, [heard[0], [], heard[1]], strict=True)
    ]
    plain = family_on(tiny_base / "model", tiny_base / "codec")
    np.testing.assert_array_equal(
        family.generate_rows(model, asked, GREEDY), plain.generate_rows(base, prompts, GREEDY)
    )
    assert torch.equal(family.probe(model)[0], plain.probe(base)[0])


@torch.no_grad()
def expected_logits(model: Any, tokenizer: Any, case: Case, heard: np.ndarray) -> torch.Tensor:
    """The plain native forward of a case, its reference's positions raised by hand before the first layer."""
    native = native_batch(tokenizer, [case.utterance])
    weights, projector = model.reference_projector.state_dict(), []
    for row in range(len(case.utterance.reference_codes) + 9):
        frames = len(case.utterance.reference_codes)
        share = min(max(row - 1, 0), frames - 1) * POSITIONS // frames
        first, end = share * len(heard) // POSITIONS, -(-(share + 1) * len(heard) // POSITIONS)
        x = torch.from_numpy(heard[first:end].astype(np.float32)).mean(0)
        x = functional.layer_norm(x, x.shape, weights["norm.weight"], weights["norm.bias"])
        x = functional.gelu(weights["up.weight"] @ x + weights["up.bias"])
        projector.append(weights["scale"] * weights["gate"] * (weights["down.weight"] @ x + weights["down.bias"]))
    ids = native["input_ids"][0]
    config = model.config
    audio = ((ids == config.audio_token_id) | (ids == config.audio_delay_token_id)).nonzero()[:, 0]

    def raise_reference(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = arguments[0].clone()
        hidden[0, audio[: len(projector)]] += torch.stack(projector)
        return (hidden, *arguments[1:])

    handle = model.model.layers[0].register_forward_pre_hook(raise_reference)
    try:
        return model(**native).logits[0]
    finally:
        handle.remove()


def test_an_open_gate_raises_the_references_rows_alone(
    family: HiggsAudioV2Family, tokenizer: Any, cases: list[Case], heard: list[list[np.ndarray]]
) -> None:
    """Against a second implementation, through plain transformers; packed and padded, fast and native agree with it."""
    batch, model = batch_of(family, cases, heard), model_of(family, gate=1.0)
    with torch.no_grad():
        logits = model.audio_lm_head(family._target_states(model, batch)[0])
    first = cases[0].utterance.rows - 1
    alone = 2 * first  # the sample without a reference comes second
    for case, extra, start in ((cases[0], heard[0], 0), (cases[1], heard[1], alone)):
        places = family.encode(case.sample, [*case.features, *extra]).arrays["audio_positions"]
        expected = expected_logits(model, tokenizer, case, extra[0])[places]
        assert float((logits[start : start + len(places)] - expected).abs().max()) <= 1e-5
    base = family.load(FP32).eval()
    plain = base.audio_lm_head(target_states(base.model, batch)[0])
    assert float((logits[first:alone] - plain[first:alone]).abs().max()) <= 1e-5
    assert float((logits[:first] - plain[:first]).abs().max()) > 0.05


def test_generation_hears_what_training_hears(
    tiny_base: Path, whisper: Path, cases: list[Case], heard: list[list[np.ndarray]]
) -> None:
    """Teacher-forced logits of training choose the rows that generation speaks, prompts of other lengths beside it."""
    family = conditioned_family(tiny_base, whisper)
    model = model_of(family, gate=1.0)
    prompts = [(replace(c.sample, audio=None), [c.features[0], *h]) for c, h in zip(cases, heard, strict=True)]
    prompts.append((replace(cases[0].sample, references=(), audio=None), []))
    together = family.generate_rows(model, prompts, GREEDY)
    for prompt, rows in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(family.generate_rows(model, [prompt], GREEDY)[0], rows)
    closed = family.generate_rows(model_of(family), prompts, GREEDY)
    assert not np.array_equal(closed[:2], together[:2]) and np.array_equal(closed[2], together[2])
    # the first generated row is the best one behind the prompt in a training batch
    spoken = family.encode(cases[0].sample, [*cases[0].features, *heard[0]])
    with torch.no_grad():
        logits = model.audio_lm_head(family._target_states(model, family.collate([spoken]))[0])
    best = logits[0].unflatten(-1, (8, -1)).argmax(-1)
    assert together[0][1][0] == best[0]


def test_what_is_added_is_measured_by_the_rows(tiny_base: Path, whisper: Path, cases: list[Case]) -> None:
    """Twenty times the root mean square of the rows of real clips; kept, as full training changes them."""
    family = conditioned_family(tiny_base, whisper)
    model = model_of(family)
    codes = torch.from_numpy(np.concatenate([case.features[1] for case in cases]).astype(np.int64))
    with torch.no_grad():
        rows = model.model.embed_audio_tokens(codes)
    assert float(model.reference_projector.scale) == pytest.approx(20 * float(rows.square().mean().sqrt()), rel=0.1)
    assert "scale" in model.reference_projector.state_dict()


def test_gradients_reach_every_tensor(
    family: HiggsAudioV2Family, cases: list[Case], heard: list[list[np.ndarray]]
) -> None:
    """Through a closed gate the gate alone learns, through an open one everything; no reference gives zeros."""
    for gate, reached in ((None, {"gate"}), (0.5, {"gate", "norm", "up", "down"})):
        model = model_of(family, gate=gate).train()
        batch = batch_of(family, cases, heard)
        mean_loss(family.losses(model, batch), batch).backward()
        grads = {name: parameter.grad for name, parameter in model.reference_projector.named_parameters()}
        assert {name.partition(".")[0] for name, grad in grads.items() if grad is not None and grad.any()} == reached
    model = model_of(family, gate=0.5).train()
    alone = replace(cases[0].sample, references=())
    batch = family.collate([family.encode(alone, cases[0].features[1:])])
    mean_loss(family.losses(model, batch), batch).backward()
    for parameter in model.reference_projector.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def test_a_reference_that_nobody_heard_is_an_error(tiny_base: Path, whisper: Path, cases: list[Case]) -> None:
    """Codes alone would make a conditioned model answer as if nothing had been said."""
    family = conditioned_family(tiny_base, whisper)
    with pytest.raises(ManifestError, match="Whisper heard 0 of 1 references"):
        family.encode(cases[0].sample, cases[0].features)
    with pytest.raises(ManifestError, match="Whisper heard 1 of 0 references"):
        family_on(tiny_base / "model").encode(cases[0].sample, [*cases[0].features, cases[0].features[0]])


def test_several_references_each_raise_their_own_rows(
    tiny_base: Path, whisper: Path, cases: list[Case], heard: list[list[np.ndarray]]
) -> None:
    """Another sound in the second reference changes its own rows and no others."""
    family = conditioned_family(tiny_base, whisper)
    first, second = cases
    sample = replace(first.sample, references=(*first.sample.references, *second.sample.references))
    codes = [first.features[0], second.features[0], first.features[1]]
    both = family.encode(sample, [*codes, heard[0][0], heard[1][0]]).arrays["reference_features"]
    other = family.encode(sample, [*codes, heard[0][0], 2 * heard[1][0]]).arrays["reference_features"]
    boundary = len(codes[0]) + 9
    assert len(both) == boundary + len(codes[1]) + 9
    np.testing.assert_array_equal(both[:boundary], other[:boundary])
    np.testing.assert_allclose(2 * both[boundary:], other[boundary:], rtol=1e-5)


def test_training_opens_the_gate(
    tiny_base: Path, whisper: Path, cases: list[Case], heard: list[list[np.ndarray]]
) -> None:
    """The projector alone, on a frozen base: the loss falls, and without the features the answers are others."""
    family = conditioned_family(tiny_base, whisper)
    model = model_of(family)
    model.requires_grad_(False)
    projector = model.reference_projector.requires_grad_(True)
    batch = batch_of(family, cases, heard)
    first = float(mean_loss(family.losses(model, batch), batch).detach())
    overfit(projector.parameters(), lambda: mean_loss(family.losses(model, batch), batch), 30, 1e-2)
    assert float(mean_loss(family.losses(model, batch), batch).detach()) < first - 0.1
    assert float(projector.gate.abs().max()) > 1e-3
    silent = {**batch.inputs, "reference_features": torch.zeros_like(batch.inputs["reference_features"])}
    difference = states(family, model, batch) - states(family, model, replace(batch, inputs=silent))
    assert float(difference.abs().max()) > 1e-3


def test_features_are_cached_under_a_key_of_their_own(
    tiny_base: Path, whisper: Path, demo_clips: list[DemoClip], tmp_path: Path
) -> None:
    """References alone are heard, once each; another Whisper is another key; Whisper is gone afterwards."""
    family = conditioned_family(tiny_base, whisper)
    refs = [AudioRef(str(clip.path)) for clip in demo_clips[:3]]
    samples = [
        Sample("a", "one", refs[0], (Clip(refs[1], "two"),)),
        Sample("b", "two", refs[2], (Clip(refs[1], "two"),)),
        Sample("c", "three", refs[1]),
    ]
    encoded = encode_samples(family, samples, tmp_path, quiet=True)
    assert encoded.report.num_clips == 3 + 1 and encoded.report.num_encoded == 4
    codes, target, sound = encoded.features(0)
    assert codes.dtype == target.dtype == np.int16 and sound.dtype == np.float16 and sound.shape[1] == 32
    assert abs(len(sound) / 50 - demo_clips[1].duration_seconds) < 0.1
    assert len(encoded.features(2)) == 1 and len(encoded.prompt_features(0)) == 2
    assert np.array_equal(encoded.prompt_features(0)[1], sound)
    again = encode_samples(family, samples, tmp_path, quiet=True)
    assert again.report.num_encoded == 0 and again.fingerprint == encoded.fingerprint
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is native_whisper.WhisperEncoder]
    tiny.make_whisper(tmp_path / "other", seed=1)
    other = conditioned_family(tiny_base, tmp_path / "other")
    anew = encode_samples(other, samples, tmp_path, quiet=True)
    assert anew.report.num_encoded == 1 and anew.fingerprint != encoded.fingerprint
    plain = encode_samples(family_on(tiny_base / "model", tiny_base / "codec"), samples, tmp_path, quiet=True)
    assert plain.report.num_encoded == 0 and plain.fingerprint != encoded.fingerprint


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"whisper_path": "w"}, r"whisper_path is for model\.reference_conditioning=whisper"),
        ({"reference_positions": 4}, "reference_positions is for"),
        ({"freeze_reference_projector": True}, "freeze_reference_projector is for"),
        ({"reference_conditioning": "whisper"}, r"needs model\.whisper_path"),
        (
            {"reference_conditioning": "hubert", "whisper_path": "w"},
            r"reference_conditioning: Input should be 'whisper'",
        ),
        (
            {"reference_conditioning": "whisper", "whisper_path": "w", "reference_positions": 0},
            "reference_positions: .*1",
        ),
    ],
)
def test_half_an_option_is_refused(tiny_base: Path, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        family_on(tiny_base / "model", tiny_base / "codec", **values)


def test_what_is_no_whisper_is_refused(tiny_base: Path, whisper: Path, tmp_path: Path) -> None:
    """Before anything is encoded, and by name."""
    with pytest.raises(ConfigError, match=r"whisper_path=.*: no such folder"):
        conditioned_family(tiny_base, tmp_path / "nowhere").check_base()
    with pytest.raises(ConfigError, match="model_type is 'higgs_audio_v2', not whisper"):
        conditioned_family(tiny_base, tiny_base / "model").check_base()
    with pytest.raises(ConfigError, match="none of the samples has a reference"):
        conditioned_family(tiny_base, whisper).expand([Sample("a", "text", AudioRef("a.wav"))])

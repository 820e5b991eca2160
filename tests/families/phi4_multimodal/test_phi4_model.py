"""Phi-4-multimodal: speech input, prompt, loss and answers, against plain transformers and a formula."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Phi4MultimodalFeatureExtractor

from helpers import WAYS
from phi4_cases import FP32, encoded, family_on, features, native_inputs, native_logits
from speechtune.audio import read_audio
from speechtune.errors import AudioError, ConfigError, ManifestError
from speechtune.families.phi4_multimodal.audio import embed_clips, num_positions, pad_features
from speechtune.families.phi4_multimodal.family import Phi4MultimodalFamily
from speechtune.families.phi4_multimodal.forward import target_states
from speechtune.tasks.pronunciation.targets import SCORE_FIELDS, render_answer, target_of, task_of
from speechtune.training.run import Outcome
from speechtune.types import Audio, Batch, GenerationOptions, Mispronunciation, Pronunciation, Sample, Word

LENGTHS = (37, 120, 64, 233, 64, 91, 8, 401)  # frames; not sorted, one of them twice, one below a stride


@pytest.fixture(scope="module", params=WAYS, ids=str)
def phi4_family(phi4_base: Path, request: pytest.FixtureRequest) -> Phi4MultimodalFamily:
    """The family in each of the ways to compute the same: packed or padded, the layers fast or native."""
    return family_on(phi4_base, **request.param)


@pytest.fixture(scope="module")
def model(phi4_family: Phi4MultimodalFamily) -> torch.nn.Module:
    return phi4_family.load(FP32).eval()


def all_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, ...]:
    """Logits (S, V) of every sample of a batch, at all its positions."""
    everywhere = dict(batch.inputs) | {"kept": torch.arange(sum(batch.lengths))}
    return model.lm_head(target_states(model, replace(batch, inputs=everywhere))).split(list(batch.lengths))


def clips_of(lengths: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(14, 3, (length, 80)).astype(np.float32) for length in lengths]


@torch.no_grad()
def test_each_clip_of_a_padded_batch_is_encoded_as_by_the_native_encoder_alone(model: torch.nn.Module) -> None:
    """Guards against the native padding mask: added as +1, it lets neighbours change an encoding by a fifth."""
    audio_embed = model.model.embed_tokens_extend.audio_embed
    clips = clips_of(LENGTHS)
    together = embed_clips(audio_embed, *pad_features(clips, 8)).split([num_positions(n, 8) for n in LENGTHS])
    for clip, found in zip(clips, together, strict=True):
        native = audio_embed.encoder(torch.from_numpy(clip)[None], None)
        native = audio_embed.down_proj_for_speech(torch.nn.functional.gelu(audio_embed.up_proj_for_speech(native)))[0]
        torch.testing.assert_close(found, native, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_the_native_encoder_does_depend_on_batch_mates(model: torch.nn.Module) -> None:
    """The issue the test above guards against is there: were it fixed upstream, our own encoder could go."""
    encoder = model.model.embed_tokens_extend.audio_embed.encoder
    short, long = map(torch.from_numpy, clips_of((100, 300)))
    alone = encoder(short[None], None)[0]
    padded = torch.nn.utils.rnn.pad_sequence([short, long], batch_first=True)
    mask = torch.arange(300) < torch.tensor([[100], [300]])
    assert float((encoder(padded, mask)[0, : len(alone)] - alone).abs().max()) > 1e-2


def test_features_are_those_of_the_native_extractor_whatever_the_batch(phi4_family: Phi4MultimodalFamily) -> None:
    rng = np.random.default_rng(1)
    audios = [Audio(rng.normal(0, 0.1, n).astype(np.float32), 16_000) for n in (9000, 16_000, 12_345)]
    together = phi4_family.encode_audio(audios)
    for audio, found in zip(audios, together, strict=True):
        native = Phi4MultimodalFeatureExtractor()(audio.samples, sampling_rate=16_000)["audio_input_features"][0]
        np.testing.assert_array_equal(found, native)


def test_prompt_and_logits_are_those_of_plain_transformers(
    phi4_family: Phi4MultimodalFamily, phi4_base: Path, phi4_samples: list[Sample], model: torch.nn.Module
) -> None:
    for sample in phi4_samples[:4]:
        ids = phi4_family.prompt_ids(task_of(sample), len(features(phi4_family, sample)[0]))
        assert ids.tolist() == native_inputs(phi4_base, sample)["input_ids"][0].tolist()
    batch = phi4_family.collate(encoded(phi4_family, phi4_samples[:4]))
    with torch.no_grad():
        for row, sample in zip(all_logits(model, batch), phi4_samples[:4], strict=True):
            native = native_logits(model, phi4_base, sample)[0]
            torch.testing.assert_close(row[: len(native)], native, atol=1e-4, rtol=1e-4)


def test_the_loss_is_the_cross_entropy_of_the_answer_alone(
    phi4_family: Phi4MultimodalFamily, phi4_base: Path, phi4_samples: list[Sample], model: torch.nn.Module
) -> None:
    """Against a float64 formula on plain transformers' logits, sample by sample, unpadded."""
    wanted, counts = {"APA": 0.0, "MDD": 0.0}, {"APA": 0, "MDD": 0}
    for sample in phi4_samples:
        inputs = native_inputs(phi4_base, sample)
        answer = phi4_family.tokenizer(render_answer(target_of(sample)) + "<|end|>", add_special_tokens=False)
        ids = torch.tensor([answer["input_ids"]])
        prompt_length = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs).logits[0, prompt_length - 1 : -1].double()
        chosen = logits.gather(1, ids[0, :, None])[:, 0]
        wanted[task_of(sample)] += float((logits.logsumexp(1) - chosen).sum())
        counts[task_of(sample)] += ids.shape[1]
    batch = phi4_family.collate(encoded(phi4_family, phi4_samples))
    with torch.no_grad():
        found = {head: float(value) for head, value in phi4_family.losses(model, batch).sums.items()}
    assert dict(batch.target_counts) == counts
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_batch_of_one_task_has_one_head(phi4_family: Phi4MultimodalFamily, phi4_samples: list[Sample]) -> None:
    batch = phi4_family.collate(encoded(phi4_family, phi4_samples[::2]))
    assert set(batch.target_counts) == {"APA"}


def test_an_answer_does_not_depend_on_batch_mates(phi4_run: Outcome, phi4_samples: list[Sample]) -> None:
    """Alone, and in a batch of eight of mixed lengths: the same text, and logits within 1e-4."""
    family, model = phi4_run.job.family, phi4_run.job.model.eval()
    assert isinstance(family, Phi4MultimodalFamily)
    chosen = [
        replace(s, id=str(n), audio=replace(s.audio, duration_seconds=0.4 + 0.37 * ((n * 5) % 8)))
        for n, s in enumerate(phi4_samples[:8])
        if s.audio
    ]
    pairs = [(sample, features(family, sample)) for sample in chosen]
    assert len({len(found[0]) for _, found in pairs}) == 8
    options = GenerationOptions(max_new_tokens=60)
    together = family.generate(model, pairs, options)
    alone = [family.generate(model, [pair], options)[0] for pair in pairs]
    assert [output.text for output in together] == [output.text for output in alone]
    base = model.get_base_model()
    items = [family.encode(sample, found) for sample, found in pairs]
    with torch.no_grad():
        for item, row in zip(items, all_logits(base, family.collate(items)), strict=True):
            (single,) = all_logits(base, family.collate([item]))
            assert float((row[: len(single)] - single).abs().max()) < 1e-4 * max(1.0, float(single.abs().max()))


@pytest.mark.parametrize(
    ("seconds", "rate", "reason"),
    [
        (41.0, 16_000, "41.0 s is longer than 40 s"),
        (0.02, 16_000, "shorter than one window"),
        (1.0, 8000, "wants 16000"),
    ],
)
def test_audio_the_encoder_cannot_take_is_refused(
    phi4_family: Phi4MultimodalFamily, seconds: float, rate: int, reason: str
) -> None:
    with pytest.raises(AudioError, match=reason):
        phi4_family.encode_audio([Audio(np.zeros(round(seconds * rate), np.float32), rate)])


def test_a_clip_of_40_seconds_is_taken(phi4_family: Phi4MultimodalFamily, model: torch.nn.Module) -> None:
    """The longest one fills 500 positions, the most the encoder takes in one piece."""
    rng = np.random.default_rng(0)
    clips = [Audio(rng.normal(0, 0.1, n).astype(np.float32), 16_000) for n in (16_000, 640_000)]
    found = phi4_family.encode_audio(clips)
    audio_embed = model.model.embed_tokens_extend.audio_embed
    with torch.no_grad():
        embeds = embed_clips(audio_embed, *pad_features(found, 8))
    assert len(embeds) == 13 + 500 and bool(embeds.isfinite().all())


@pytest.mark.parametrize("kind", ["int16", "8 kHz", "44.1 kHz stereo"])
def test_other_kinds_of_recordings_come_in_as_16_khz_float(
    phi4_family: Phi4MultimodalFamily, tmp_path: Path, kind: str
) -> None:
    """Guards against unscaled int16 and unchecked rates, which the native extractor takes without a word."""
    import soundfile

    rate = {"int16": 16_000, "8 kHz": 8000, "44.1 kHz stereo": 44_100}[kind]
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    samples = np.stack([tone, tone], 1) if "stereo" in kind else tone
    soundfile.write(tmp_path / "clip.wav", samples, rate, subtype="PCM_16")
    from speechtune.types import AudioRef

    audio = read_audio(AudioRef(path=str(tmp_path / "clip.wav")), phi4_family.sampling_rate)
    assert audio.samples.dtype == np.float32 and 0.25 < float(np.abs(audio.samples).max()) < 0.35
    (found,) = phi4_family.encode_audio([audio])
    assert abs(len(found) - 98) <= 1
    assert found.mean(0).argmax() == pytest.approx(16, abs=3)  # the mel bin of 440 Hz, whatever the file's rate


def test_placeholders_without_features_are_refused(
    phi4_family: Phi4MultimodalFamily, phi4_samples: list[Sample]
) -> None:
    """Guards against placeholders that keep their meaningless embeddings and give a normal-looking loss."""
    items = encoded(phi4_family, phi4_samples[:2])
    shorter = {**items[0].arrays, "features": items[0].arrays["features"][:-16]}
    with pytest.raises(ManifestError, match=r"\d+ audio placeholders in the prompts, \d+ audio positions"):
        phi4_family.collate([replace(items[0], arrays=shorter), items[1]])


@pytest.mark.parametrize(("policy", "said"), [("base", "L IY"), ("unk", "<unk> IY")])
def test_the_recipe_says_what_an_accent_is_learnt_as(phi4_base: Path, policy: str, said: str) -> None:
    word = Word("LEA", ("L", "IY"), mispronunciations=(Mispronunciation(0, "L", "L*"),))
    sample = Sample(
        "one", "LEA", None, pronunciation=Pronunciation(scores=dict.fromkeys(SCORE_FIELDS, 5), words=(word,))
    )
    apa, mdd = family_on(phi4_base, data={"star_policy": policy}).expand([sample])
    assert target_of(mdd) == {"word_transcript": "lea", "phoneme_transcript": said}
    assert target_of(apa) == dict.fromkeys(SCORE_FIELDS, 5)


def test_a_special_token_in_an_answer_is_refused(phi4_family: Phi4MultimodalFamily, phi4_samples: list[Sample]) -> None:
    target = {"word_transcript": "a<|audio|>b", "phoneme_transcript": "AA"}
    sample = replace(phi4_samples[1], pronunciation=Pronunciation("MDD", target))
    with pytest.raises(ManifestError, match=r"special token '<\|audio\|>'"):
        phi4_family.encode(sample, features(phi4_family, sample))


def test_control_tokens_are_plain_text_or_tokens_of_their_own(phi4_base: Path) -> None:
    plain = family_on(phi4_base)
    own = family_on(phi4_base, lora={"trainable_tokens": ["<|APA|>", "<|MDD|>"]})
    assert len(plain.tokenizer("<|APA|>", add_special_tokens=False)["input_ids"]) > 1
    size = len(plain.tokenizer)
    assert own.token_indices(("<|APA|>", "<|MDD|>")) == {"embed_tokens": [size, size + 1]}
    assert size in own.prompt_ids("APA", 80) and size not in plain.prompt_ids("APA", 80)


def test_an_unknown_control_token_is_refused(phi4_base: Path) -> None:
    with pytest.raises(ConfigError, match="none of"):
        _ = family_on(phi4_base, lora={"trainable_tokens": ["<|XYZ|>"]}).tokenizer

"""The loss: against a formula in loops and float64, and the labels against the rules they follow."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration, PreTrainedTokenizerBase

from helpers import CODEBOOKS, STREAM_BOS, STREAM_EOS, WAYS, Utterance, native_batch
from higgs_cases import FP32, Case, collated, family_on
from speechtune.errors import ManifestError
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
from speechtune.families.higgs_audio_v2.forward import target_states
from speechtune.types import Batch


@pytest.fixture(params=WAYS, ids=str)
def family(tiny_base: Path, request: pytest.FixtureRequest) -> HiggsAudioV2Family:
    """The family in each of the ways to compute the same: packed or padded, the layers fast or native."""
    return family_on(tiny_base / "model", tiny_base / "codec", **request.param)


@pytest.fixture
def model(family: HiggsAudioV2Family) -> nn.Module:
    """A fresh base."""
    return family.load(FP32).eval()


@torch.no_grad()
def independent_sums(model: Any, tokenizer: PreTrainedTokenizerBase, utterances: Sequence[Utterance]) -> list[float]:
    """Audio and text loss, each target by itself: -log softmax in float64 over plain native logits."""
    batch = native_batch(tokenizer, utterances)
    logits_BSKV = model(**batch).logits.double().unflatten(-1, (CODEBOOKS, -1))
    text_BSV = model.text_lm_head(model.model(**batch).last_hidden_state).double()
    ids_BS = batch["input_ids"].tolist()
    audio, text = 0.0, 0.0
    for b, utterance in enumerate(utterances):
        row_ids = tokenizer.convert_tokens_to_ids(["<|AUDIO_OUT|>", "<|reserved_special_token_6|>"])
        places = [s for s, token in enumerate(ids_BS[b]) if token in row_ids][-utterance.rows :]
        for k in range(CODEBOOKS):
            stream = [*utterance.codes[:, k].tolist(), STREAM_EOS]
            for frame, target in enumerate(stream):
                before = places[frame + k]  # frame f of codebook k stands in row f + k + 1
                audio -= float(logits_BSKV[b, before, k].log_softmax(-1)[target])
        for name in ("<|audio_out_bos|>", "<|audio_eos|>", "<|eot_id|>"):
            token = tokenizer.convert_tokens_to_ids(name)
            place = max(s for s, found in enumerate(ids_BS[b]) if found == token)
            text -= float(text_BSV[b, place - 1].log_softmax(-1)[token])
    return [audio, text]


def test_loss_equals_the_formula(
    family: HiggsAudioV2Family, model: nn.Module, tokenizer: PreTrainedTokenizerBase, cases: list[Case]
) -> None:
    """Issue: audio logits compared with their own row instead of the next (loss 0.003, then silence)."""
    sums = family.losses(model, collated(family, cases)).sums
    expected = independent_sums(model, tokenizer, [case.utterance for case in cases])
    assert list(sums) == ["audio", "text"]
    assert [float(value.detach()) for value in sums.values()] == pytest.approx(expected, rel=1e-6)


def test_loss_of_a_batch_is_the_sum_of_its_samples(
    family: HiggsAudioV2Family, model: nn.Module, cases: list[Case]
) -> None:
    """Padding and batch mates must not enter: the loop divides sums over all micro-batches and ranks."""
    with torch.no_grad():
        together = family.losses(model, collated(family, cases)).sums
        alone = [family.losses(model, collated(family, [case])).sums for case in cases]
    for head in family.heads:
        assert float(together[head]) == pytest.approx(sum(float(one[head]) for one in alone), rel=1e-6)


@torch.no_grad()
def test_counts_divide_to_the_native_class_mean(
    family: HiggsAudioV2Family, model: Any, tokenizer: PreTrainedTokenizerBase, cases: list[Case]
) -> None:
    """Sum over count, added up over heads, is what the native `forward` calls loss, given our targets as labels."""
    batch = collated(family, cases)
    native = native_batch(tokenizer, [case.utterance for case in cases])
    labels, audio_labels = torch.full_like(native["input_ids"], -100), torch.full_like(native["audio_input_ids"], -100)

    def place(position: torch.Tensor) -> tuple[int, int]:
        """Sample and place of what a position in the laid out batch predicts."""
        b = int(torch.searchsorted(batch.inputs["offsets"], position, right=True)) - 1
        return b, int(position) + 1 - int(batch.inputs["offsets"][b])

    for position, target in zip(batch.inputs["text_positions"], batch.inputs["text_targets"], strict=True):
        labels[place(position)] = target
    is_row = (native["input_ids"] == model.config.audio_token_id) | (
        native["input_ids"] == model.config.audio_delay_token_id
    )
    row_of = is_row.cumsum(1) - 1
    for position, targets in zip(batch.inputs["audio_positions"], batch.inputs["audio_targets"], strict=True):
        b, s = place(position)
        audio_labels[b, row_of[b, s]] = targets
    losses = family.losses(model, batch).sums
    ours = sum(float(losses[head]) / batch.target_counts[head] for head in family.heads)
    assert ours == pytest.approx(float(model(**native, labels=labels, audio_labels=audio_labels).loss), rel=1e-6)


def test_fresh_model_guesses(tiny_base: Path, cases: list[Case]) -> None:
    """Near-uniform logits cost ln(1026) in each of 8 codebooks and ln(vocabulary) in the text."""
    family = family_on(tiny_base / "model")
    config = HiggsAudioV2Config.from_pretrained(tiny_base / "model", initializer_range=0.002)
    torch.manual_seed(0)
    fresh = HiggsAudioV2ForConditionalGeneration(config, use_text_head=True).eval()
    batch = collated(family, cases)
    sums = family.losses(fresh, batch).sums
    means = {head: float(sums[head].detach()) / batch.target_counts[head] for head in family.heads}
    assert means["audio"] == pytest.approx(8 * math.log(1026), rel=1e-3)
    assert means["text"] == pytest.approx(math.log(config.vocab_size), rel=1e-2)


def test_target_counts(family: HiggsAudioV2Family, cases: list[Case]) -> None:
    """Audio: frames and one EOS per sample, counted once for all codebooks; text: three tokens per sample."""
    batch = collated(family, cases)
    assert batch.target_counts == {"audio": (12 + 1) + (17 + 1), "text": 2 * 3}
    targets_PK = batch.inputs["audio_targets"]
    assert (targets_PK != -100).sum(0).tolist() == [31] * CODEBOOKS
    assert batch.audio_seconds == pytest.approx((12 + 17) / 25)
    sizes = [len(family.encode(case.sample, case.features).arrays["input_ids"]) for case in cases]
    assert batch.num_tokens == sum(sizes)
    assert batch.lengths == (tuple(sizes) if family.config.batch.packing else (max(sizes),) * 2)


def test_eos_once_per_codebook_and_no_bos(family: HiggsAudioV2Family, cases: list[Case]) -> None:
    """Issues: EOS never trained, so nothing stops; BOS trained, which the model never chooses."""
    targets_PK = family.encode(cases[0].sample, cases[0].features).arrays["audio_targets"]
    assert (targets_PK == STREAM_EOS).sum(0).tolist() == [1] * CODEBOOKS
    assert not (targets_PK == STREAM_BOS).any()
    for k in range(CODEBOOKS):
        trained = targets_PK[targets_PK[:, k] != -100, k]
        np.testing.assert_array_equal(trained, [*cases[0].utterance.codes[:, k], STREAM_EOS])


def test_text_targets_are_three_tokens_of_the_target_turn(
    family: HiggsAudioV2Family, tokenizer: PreTrainedTokenizerBase, cases: list[Case]
) -> None:
    """The prompt's words are given at inference, so they are not learnt; the reference's tokens neither."""
    for case in cases:
        arrays = family.encode(case.sample, case.features).arrays
        names = tokenizer.convert_ids_to_tokens(arrays["text_targets"].tolist())
        assert names == ["<|audio_out_bos|>", "<|audio_eos|>", "<|eot_id|>"]
        ids = arrays["input_ids"]
        np.testing.assert_array_equal(ids[arrays["text_positions"] + 1], arrays["text_targets"])
        end = len(ids)
        assert arrays["text_positions"].tolist() == [end - 2 - case.utterance.rows - 2, end - 3, end - 2]


def test_reference_is_not_trained(family: HiggsAudioV2Family, cases: list[Case]) -> None:
    """Issue: training on the reference teaches the model to repeat it. Other codes there change no target."""
    case = cases[1]
    before = family.encode(case.sample, case.features)
    after = family.encode(case.sample, [(case.features[0] + 7) % 1024, case.features[1]])
    changed = {name for name, array in before.arrays.items() if not np.array_equal(array, after.arrays[name])}
    assert changed == {"audio_rows"}
    ids, places = before.arrays["input_ids"], before.arrays["audio_positions"]
    reference_rows = len(case.features[0]) + 2
    assert (ids[: places[0]] == family.model_config.audio_token_id).sum() == reference_rows
    np.testing.assert_array_equal(places, np.arange(places[0], places[0] + case.utterance.rows - 1))


def test_second_epoch_has_the_same_labels(family: HiggsAudioV2Family, cases: list[Case]) -> None:
    """Issue: labels mutated in place, so that the second epoch has none. Codes from the cache are read-only."""
    features = [array.copy() for array in cases[0].features]
    for array in features:
        array.flags.writeable = False
    items = [family.encode(cases[0].sample, features), family.encode(cases[1].sample, cases[1].features)]
    kept = copy.deepcopy(items)
    first, second = family.collate(items), family.collate(items)
    for name, value in first.inputs.items():
        assert torch.equal(value, second.inputs[name])
    first.inputs["audio_targets"].fill_(-100)
    for item, copied in zip(items, kept, strict=True):
        for name, array in item.arrays.items():
            np.testing.assert_array_equal(array, copied.arrays[name])


def test_sample_without_target_or_clip_is_refused(family: HiggsAudioV2Family, cases: list[Case]) -> None:
    """Issue: the audio index shifted onto the wrong clip where one was missing."""
    with pytest.raises(ManifestError, match="1 clips for 2 places"):
        family.encode(cases[0].sample, cases[0].features[:1])


@torch.no_grad()
def our_logits(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of both heads at the positions where the family applies them."""
    audio, text = target_states(model.model, batch)
    return model.audio_lm_head(audio), model.text_lm_head(text)


def test_padding_does_not_matter(
    family: HiggsAudioV2Family, model: Any, tokenizer: PreTrainedTokenizerBase, cases: list[Case]
) -> None:
    """Each sample's logits in the batch are those of the sample alone, unpadded, in the plain native forward.

    Applying the heads only at targets is a saving, not another model.
    """
    audio, _ = our_logits(model, collated(family, cases))
    first = 0
    for case in cases:
        count = case.utterance.rows - 1
        native = native_batch(tokenizer, [case.utterance])
        with torch.no_grad():
            plain = model(**native).logits[0]
        places = family.encode(case.sample, case.features).arrays["audio_positions"]
        assert float((audio[first : first + count] - plain[places]).abs().max()) <= 1e-5
        first += count
    assert first == len(audio)

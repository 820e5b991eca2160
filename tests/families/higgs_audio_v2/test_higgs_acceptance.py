"""The acceptance table: what is trained here must speak, and stop, in plain transformers.

Two real utterances are overfitted under three kinds of labels, then generated with nothing but transformers and the
independent helpers. Only delayed codes with one EOS per codebook both say the right thing and stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    HiggsAudioV2ForConditionalGeneration,
    HiggsAudioV2Processor,
    PreTrainedTokenizerBase,
)

from helpers import (
    CODEBOOKS,
    IGNORED,
    STREAM_BOS,
    STREAM_EOS,
    Utterance,
    native_batch,
    overfit,
    prompt_text,
    undelayed,
)
from higgs_cases import RATE, STEPS, Case
from speechtune.audio import read_audio
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family

CAP = 30
"""Rows a model may go on after the place where it should have stopped."""


@dataclass(frozen=True)
class Spoken:
    """What plain transformers generated: rows, the first all-EOS row counted from 1 (0: none), share of right codes."""

    rows: int
    stop: int
    right: float


@pytest.fixture
def two(cases: list[Case]) -> list[Utterance]:
    """Both utterances, in the terms of the independent helpers."""
    return [case.utterance for case in cases]


def speak(model: Any, tokenizer: PreTrainedTokenizerBase, utterance: Utterance) -> Spoken:
    """Generate greedily with the native class, from inputs that speechtune had no part in."""
    batch = native_batch(tokenizer, [utterance], with_target=False, left=True)
    prompt_rows = batch["audio_input_ids"].shape[1]
    torch.manual_seed(0)
    generated = model.generate(**batch, do_sample=False, max_new_tokens=utterance.rows + CAP)
    rows = generated[0, prompt_rows:].numpy()
    ends = np.flatnonzero((rows == STREAM_EOS).all(axis=1))
    right = float((undelayed(rows, len(utterance.codes)) == utterance.codes).mean())
    return Spoken(len(rows), int(ends[0]) + 1 if len(ends) else 0, right)


def head_losses(
    model: Any, inputs: dict[str, torch.Tensor], audio_labels: torch.Tensor, labels: torch.Tensor | None
) -> torch.Tensor:
    """The native class's own loss, with its heads applied only where a label is (its logits take most of the time)."""
    hidden = model.model(**inputs).last_hidden_state
    rows = torch.full((*inputs["input_ids"].shape, CODEBOOKS), IGNORED)
    config = model.config
    is_row = (inputs["input_ids"] == config.audio_token_id) | (inputs["input_ids"] == config.audio_delay_token_id)
    rows[is_row] = audio_labels[inputs["audio_input_ids_mask"]]
    place = (rows[:, 1:] != IGNORED).any(-1)
    logits = model.audio_lm_head(hidden[:, :-1][place]).unflatten(-1, (CODEBOOKS, -1))
    targets = rows[:, 1:][place]
    loss = sum(torch.nn.functional.cross_entropy(logits[:, k], targets[:, k]) for k in range(CODEBOOKS))
    if labels is not None:
        place = labels[:, 1:] != IGNORED
        text = model.text_lm_head(hidden[:, :-1][place])
        loss = loss + torch.nn.functional.cross_entropy(text, labels[:, 1:][place])
    return torch.as_tensor(loss)


def processor_labels(config: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels as `HiggsAudioV2Processor(..., output_labels=True)` makes them: every EOS masked, all clips trained."""
    audio = batch["audio_input_ids"].clone()
    audio[(audio == STREAM_BOS) | (audio == STREAM_EOS)] = IGNORED
    text = batch["input_ids"].clone()
    for token in (config.audio_token_id, config.pad_token_id, config.audio_bos_token_id):
        text[text == token] = IGNORED
    return audio, text


def undelayed_labels(batch: dict[str, torch.Tensor], utterances: Sequence[Utterance]) -> torch.Tensor:
    """Labels without delay: the target's codes and one EOS per codebook, each row in one piece."""
    labels = torch.full_like(batch["audio_input_ids"], IGNORED)
    for b, utterance in enumerate(utterances):
        first = len(utterance.reference_codes) + 2 + 1
        trained = slice(first, first + len(utterance.codes) + 1)
        labels[b, trained] = batch["audio_input_ids"][b, trained]
    return labels


def test_contrast_labels_are_the_processor_s(
    tiny_family: HiggsAudioV2Family, native_processor: HiggsAudioV2Processor, cases: list[Case]
) -> None:
    """The labels written out above are those of `HiggsAudioV2Processor`, not a straw man."""
    native = native_processor(
        text=[prompt_text(case.utterance, with_target=True) for case in cases],
        audio=[read_audio(ref, 24_000).samples for case in cases for ref in tiny_family.clips(case.sample)],
        output_labels=True,
        return_tensors="pt",
        padding_side="right",
        add_special_tokens=False,
        sampling_rate=24_000,
    )
    batch = native_batch(native_processor.tokenizer, [case.utterance for case in cases])
    audio, text = processor_labels(tiny_family.model_config, batch)
    assert torch.equal(audio, native["audio_labels"]) and torch.equal(text, native["labels"])


def native_base(folder: Path) -> Any:
    """The native class with its text head, in evaluation mode."""
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(folder, use_text_head=True).eval()


def test_trained_model_speaks_and_stops_in_plain_transformers(overfitted: Path, two: list[Utterance]) -> None:
    """Issues of the original pipeline: no shift, no delay, EOS never trained ("every output is 1 min 22 s")."""
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(overfitted)
    tokenizer = AutoTokenizer.from_pretrained(overfitted)
    spoken = [speak(model, tokenizer, utterance) for utterance in two]
    assert [one.stop for one in spoken] == [utterance.rows for utterance in two]
    assert [one.rows for one in spoken] == [utterance.rows for utterance in two]
    assert min(one.right for one in spoken) >= 0.99


def test_processor_labels_say_the_codes_and_never_stop(tiny_base: Path, two: list[Utterance]) -> None:
    """The contrast: with the native processor's labels the codes are learnt, the end is not."""
    model, tokenizer = native_base(tiny_base / "model"), AutoTokenizer.from_pretrained(tiny_base / "model")
    batch = native_batch(tokenizer, two)
    audio, text = processor_labels(model.config, batch)
    torch.testing.assert_close(
        head_losses(model, batch, audio, text), model(**batch, audio_labels=audio, labels=text).loss
    )
    overfit(model.parameters(), lambda: head_losses(model, batch, audio, text), STEPS, RATE)
    spoken = [speak(model, tokenizer, utterance) for utterance in two]
    assert [one.stop for one in spoken] == [0, 0]
    assert [one.rows for one in spoken] == [utterance.rows + CAP for utterance in two]
    assert min(one.right for one in spoken) > 0.9


def test_no_delay_stops_in_the_wrong_place_with_wrong_codes(tiny_base: Path, two: list[Utterance]) -> None:
    """The contrast: without the delay only codebook 0, an eighth of the codes, can be in its place."""
    model, tokenizer = native_base(tiny_base / "model"), AutoTokenizer.from_pretrained(tiny_base / "model")
    batch = native_batch(tokenizer, two, delay=False)
    labels = undelayed_labels(batch, two)
    overfit(model.parameters(), lambda: head_losses(model, batch, labels, None), STEPS, RATE)
    spoken = [speak(model, tokenizer, utterance) for utterance in two]
    assert all(one.stop != utterance.rows for one, utterance in zip(spoken, two, strict=True))
    assert max(one.right for one in spoken) < 0.25

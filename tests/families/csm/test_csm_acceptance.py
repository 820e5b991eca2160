"""The acceptance table: what is trained here must speak, and stop, in plain transformers.

Two real utterances, one with a reference turn before it, are overfitted, then generated greedily in both decoders with
nothing but transformers and the independent helpers. Only the end of speech in all codebooks, and a depth decoder that
gets the state before the frame, both say the right thing and stop.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, CsmProcessor, EncodecFeatureExtractor
from transformers import PreTrainedTokenizerBase as Tokenizer

from csm_cases import (
    FP32,
    IGNORED,
    RATE,
    STEPS,
    Case,
    Spoken,
    family_on,
    native_batch,
    native_output,
    plain_model,
    speak,
    train,
    turn_text,
)
from helpers import overfit
from speechtune.audio import read_audio
from speechtune.config import LoraSettings
from speechtune.families.csm.family import CsmFamily
from speechtune.lora.apply import apply_lora

CAP = 25
LORA_STEPS, LORA_RATE = 120, 1e-2
SOME_STEPS = 60  # enough for one short clip


def save_trained(family: CsmFamily, model: Any, folder: Path) -> tuple[Any, Tokenizer]:
    """Model and tokenizer as plain transformers loads what was trained."""
    model.save_pretrained(folder)
    family.save_assets(folder)
    return plain_model(folder).eval(), AutoTokenizer.from_pretrained(folder)


def assert_right(spoken: list[Spoken], cases: list[Case]) -> None:
    """Stopped at the very frame, with 99 % of the codes."""
    assert [one.stop for one in spoken] == [len(case.codes) for case in cases]
    assert [one.rows for one in spoken] == [len(case.codes) + 1 for case in cases]
    assert min(one.right for one in spoken) >= 0.99


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_full_training_speaks_and_stops(base: Path, cases: list[Case], share: float, tmp_path: Path) -> None:
    """All frames in the depth decoder, or a quarter of them in each step: that takes some steps more, ever smaller."""
    family = family_on(base, data={"depth_share": share})
    torch.manual_seed(0)
    trained = train(family, cases, family.load(FP32), STEPS if share == 1 else 180)
    if share < 1:
        trained = train(family, cases, trained, 70, RATE / 5)
    model, tokenizer = save_trained(family, trained, tmp_path / "model")
    assert_right([speak(model, tokenizer, case, CAP) for case in cases], cases)


def test_lora_speaks_and_stops(scaled_base: Path, cases: list[Case], tmp_path: Path) -> None:
    """The default preset, merged."""
    family = family_on(scaled_base)
    adapted = apply_lora(family.load(FP32), family, LoraSettings(rank=16, alpha=32, dropout=0.0), seed=0)
    merged = train(family, cases, adapted, LORA_STEPS, LORA_RATE).merge_and_unload()
    model, tokenizer = save_trained(family, merged, tmp_path / "model")
    assert_right([speak(model, tokenizer, case, CAP) for case in cases], cases)


# -- the ways that fail --------------------------------------------------------------------------------------------


def overfit_native(native: Any, loss: Callable[[], torch.Tensor], steps: int = STEPS) -> float:
    """Train the native class on a loss of its own."""
    return overfit([p for n, p in native.named_parameters() if "codec" not in n], loss, steps, RATE)


def test_end_in_codebook_0_alone_never_stops(native: Any, tokenizer: Tokenizer, cases: list[Case]) -> None:
    """All codes right, and no end: the depth decoder was never told of it."""

    def loss() -> torch.Tensor:
        batch = native_batch(native, tokenizer, cases)
        is_end = (batch["labels"] == 0).all(-1)
        assert int(is_end.sum()) == 2
        batch["labels"][..., 1:][is_end] = IGNORED
        return native(**batch, use_cache=False).loss

    overfit_native(native, loss)
    spoken = [speak(native, tokenizer, case, CAP) for case in cases]
    assert [(one.rows, one.stop) for one in spoken] == [(CAP, -1)] * 2
    assert min(one.right for one in spoken) >= 0.99


def test_a_depth_decoder_one_frame_late_knows_nothing(native: Any, tokenizer: Tokenizer, cases: list[Case]) -> None:
    """Given the state of the frame itself, its loss falls as low; in generation that state does not exist."""

    def loss() -> torch.Tensor:
        batch = native_batch(native, tokenizer, cases)
        labels = batch.pop("labels")
        states = native.backbone_model(**batch, use_cache=False).last_hidden_state
        first = torch.nn.functional.cross_entropy(native.lm_head(states[:, :-1]).mT, labels[:, 1:, 0])
        wanted = (labels != IGNORED).all(-1)
        codes = torch.nn.functional.pad(labels[wanted][:, :-1], (1, 0))
        late = {"input_ids": codes, "backbone_last_hidden_state": states[wanted], "labels": labels[wanted]}
        return first + native.depth_decoder(**late, use_cache=False).loss

    assert overfit_native(native, loss) < 0.05
    spoken = [speak(native, tokenizer, case, CAP) for case in cases]
    assert [one.stop for one in spoken] == [-1, -1]
    assert max(one.right for one in spoken) < 0.5


def test_processor_labels_train_the_context(native: Any, tokenizer: Tokenizer, cases: list[Case]) -> None:
    """-100 over the reference in the processor's labels does nothing, to the last bit: codes are written over it."""
    case = cases[0]
    processor = CsmProcessor(EncodecFeatureExtractor(sampling_rate=24_000), tokenizer)
    clips = [ref for ref in (case.sample.references[0].audio, case.sample.audio) if ref is not None]
    text = "".join(f"{turn_text(text)}<|AUDIO|><|audio_eos|>" for text, _ in case.turns)
    audio = [read_audio(ref, 24_000).samples for ref in clips]
    inputs = processor(text, audio, output_labels=True, return_tensors="pt")
    with torch.no_grad():
        plain = float(native(**inputs, use_cache=False).loss)
        inputs["labels"][:, : -len(case.codes) - 1] = IGNORED
        assert float(native(**inputs, use_cache=False).loss) == plain
        assert plain == pytest.approx(float(native_output(native, tokenizer, [case], context=True).loss), rel=1e-6)
        assert plain != pytest.approx(float(native_output(native, tokenizer, [case]).loss), rel=1e-4)


def test_a_trained_context_is_learnt_and_ours_is_not(
    base: Path, native: Any, tokenizer: Tokenizer, cases: list[Case]
) -> None:
    """Codes of the reference that the model finds afterwards, told all before: all of them, against hardly any."""
    case, family = cases[0], family_on(base)

    @torch.no_grad()
    def known(model: Any) -> float:
        batch = native_batch(model, tokenizer, [case], context=True)
        out = model(**batch, use_cache=False)
        rows = len(case.features[0])
        wanted = batch["labels"][(batch["labels"] != IGNORED).all(-1)][:rows, 1:]
        return float((out.depth_decoder_logits[:rows].argmax(-1) == wanted).float().mean())

    overfit_native(native, lambda: native_output(native, tokenizer, [case], context=True).loss, SOME_STEPS)
    assert known(native) > 0.95
    assert known(train(family, [case], family.load(FP32), SOME_STEPS)) < 0.25

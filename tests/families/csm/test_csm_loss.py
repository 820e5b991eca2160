"""The loss and what leads to it: against the native class, and against formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CsmForConditionalGeneration, CsmProcessor, EncodecFeatureExtractor
from transformers import PreTrainedTokenizerBase as Tokenizer

from csm_cases import CODEBOOKS, FP32, Case, collated, family_on, make_case, mean_loss, native_output, turn_text
from helpers import WAYS, DemoClip
from speechtune.audio import read_audio
from speechtune.config import LoraSettings
from speechtune.errors import ManifestError
from speechtune.families.csm.family import CsmFamily
from speechtune.families.csm.forward import depth_logits, depth_states, draw_rows, target_states
from speechtune.lora.apply import apply_lora
from speechtune.precision import PrecisionPlan
from speechtune.training.job import Objective, checkpoint_activations

DRAWS = 300


@pytest.fixture(params=WAYS, ids=str)
def way(base: Path, request: pytest.FixtureRequest) -> CsmFamily:
    """The family in each of the ways to compute the same: packed or padded, the layers fast or native."""
    return family_on(base, **request.param)


@pytest.fixture
def model(way: CsmFamily) -> nn.Module:
    """A fresh base."""
    return way.load(FP32).eval()


def test_loss_is_the_native_one(
    way: CsmFamily, model: nn.Module, native: Any, tokenizer: Tokenizer, cases: list[Case]
) -> None:
    """Each head's sum over its count is the native class's loss of it, context masked in all codebooks."""
    batch = collated(way, cases)
    sums = way.losses(model, batch).sums
    out = native_output(native, tokenizer, cases)
    means = {head: float(sums[head].detach()) / batch.target_counts[head] for head in way.heads}
    assert means["backbone"] == pytest.approx(float(out.backbone_loss), rel=1e-6)
    assert means["depth"] == pytest.approx(float(out.depth_decoder_loss), rel=1e-6)


def test_gradients_are_the_native_ones(
    way: CsmFamily, model: nn.Module, native: Any, tokenizer: Tokenizer, cases: list[Case]
) -> None:
    """In every parameter but the codec's, the tied table of both parts included."""
    batch = collated(way, cases)
    mean_loss(way.losses(model, batch), batch).backward()
    native_output(native, tokenizer, cases).loss.backward()
    ours = dict(model.named_parameters())
    scale = max(float(p.grad.abs().max()) for p in native.parameters() if p.grad is not None)
    for name, parameter in native.named_parameters():
        if name.startswith("codec_model."):
            assert ours[name].grad is None
            continue
        assert parameter.grad is not None and ours[name].grad is not None, name
        assert float((ours[name].grad - parameter.grad).abs().max()) <= 1e-6 * max(1.0, scale), name  # type: ignore[operator]


def test_prompt_is_the_native_processor_s(
    family: CsmFamily, native: Any, tokenizer: Tokenizer, cases: list[Case]
) -> None:
    """The processor, the codec in the model, and its own labels, all turns trained: the same loss of one turn alone."""
    (case,) = [case for case in cases if not case.sample.references]
    assert case.sample.audio is not None
    processor = CsmProcessor(EncodecFeatureExtractor(sampling_rate=24_000), tokenizer)
    audio = read_audio(case.sample.audio, 24_000).samples
    text = f"{turn_text(case.sample.text, 3)}<|AUDIO|><|audio_eos|>"
    inputs = processor(text, audio, output_labels=True, return_tensors="pt")
    out = native(**inputs, use_cache=False)
    batch = collated(family, [case])
    assert batch.inputs["input_ids"].tolist() == inputs["input_ids"].tolist()
    assert float(mean_loss(family.losses(native, batch), batch)) == pytest.approx(float(out.loss), rel=1e-6)


def test_several_turns_of_context(
    way: CsmFamily, native: Any, tokenizer: Tokenizer, model: nn.Module, demo_clips: list[DemoClip]
) -> None:
    """Two references before the target, one speaker throughout."""
    first, second, third = demo_clips[:3]
    case = make_case(way, first, 9, second, third, speaker="4")
    batch = collated(way, [case])
    assert batch.target_counts["backbone"] == 10 and len(batch.inputs["audio_rows"]) == 2 * (5 + 1) + 10
    loss = float(mean_loss(way.losses(model, batch), batch).detach())
    assert loss == pytest.approx(float(native_output(native, tokenizer, [case]).loss.detach()), rel=1e-6)


def test_as_many_rows_as_codebooks(base: Path, demo_clips: list[DemoClip]) -> None:
    """transformers' own loss fails on them; the native layers here must not, nor give another loss than the fast."""
    losses = []
    for fast in (True, False):
        family = family_on(base, speed={"fast_forward": fast})
        batch = collated(family, [make_case(family, demo_clips[0], CODEBOOKS - 1)])
        losses.append(float(family.losses(family.load(FP32), batch).sums["depth"].detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_context_is_masked(native: Any, tokenizer: Tokenizer, family: CsmFamily, cases: list[Case]) -> None:
    """Trained on the reference turn too, the loss is another: that is what the processor's labels would do."""
    batch = collated(family, cases[:1])
    ours = float(mean_loss(family.losses(native, batch), batch))
    assert ours == pytest.approx(float(native_output(native, tokenizer, cases[:1]).loss), rel=1e-6)
    assert ours != pytest.approx(float(native_output(native, tokenizer, cases[:1], context=True).loss), rel=1e-4)
    before = family.encode(cases[0].sample, cases[0].features).arrays
    other = family.encode(cases[0].sample, [(cases[0].features[0] + 7) % 64, cases[0].features[1]]).arrays
    targets = [
        family.collate([family.encode(cases[0].sample, f)]).inputs["targets"]
        for f in ([cases[0].features[0] * 0, cases[0].codes], cases[0].features)
    ]
    assert torch.equal(*targets)
    assert {name for name in before if not np.array_equal(before[name], other[name])} == {"audio_rows"}


@torch.no_grad()
def test_packed_and_padded_logits_are_those_of_the_sample_alone(
    way: CsmFamily, model: Any, native: Any, tokenizer: Tokenizer, cases: list[Case]
) -> None:
    """Batch mates change nothing, in neither decoder."""
    batch = collated(way, cases)
    states = target_states(model, batch)
    backbone = model.lm_head(states).split([len(case.codes) + 1 for case in cases])
    targets = batch.inputs["targets"]
    depth_states_PKD = depth_states(model.depth_decoder.model, states, targets)
    depth = depth_logits(depth_states_PKD, model.depth_decoder.codebooks_head.weight)
    for case, ours, ours_depth in zip(cases, backbone, depth.split([len(c.codes) + 1 for c in cases]), strict=True):
        out = native_output(native, tokenizer, [case])
        assert float((out.logits[0, -len(ours) - 1 : -1] - ours).abs().max()) <= 1e-5
        assert float((out.depth_decoder_logits - ours_depth).abs().max()) <= 1e-5


def test_counts_and_targets(way: CsmFamily, cases: list[Case]) -> None:
    """Frames and one end per sample; codebook 0 counts in the backbone, the others in the depth decoder."""
    batch = collated(way, cases)
    rows = (10 + 1) + (14 + 1)
    assert batch.target_counts == {"backbone": rows, "depth": rows * (CODEBOOKS - 1)}
    expected = [row for case in cases for row in [*case.codes.tolist(), [0] * CODEBOOKS]]
    assert batch.inputs["targets"].tolist() == expected
    assert batch.inputs["ends"].tolist() == [10, rows - 1] and len(batch.inputs["frames"]) == 24
    assert batch.audio_seconds == pytest.approx((10 + 14) * 0.08)
    sizes = [way.encode(case.sample, case.features).num_tokens for case in cases]
    assert batch.num_tokens == sum(sizes)
    assert batch.lengths == (tuple(sizes) if way.config.batch.packing else (max(sizes),) * 2)


# -- a share of the frames -----------------------------------------------------------------------------------------


def test_draws_keep_every_end_and_a_share_of_the_frames(base: Path, cases: list[Case]) -> None:
    """ceil(24 / 16) of 24 frames with weight 12, and both ends with weight 1; other draws are other frames."""
    inputs = collated(family_on(base), cases).inputs
    seen = set()
    for _ in range(200):
        rows, weights = draw_rows(inputs, 1 / 16)
        assert rows[2:].tolist() == inputs["ends"].tolist() and weights.tolist() == [12.0, 12.0, 1.0, 1.0]
        seen |= set(rows[:2].tolist())
    assert seen == set(inputs["frames"].tolist())
    rows, weights = draw_rows(inputs, 1.0)
    assert sorted(rows.tolist()) == list(range(26)) and weights.tolist() == [1.0] * 26


def test_loss_and_gradient_of_a_share_are_unbiased(base: Path, cases: list[Case]) -> None:
    """The mean over many draws of 1/16 is the whole depth's, within its standard error; the default is 1/16."""
    whole, part = family_on(base), family_on(base, data={"depth_share": 1 / 16})
    assert (
        CsmFamily(
            type(part.config).model_validate({"family": "csm", "model": {"path": str(base)}})
        ).config.data.depth_share
        == 1 / 16
    )  # type: ignore[attr-defined]
    model: Any = whole.load(FP32)
    batch = collated(whole, cases)
    watched = [model.depth_decoder.codebooks_head.weight, model.backbone_model.layers[0].self_attn.q_proj.weight]
    directions = [torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for p in watched]

    def measure(family: CsmFamily) -> list[float]:
        loss = family.losses(model, batch).sums["depth"]
        gradients = torch.autograd.grad(loss, watched)
        return [float(loss.detach()), *(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))]

    model.train()
    torch.manual_seed(3)
    draws = np.array([measure(part) for _ in range(DRAWS)])
    expected = np.array(measure(whole))
    error = draws.std(0, ddof=1) / math.sqrt(DRAWS)
    assert (error > 0).all() and (np.abs(draws.mean(0) - expected) < 3.5 * error).all()
    assert (error < 0.2 * np.abs(expected).max()).all()
    unweighted = draws[:, 0].mean() / 12
    assert abs(unweighted - expected[0]) > 10 * error[0]  # it would be seen


def test_evaluation_takes_all_frames_and_no_chance(base: Path, cases: list[Case]) -> None:
    """Losses of an evaluation do not depend on the share, and leave the random state as it is."""
    whole, part = family_on(base), family_on(base, data={"depth_share": 1 / 16})
    model = whole.load(FP32).eval()
    batch, before = collated(whole, cases), torch.get_rng_state()
    assert float(part.losses(model, batch).sums["depth"]) == float(whole.losses(model, batch).sums["depth"])
    assert torch.equal(torch.get_rng_state(), before)


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_recomputed_activations_give_the_same_gradients(base: Path, cases: list[Case], fast: bool) -> None:
    """With adapters, where the native loss fails: it writes the state into a leaf."""
    family = family_on(base, speed={"fast_forward": fast})
    batch, gradients = collated(family, cases), []
    for recompute in (False, True):
        model = apply_lora(family.load(FP32), family, LoraSettings(rank=4, dropout=0.0), seed=0).train()
        if recompute:
            checkpoint_activations(model)
        mean_loss(family.losses(model, batch), batch).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if "lora_B" in n})
    assert gradients[0] and all(g is not None and bool(g.any()) for g in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_chunks_of_logits_change_nothing(family: CsmFamily, cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads applied to three rows at a time."""
    model, batch = family.load(FP32), collated(family, cases)
    expected = float(family.losses(model, batch).sums["depth"])
    monkeypatch.setattr("speechtune.families.csm.forward.LOGITS_PER_CHUNK", 3 * 7 * 67)
    assert float(family.losses(model, batch).sums["depth"]) == pytest.approx(expected, rel=1e-6)


def test_half_precision(way: CsmFamily, model: nn.Module, cases: list[Case]) -> None:
    """A base in bfloat16 under a run's autocast, adapters in float32: within rounding the loss of float32."""
    plan = PrecisionPlan("bf16", torch.device("cpu"), torch.bfloat16, torch.bfloat16, False, "test")
    batch = collated(way, cases)
    adapted = apply_lora(way.load(plan), way, LoraSettings(rank=4, dropout=0.0), seed=0).train()
    counts = {head: float(count) for head, count in batch.target_counts.items()}
    loss, _ = Objective(adapted, way, plan, {})(batch, counts)
    loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all(bool(p.grad.any()) for name, p in trained.items() if "lora_B" in name and p.grad is not None)
    assert float(loss) == pytest.approx(float(mean_loss(way.losses(model, batch), batch)), rel=1e-2)


# -- what is refused -----------------------------------------------------------------------------------------------


def test_fresh_model_guesses(base: Path, family: CsmFamily, cases: list[Case]) -> None:
    """Near-uniform logits cost ln V in either head."""
    config = family_on(base).model_config
    config.initializer_range = config.depth_decoder_config.initializer_range = 0.002  # type: ignore[union-attr]
    torch.manual_seed(0)
    batch = collated(family, cases)
    sums = family.losses(CsmForConditionalGeneration(config), batch).sums
    for head in family.heads:
        assert float(sums[head]) / batch.target_counts[head] == pytest.approx(math.log(67), rel=1e-2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda case: (case.sample, case.features[:1]), "1 clips for 2 places"),
        (lambda case: (replace(case.sample, audio=None), case.features[:1]), "no target audio"),
        (lambda case: (replace(case.sample, text="a <|AUDIO|> b"), case.features), r"special token '<\|AUDIO\|>'"),
    ],
)
def test_samples_that_cannot_be_trained_are_refused(
    family: CsmFamily, cases: list[Case], change: Callable[[Case], Any], reason: str
) -> None:
    with pytest.raises(ManifestError, match=reason):
        family.encode(*change(cases[0]))


def test_speakers_and_turns_of_the_prompt(family: CsmFamily, tokenizer: Tokenizer, cases: list[Case]) -> None:
    """Every turn begins anew; a number is that speaker's, a name stands for 0, references included."""
    case = cases[0]
    expected = ""
    for text, codes in case.turns:
        expected += turn_text(text, 0) + "<|AUDIO|>" * len(codes) + "<|audio_eos|>"  # type: ignore[arg-type]
    for speaker, number in (("allison", 0), (None, 0), ("0", 0), ("12", 12), ("007", 7), ("²", 0)):
        sample = replace(case.sample, speaker=speaker)
        ids = family.encode(sample, case.features).arrays["input_ids"]
        assert tokenizer.decode(ids) == expected.replace("[0]", f"[{number}]")
    question = family.prompt_arrays(*case.question)["input_ids"].tolist()
    assert expected.startswith(tokenizer.decode(question))
    assert tokenizer.decode(question).endswith(turn_text(case.sample.text))


def test_system_messages_are_told_of(base: Path, cases: list[Case], caplog: pytest.LogCaptureFixture) -> None:
    """Once a run, not swallowed."""
    family = family_on(base)
    with caplog.at_level("WARNING", logger="speechtune"):
        for _ in range(2):
            family.encode(replace(cases[0].sample, system="Be kind."), cases[0].features)
    assert caplog.text.count("no place for a system message") == 1

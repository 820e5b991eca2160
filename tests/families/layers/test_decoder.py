"""The fast forward pass against plain transformers and PEFT: the same losses and gradients, adapters of all kinds.

Every case sets lora_B to numbers of its own: at its start it is zero, and half of the gradients would be too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional

import phi4_cases
from helpers import WAYS
from higgs_cases import FP32, Case
from speechtune.families import build_config
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
from speechtune.families.layers.decoder import FastLayer, native_inputs
from speechtune.families.layers.ops import IGNORE, Segments, attend, head_loss, linear
from speechtune.families.phi4_multimodal.family import Phi4MultimodalFamily
from speechtune.family import Family
from speechtune.lora.apply import apply_lora
from speechtune.precision import PrecisionPlan
from speechtune.training.job import Objective
from speechtune.types import Batch, Encoded, Sample

TOLERANCE = 1e-5
BF16 = PrecisionPlan("bf16", torch.device("cpu"), torch.bfloat16, torch.bfloat16, False, "test")
NATIVE = WAYS[-1]


@dataclass(frozen=True)
class Bench:
    """A family's samples, and how to build the family with other options."""

    build: Callable[..., Family]
    items: list[Encoded]


@pytest.fixture(scope="module", params=["higgs_audio_v2", "phi4_multimodal"])
def bench(
    request: pytest.FixtureRequest,
    tiny_base: Path,
    tiny_family: HiggsAudioV2Family,
    cases: list[Case],
    phi4_base: Path,
    phi4_family: Phi4MultimodalFamily,
    phi4_samples: list[Sample],
) -> Bench:
    """Both families on their tiny bases; five Higgs samples (some of one length), eight of Phi-4 with both tasks."""

    def build(base: Path, family: type[Family], **values: Any) -> Family:
        lora = {"targets": "all" if request.param == "higgs_audio_v2" else "language+audio", "rank": 4, "dropout": 0.0}
        sections = {
            "family": request.param,
            "model": {"path": str(base)},
            **values,
            "lora": lora | values.get("lora", {}),
        }
        return cast(Any, family)(build_config(sections, "test"))

    if request.param == "higgs_audio_v2":
        pairs = [(case.sample, case.features) for case in (*cases, cases[1])]
        pairs += [(case.sample, [codes[2:] for codes in case.features]) for case in cases]
        items = [tiny_family.encode(*pair) for pair in pairs]
        return Bench(lambda **values: build(tiny_base / "model", HiggsAudioV2Family, **values), items)
    items = phi4_cases.encoded(phi4_family, phi4_samples[:8])
    return Bench(lambda **values: build(phi4_base, Phi4MultimodalFamily, **values), items)


def learner(family: Any, plan: PrecisionPlan = FP32) -> nn.Module:
    """The base, with an adapter in the middle of its training where there is one."""
    model = family.load(plan)
    if not family.config.lora.enabled:
        return model.requires_grad_(True).train()
    model = apply_lora(model, family, family.config.lora, 42)
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.05, generator=torch.Generator().manual_seed(number))
    return model.train()


def step(
    family: Any, model: nn.Module, batch: Batch, plan: PrecisionPlan = FP32
) -> tuple[dict[str, float], dict[str, Any]]:
    """Mean loss per head, and all gradients, of one step as the loop takes it."""
    model.zero_grad()
    loss, sums = Objective(model, family, plan, {})(batch, batch.target_counts)
    loss.backward()
    losses = {head: float(value) / batch.target_counts[head] for head, value in sums.items()}
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    """Greatest difference of a gradient, relative to the largest entry of that gradient.

    Gradients a thousandth as large as others are what is left when larger numbers cancel: these set their scale.
    """
    assert ours.keys() == theirs.keys() and ours
    floor = 1e-3 * max(float(gradient.abs().max()) for gradient in theirs.values())
    return max(float((ours[name] - g).abs().max()) / max(float(g.abs().max()), floor) for name, g in theirs.items())


KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"lora": {"rslora": True}},
    "DoRA": {"lora": {"dora": True}},
    "full": {"lora": {"enabled": False}},
    "gradient checkpointing": {"train": {"gradient_checkpointing": True}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_plain_transformers_and_peft(kind: str, bench: Bench) -> None:
    """Packed or padded, fast or native: one training step, to 1e-5 of plain padded batches."""
    found = []
    for way in WAYS:
        family = bench.build(**way, **KINDS[kind])
        model = learner(family)
        if kind == "gradient checkpointing":
            cast(Any, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert any(isinstance(m, FastLayer) for m in model.modules()) == way["speed"]["fast_forward"]
        found.append(step(family, model, family.collate(bench.items)))
    losses, gradients = found[-1]
    assert min(losses.values()) > 0.1
    for others, their_gradients in found[:-1]:
        assert others == pytest.approx(losses, rel=TOLERANCE)
        assert difference(their_gradients, gradients) < TOLERANCE


def test_a_frozen_speech_lora_stays_in_place(
    phi4_base: Path, phi4_family: Phi4MultimodalFamily, phi4_samples: list[Sample]
) -> None:
    """Two adapters on one layer (`stack`) go the long way, through PEFT."""
    stacked = [phi4_cases.family_on(phi4_base, **way, model={"speech_lora": "stack"}) for way in WAYS]
    items = phi4_cases.encoded(phi4_family, phi4_samples[:4])
    found = [step(one, learner(one).eval(), one.collate(items)) for one in stacked]  # the speech LoRA has dropout
    for losses, gradients in found[:-1]:
        assert losses == pytest.approx(found[-1][0], rel=TOLERANCE)
        assert difference(gradients, found[-1][1]) < TOLERANCE


def test_bfloat16_differs_by_its_rounding_alone(bench: Bench) -> None:
    """Fast and native are as far from float32 as each other: neither has lost digits on its way."""
    exact = bench.build(**NATIVE)
    losses, gradients = step(exact, learner(exact), exact.collate(bench.items))
    errors = []
    for way in (WAYS[0], NATIVE):
        family = bench.build(**way)
        rounded, rounded_gradients = step(family, learner(family, BF16), family.collate(bench.items), BF16)
        assert rounded == pytest.approx(losses, rel=0.05)
        shared = [n for n in gradients if gradients[n].abs().max() > 1e-4]
        errors.append(
            sum(float((rounded_gradients[n].float() - gradients[n]).norm() / gradients[n].norm()) for n in shared)
        )
    assert errors[0] < 1.25 * errors[1]


def test_a_sample_does_not_see_its_neighbours(bench: Bench) -> None:
    """Guards against attention across the samples of a pack: each alone gives the same sums."""
    family = bench.build()
    model = learner(family).eval()
    together = family.losses(model, family.collate(bench.items)).sums
    for head, total in together.items():
        alone = [family.losses(model, family.collate([item])).sums for item in bench.items]
        expected = sum(float(sums[head].detach()) for sums in alone if head in sums)
        assert float(total.detach()) == pytest.approx(expected, rel=TOLERANCE)


def test_generation_is_native(bench: Bench) -> None:
    """With fast layers in place the probe's logits and greedy answer are those of a model that has none."""
    ways = [bench.build(**way) for way in (WAYS[0], NATIVE)]
    (ours, ours_greedy), (native, native_greedy) = (family.probe(learner(family).eval(), 12) for family in ways)
    assert torch.equal(ours, native) and (ours_greedy == native_greedy).all()


def test_collating_is_pure_and_on_the_cpu(bench: Bench) -> None:
    family = bench.build()
    first, second = family.collate(bench.items), family.collate(bench.items)
    assert first.lengths == second.lengths == tuple(item.num_tokens for item in bench.items)
    assert all(torch.equal(value, second.inputs[name]) and value.is_cpu for name, value in first.inputs.items())


# -- the pieces ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", [(5,), (3, 9, 9, 1), (4, 4, 4), (64, 65, 200)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2)])
def test_attention_within_segments(lengths: tuple[int, ...], heads: tuple[int, int], dtype: torch.dtype) -> None:
    """Against softmax written out, with a mask; also the gradients. float64 goes through torch's own kernel."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), h, 8, dtype=dtype, requires_grad=True) for h in (heads[0], heads[1], heads[1]))
    segments = Segments(lengths, torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32))
    places = torch.cat([torch.arange(n) for n in lengths])
    mask = native_inputs({"position_ids": places})["attention_mask"][0, 0]
    wide_k, wide_v = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v))
    scores = torch.einsum("nhe,mhe->hnm", q, wide_k) / 8**0.5
    expected = torch.einsum("hnm,mhe->nhe", scores.masked_fill(~mask, -torch.inf).softmax(-1), wide_v)
    found = attend(q, k, v, segments)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("codebooks", [1, 3])
def test_cross_entropy_behind_a_head(frozen: bool, codebooks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's own on the whole logits, chunked and unchunked, with ignored targets."""
    monkeypatch.setattr("speechtune.families.layers.ops.LOGITS_PER_CHUNK", 7 * 11 * codebooks)
    head = nn.Linear(6, 11 * codebooks, bias=False, dtype=torch.float32).requires_grad_(not frozen)
    hidden = torch.randn(40, 6, requires_grad=True)
    targets = torch.randint(0, 11, (40, codebooks))
    targets[::3, 0] = IGNORE
    ours = head_loss(head, hidden, targets if codebooks > 1 else targets[:, 0]) * 3
    logits = (hidden @ head.weight.T).view(-1, 11)
    expected = functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum") * 3
    assert float(ours) == pytest.approx(float(expected), rel=1e-6)
    wanted = [hidden] if frozen else [hidden, head.weight]
    for found, right in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(expected, wanted), strict=True):
        torch.testing.assert_close(found, right)


def adapted(dropout: float, bias: bool, **options: Any) -> Any:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(12, 7, bias=bias)

    config = LoraConfig(
        target_modules=["layer"], r=3, lora_alpha=5, lora_dropout=dropout, init_lora_weights=False, **options
    )
    return cast(Any, get_peft_model(Toy(), config)).base_model.model.layer.train()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}])
@pytest.mark.parametrize("bias", [True, False])
def test_a_lora_layer_is_pefts(dropout: float, options: dict[str, Any], bias: bool) -> None:
    """Output and gradients, with the same dropout from the same random state."""
    torch.manual_seed(0)
    layer = adapted(dropout, bias or bool(options.get("lora_bias")), **options)
    x, weight = torch.randn(20, 12, requires_grad=True), torch.randn(20, 7)
    found = []
    for call in (lambda: linear(layer, x), lambda: layer(x)):
        torch.manual_seed(1)
        layer.zero_grad()
        x.grad = None
        out = call()
        (out * weight).sum().backward()
        found.append((out.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)))
    assert len(found[0]) == len(found[1]) > 3
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_an_adapter_switched_off_or_merged_is_not_added() -> None:
    layer, x = adapted(0.0, False), torch.randn(4, 12)
    with torch.no_grad():
        on = linear(layer, x)
        layer.enable_adapters(False)
        torch.testing.assert_close(linear(layer, x), layer.base_layer(x))
        layer.enable_adapters(True)
        layer.merge()
        torch.testing.assert_close(linear(layer, x), on)

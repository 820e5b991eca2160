"""Counted operations against torch's own counter, on the tiny models of both families.

Both count matrix products and convolutions. torch sees the two products of the scores over every pair that a plain
implementation computes (eager attention, or the math kernel); the toolkit counts the pairs that may see each other, so
all pairs are put in here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from flop_rules import flop_rules
from flops import FlopCount, causal_pairs, count_flops, mfu, peak_flops
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import phi4_cases
from higgs_cases import FP32, Case, collated, family_on
from speechtune.config import LoraSettings
from speechtune.families.layers import ops as fast
from speechtune.family import Family
from speechtune.lora.apply import apply_lora
from speechtune.types import Batch, Sample

Counted = tuple[int, int]
"""Forward, and forward with backward."""
WAYS = {  # packed, fast
    "padded, native": (False, False),
    "packed, native": (True, False),
    "padded, fast": (False, True),
    "packed, fast": (True, True),
}


@pytest.fixture(autouse=True)
def _plain_operations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not the CPU's attention in blocks, which takes a part of the pairs that see nothing; products torch counts."""
    monkeypatch.setattr(fast, "MOST_POSITIONS", 0)
    with cast(Any, torch.backends.mkldnn).flags(enabled=False):
        yield


def measured(family: Family, model: nn.Module, batch: Batch) -> Counted:
    """What torch counts while the family's losses are computed and differentiated."""
    model.train()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        total = torch.stack(list(family.losses(model, batch).sums.values())).sum()
        forward = counter.get_total_flops()
        if total.requires_grad:
            total.backward()
    return forward, counter.get_total_flops()


def counted(family: Any, model: nn.Module, batch: Batch) -> Counted:
    """What the toolkit counts, with all pairs; behind frozen heads the gradient is found in the forward pass."""
    samples, width = batch.inputs["input_ids"].shape
    pairs = sum(length**2 for length in batch.lengths) if family.config.speed.fast_forward else samples * width**2
    rules = [replace(r, pairs=pairs) if r.part == "attention scores" else r for r in flop_rules(family, model, batch)]
    found = count_flops(model, rules, batch.num_tokens)
    frozen = not any(p.requires_grad for n, p in model.named_parameters() if "lm_head" in n or "trainable_tokens" in n)
    return found.forward + found.parts["heads"][1] * frozen, found.computed_flops


def higgs_on(folder: Path, way: str) -> Any:
    packed, quick = WAYS[way]
    sections = {"batch": {"packing": packed}, "speed": {"fast_forward": quick}}
    return family_on(folder / "model", folder / "codec", attention="eager", **sections)


def phi4_on(folder: Path, way: str, **sections: Any) -> Any:
    packed, quick = WAYS[way]
    model = {"attention": "eager"} | sections.pop("model", {})
    sections |= {"model": model, "batch": {"packing": packed}, "speed": {"fast_forward": quick}}
    return phi4_cases.family_on(folder, **sections)


@pytest.fixture(params=WAYS)
def higgs(tiny_base: Path, request: pytest.FixtureRequest) -> Any:
    return higgs_on(tiny_base, request.param)


@pytest.fixture
def higgs_batch(higgs: Any, cases: list[Case]) -> Batch:
    batch = collated(higgs, cases)
    assert (batch.inputs["input_ids"].numel() > batch.num_tokens) == (not higgs.config.batch.packing)
    return batch


@pytest.fixture(params=WAYS)
def phi4(phi4_base: Path, request: pytest.FixtureRequest) -> Any:
    return phi4_on(phi4_base, request.param)


@pytest.fixture
def phi4_batch(phi4: Any, phi4_samples: list[Sample]) -> Batch:
    return phi4.collate(phi4_cases.encoded(phi4, phi4_samples[:5]))


@pytest.mark.parametrize("targets", ["attention", "all", "attention+audio_ffn", r".*layers\.1\.mlp\.down_proj"])
def test_higgs_with_lora(higgs: Any, higgs_batch: Batch, targets: str) -> None:
    model = apply_lora(higgs.load(FP32), higgs, LoraSettings(targets=targets, rank=4), seed=0)
    assert counted(higgs, model, higgs_batch) == measured(higgs, model, higgs_batch)


def test_higgs_in_full_and_frozen(higgs: Any, higgs_batch: Batch) -> None:
    model = higgs.load(FP32)
    assert counted(higgs, model, higgs_batch) == measured(higgs, model, higgs_batch)
    forward, both = counted(higgs, model.requires_grad_(False), higgs_batch)
    assert forward == both == measured(higgs, model, higgs_batch)[0]


def test_only_what_lies_behind_something_trained_is_differentiated(higgs: Any, higgs_batch: Batch) -> None:
    """LoRA in the second layer alone: the first costs a forward pass and no more."""
    model = apply_lora(higgs.load(FP32), higgs, LoraSettings(targets=r".*layers\.1\.self_attn\.[qkv]_proj"), seed=0)
    assert counted(higgs, model, higgs_batch) == measured(higgs, model, higgs_batch)
    rules = flop_rules(higgs, model, higgs_batch)
    forward, backward = count_flops(model, rules, higgs_batch.num_tokens).parts["audio FFN"]
    per_row = 2 * 3 * 64 * 128
    assert forward - backward == per_row * len(higgs_batch.inputs["audio_rows"])


@pytest.mark.parametrize("targets", ["language", "language+audio"])
def test_phi4_with_lora(phi4: Any, phi4_batch: Batch, targets: str) -> None:
    model = apply_lora(phi4.load(FP32), phi4, LoraSettings(targets=targets, rank=4), seed=0)
    assert counted(phi4, model, phi4_batch) == measured(phi4, model, phi4_batch)
    found = count_flops(model, flop_rules(phi4, model, phi4_batch), phi4_batch.num_tokens)
    assert bool(found.parts["audio encoder"][1]) == (targets == "language+audio"), "a frozen encoder: forward only"


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ("audio_embed",)}, {"trainable_tokens": ("<|APA|>",)}], ids=str
)
def test_phi4_with_what_else_is_trained(phi4_base: Path, phi4_samples: list[Sample], options: dict[str, Any]) -> None:
    """torch counts the weight gradient of a grouped convolution as if all channels met: `groups` times too many."""
    phi4 = phi4_on(phi4_base, "packed, fast", lora=options)
    batch = phi4.collate(phi4_cases.encoded(phi4, phi4_samples[:3]))
    model = apply_lora(phi4.load(FP32), phi4, phi4.config.lora, seed=0)
    too_many, hooks = [], []
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups > 1 and module.weight.requires_grad:

            def count(conv: Any, _: Any, output: torch.Tensor) -> None:
                rows = output.numel() // output.shape[1]
                too_many.append(2 * conv.weight.numel() * rows * (conv.groups - 1))

            hooks.append(module.register_forward_hook(count))
    assert bool(hooks) == ("modules_to_save" in options)
    forward, both = measured(phi4, model, batch)
    assert counted(phi4, model, batch) == (forward, both - sum(too_many))


def test_a_stacked_speech_adapter_counts(phi4_base: Path, phi4_samples: list[Sample]) -> None:
    """It is frozen, and computed all the same."""
    phi4 = phi4_on(phi4_base, "packed, fast", model={"speech_lora": "stack"})
    batch = phi4.collate(phi4_cases.encoded(phi4, phi4_samples[:3]))
    model = apply_lora(phi4.load(FP32), phi4, LoraSettings(rank=4), seed=0)
    assert counted(phi4, model, batch) == measured(phi4, model, batch)


def test_the_basis_of_4n(higgs: Any, higgs_batch: Batch) -> None:
    """Hidden 64, FFN 128, 4 heads and 2 key-value heads of 16, 2 layers; one FFN a token; real tokens alone."""
    model = apply_lora(higgs.load(FP32), higgs, LoraSettings(), seed=0)
    found: FlopCount = count_flops(model, flop_rules(higgs, model, higgs_batch), higgs_batch.num_tokens)
    per_layer = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 128
    assert found.active_parameters == 2 * per_layer
    assert found.model_flops_4n == 4 * 2 * per_layer * higgs_batch.num_tokens
    assert f"4 x {2 * per_layer:,} active" in found.formula()


def test_causal_attention_counts_each_sample_alone(tiny_base: Path, cases: list[Case]) -> None:
    lengths = []
    for way in WAYS:
        higgs = higgs_on(tiny_base, way)
        lengths = [len(higgs.encode(case.sample, case.features).arrays["input_ids"]) for case in cases]
        taken = lengths if higgs.config.batch.packing else [max(lengths)] * len(lengths)
        rules = {rule.stage: rule for rule in flop_rules(higgs, higgs.load(FP32), collated(higgs, cases))}
        assert rules["layers.scores"].pairs == sum(n * (n + 1) // 2 for n in taken) == causal_pairs(taken)
    assert len(set(lengths)) == 2


def test_all_ways_train_the_same_tokens_and_the_fast_packed_one_computes_least(
    tiny_base: Path, cases: list[Case]
) -> None:
    found = {}
    for way in WAYS:
        higgs = higgs_on(tiny_base, way)
        model, batch = apply_lora(higgs.load(FP32), higgs, LoraSettings(), seed=0), collated(higgs, cases)
        found[way] = count_flops(model, flop_rules(higgs, model, batch), batch.num_tokens)
    assert len({count.model_flops_4n for count in found.values()}) == 1
    computed = [found[way].computed_flops for way in ("packed, fast", "padded, fast", "padded, native")]
    assert computed == sorted(set(computed))


def test_what_no_rule_speaks_of_is_refused(tiny_base: Path, cases: list[Case]) -> None:
    higgs = higgs_on(tiny_base, "packed, fast")
    model, batch = higgs.skeleton(), collated(higgs, cases)
    rules = [rule for rule in flop_rules(higgs, model, batch) if rule.stage != "layers.down"]
    with pytest.raises(ValueError, match=r"mlp\.down_proj: no rule"):
        count_flops(model, rules, batch.num_tokens)
    model = apply_lora(higgs.load(FP32), higgs, LoraSettings(dora=True), seed=0)
    with pytest.raises(ValueError, match="DoRA"):
        count_flops(model, flop_rules(higgs, model, batch), batch.num_tokens)


def test_utilisation() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert mfu(989e12 * 3, 10.0, peak_flops("NVIDIA H200")) == pytest.approx(0.3)
    for unknown in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40S-48Q", "Tesla T4", "cpu"):
        assert peak_flops(unknown) is None and mfu(1e12, 1.0, peak_flops(unknown)) is None

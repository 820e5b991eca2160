"""Counted operations against torch's own counter, on the tiny models of both families.

Both count matrix products and convolutions. With eager attention torch sees the two products of the scores over every
pair of the padded batch; the toolkit counts the pairs that may see each other, so the pairs are put in here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import phi4_cases
import pytest
import torch
from higgs_cases import FP32, Case, collated, family_on
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from speechtune.adapter import apply_lora
from speechtune.config import LoraSettings
from speechtune.families.base import Batch, Family, Sample
from speechtune.families.flop_rules import flop_rules
from speechtune.flops import FlopCount, Rule, causal_pairs, count_flops, mfu, peak_flops

Counted = tuple[int, int]
"""Forward, and forward with backward."""


def measured(family: Family, model: nn.Module, batch: Batch) -> Counted:
    """What torch counts while the family's losses are computed and differentiated."""
    model.train()
    with FlopCounterMode(display=False) as counter:
        total = torch.stack(list(family.losses(model, batch).sums.values())).sum()
        forward = counter.get_total_flops()
        if total.requires_grad:
            total.backward()
    return forward, counter.get_total_flops()


def square(rules: tuple[Rule, ...], batch: Batch) -> tuple[Rule, ...]:
    """The rules with every pair of the padded batch in the decoder's attention, as eager attention computes it."""
    samples, width = batch.inputs["input_ids"].shape
    return tuple(replace(r, pairs=samples * width**2) if r.part == "attention scores" else r for r in rules)


def counted(family: Family, model: nn.Module, batch: Batch) -> Counted:
    found = count_flops(model, square(flop_rules(family, batch), batch), batch.num_tokens)
    return found.forward, found.computed_flops


@pytest.fixture
def higgs(tiny_base: Path) -> Any:
    return family_on(tiny_base / "model", tiny_base / "codec", attention="eager")


@pytest.fixture
def higgs_batch(higgs: Any, cases: list[Case]) -> Batch:
    batch = collated(higgs, cases)
    assert batch.inputs["input_ids"].numel() > batch.num_tokens, "no padding in it"
    return batch


@pytest.fixture
def phi4(phi4_base: Path) -> Any:
    return phi4_cases.family_on(phi4_base, model={"attention": "eager"})


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
    """LoRA from the second layer on: the first costs a forward pass alone."""
    model = apply_lora(higgs.load(FP32), higgs, LoraSettings(targets=r".*layers\.1\.self_attn\.q_proj"), seed=0)
    found = count_flops(model, flop_rules(higgs, higgs_batch), higgs_batch.num_tokens)
    forward, backward = found.parts["audio FFN"]
    assert backward == forward // 2
    assert counted(higgs, model, higgs_batch)[0] == measured(higgs, model, higgs_batch)[0]


@pytest.mark.parametrize("targets", ["language", "language+audio"])
def test_phi4_with_lora(phi4: Any, phi4_batch: Batch, targets: str) -> None:
    model = apply_lora(phi4.load(FP32), phi4, LoraSettings(targets=targets, rank=4), seed=0)
    assert counted(phi4, model, phi4_batch) == measured(phi4, model, phi4_batch)
    found = count_flops(model, flop_rules(phi4, phi4_batch), phi4_batch.num_tokens)
    assert bool(found.parts["audio encoder"][1]) == (targets == "language+audio"), "a frozen encoder: forward only"


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ("audio_embed",)}, {"trainable_tokens": ("<|APA|>",)}], ids=str
)
def test_phi4_with_what_else_is_trained(phi4_base: Path, phi4_samples: list[Sample], options: dict[str, Any]) -> None:
    """torch counts the weight gradient of a grouped convolution as if all channels met: `groups` times too many."""
    phi4 = phi4_cases.family_on(phi4_base, model={"attention": "eager"}, lora=options)
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
    phi4 = phi4_cases.family_on(phi4_base, model={"attention": "eager", "speech_lora": "stack"})
    batch = phi4.collate(phi4_cases.encoded(phi4, phi4_samples[:3]))
    model = apply_lora(phi4.load(FP32), phi4, LoraSettings(rank=4), seed=0)
    assert counted(phi4, model, batch) == measured(phi4, model, batch)


def test_the_basis_of_4n(higgs: Any, higgs_batch: Batch) -> None:
    """Hidden 64, FFN 128, 4 heads and 2 key-value heads of 16, 2 layers; one FFN a token; real tokens alone."""
    model = apply_lora(higgs.load(FP32), higgs, LoraSettings(), seed=0)
    found: FlopCount = count_flops(model, flop_rules(higgs, higgs_batch), higgs_batch.num_tokens)
    per_layer = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 128
    assert found.active_parameters == 2 * per_layer
    assert found.model_flops_4n == 4 * 2 * per_layer * higgs_batch.num_tokens
    assert f"4 x {2 * per_layer:,} active" in found.formula()


def test_causal_attention_counts_each_sample_alone(higgs: Any, higgs_batch: Batch, cases: list[Case]) -> None:
    rules = {rule.stage: rule for rule in flop_rules(higgs, higgs_batch)}
    lengths = [len(higgs.encode(case.sample, case.features).arrays["input_ids"]) for case in cases]
    assert rules["layers.scores"].pairs == sum(n * (n + 1) // 2 for n in lengths) == causal_pairs(lengths)


def test_what_no_rule_speaks_of_is_refused(higgs: Any, higgs_batch: Batch) -> None:
    rules = [rule for rule in flop_rules(higgs, higgs_batch) if rule.stage != "layers.down"]
    with pytest.raises(ValueError, match=r"mlp\.down_proj: no rule"):
        count_flops(higgs.skeleton(), rules, higgs_batch.num_tokens)
    model = apply_lora(higgs.load(FP32), higgs, LoraSettings(dora=True), seed=0)
    with pytest.raises(ValueError, match="DoRA"):
        count_flops(model, flop_rules(higgs, higgs_batch), higgs_batch.num_tokens)


def test_utilisation() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert mfu(989e12 * 3, 10.0, peak_flops("NVIDIA H200")) == pytest.approx(0.3)
    for unknown in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40S-48Q", "Tesla T4", "cpu"):
        assert peak_flops(unknown) is None and mfu(1e12, 1.0, peak_flops(unknown)) is None

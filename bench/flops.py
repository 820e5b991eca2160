"""Floating point operations of one training step, counted from module shapes and the rows that pass through them.

Matrix products and convolutions alone are counted, a multiplication and an addition as two operations: a linear layer
of `weight.numel()` weights costs 2 * numel a row forward, 2 * numel for the gradient of its input where something
trained lies before it, and 2 * numel for the gradient of its weight where that is trained. What a family's batch sends
through which module the family says, as `Rule`s; all else is read off the model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from speechtune.lora.apply import plain_model

LORA = "LoRA"
PEFT_LAYERS = re.compile(r"\.(base_layer|lora_[AB]\.[^.]+|modules_to_save\.[^.]+|token_adapter|trainable_tokens_\w+)")
"""What PEFT puts between a module and its own name."""
PEAK_DENSE_BF16: Mapping[str, float] = {
    # Regex over torch.cuda.get_device_name() -> FLOP/s of dense bf16 products with fp32 accumulation. NVIDIA's data
    # sheets print the Hopper, Ada and Blackwell numbers with sparsity: half of that stands here.
    r"NVIDIA H100 80GB HBM3": 989e12,  # H100 data sheet, SXM
    r"NVIDIA H100 PCIe": 756e12,  # H100 data sheet of 2022, PCIe
    r"NVIDIA H100 NVL": 835e12,  # H100 data sheet, NVL
    r"NVIDIA H200": 989e12,  # H200 data sheet, SXM
    r"NVIDIA H200 NVL": 835e12,  # H200 data sheet, NVL
    r"NVIDIA GH200 (480|144G).*": 989e12,  # GH200 data sheet
    r"NVIDIA B200": 2250e12,  # HGX B200 data sheet: 36 PFLOP/s with sparsity on eight
    r"NVIDIA A100-.*|A100-.*|NVIDIA A100 80GB PCIe": 312e12,  # A100 data sheet
    r"NVIDIA A30": 165e12,  # A30 data sheet
    r"NVIDIA L40S": 362e12,  # L40S data sheet
    r"NVIDIA L40": 181e12,  # L40 data sheet
    r"NVIDIA L4": 121e12,  # L4 data sheet
    r"NVIDIA A10": 125e12,  # A10 data sheet
    r"NVIDIA RTX 6000 Ada Generation": 364e12,  # Ada professional architecture paper, appendix A
    r"NVIDIA RTX A6000": 155e12,  # GA102 architecture paper, appendix
    r"NVIDIA GeForce RTX 5090": 209e12,  # RTX Blackwell architecture paper, appendix A
    r"NVIDIA GeForce RTX 4090": 165e12,  # Ada architecture paper, appendix A
    r"NVIDIA GeForce RTX 3090": 71e12,  # GA102 architecture paper, appendix A
}


@dataclass(frozen=True, slots=True)
class Rule:
    """What one forward pass sends through the modules whose names match.

    Attributes:
        stage: "section.step". Rules stand in the order in which data flows; within a section the numbered layers
            (group 1 of `pattern`) follow one another, each through all its steps. Rules of one stage run side by side;
            what is trained in one of two lanes of several stages is taken to lie before the later ones of both.
        pattern: regex a module's name in the plain model must match in full, without what PEFT adds to it.
        part: the line of the table it counts towards.
        rows: rows that really pass, padding included where the layout pads.
        real: rows of them that the basis of 4N counts: those of real tokens; 0 for what it leaves out.
        pairs: query-key pairs, for a module of attention (one with `o_proj`): its two products cost 2 * pairs * width
            each, with the width of all heads.
    """

    stage: str
    pattern: str
    part: str
    rows: int = 0
    real: int = 0
    pairs: int = 0


@dataclass(frozen=True, slots=True)
class FlopCount:
    """Operations of one micro-batch: part -> (forward, backward), and the terms of the 4N basis.

    `computed_flops` is what the layers' mathematics takes on this layout: padding that is computed is in it, scores of
    causal attention count once per pair that may see each other, and what a kernel computes for pairs that see nothing,
    or again in the backward pass, as gradient checkpointing does, is not (as in PaLM, arXiv 2204.02311, appendix B).
    `model_flops_4n` is the usual basis for LoRA: 4 * active parameters * real tokens, since a frozen base takes 2N
    forward and 2N for the gradients of its inputs, where full training takes 6N (Kaplan et al., arXiv 2001.08361). N
    holds the linear layers one token passes in the decoder: neither embeddings and heads nor adapters and encoders.
    """

    parts: Mapping[str, tuple[int, int]]
    active_parameters: int
    num_tokens: int

    @property
    def forward(self) -> int:
        """Operations of the forward pass."""
        return sum(forward for forward, _ in self.parts.values())

    @property
    def computed_flops(self) -> int:
        """Operations of forward and backward pass."""
        return sum(forward + backward for forward, backward in self.parts.values())

    @property
    def model_flops_4n(self) -> int:
        """4 * active non-embedding parameters * real tokens."""
        return 4 * self.active_parameters * self.num_tokens

    def formula(self) -> str:
        """The 4N basis with its terms."""
        n, tokens = self.active_parameters, self.num_tokens
        return f"4 x {n:,} active non-embedding parameters x {tokens:,} tokens = {self.model_flops_4n:.4g} FLOP"


def count_flops(model: nn.Module, rules: Sequence[Rule], num_tokens: int) -> FlopCount:
    """Count the operations of forward and backward pass of one micro-batch.

    Args:
        model: the base, with or without adapters; meta tensors will do. What requires a gradient decides the backward.
        rules: what the batch sends through its modules; every linear layer and convolution must match one.
        num_tokens: real positions of the batch.

    Raises:
        ValueError: a layer or a trained parameter that no rule speaks of, or DoRA, whose norms are not counted: a
            number without them would be wrong without a word.
    """
    base = plain_model(model)
    matched = _match(base, rules)
    trained = [matched[name][0] for name, module in base.named_modules() if name in matched and _is_trained(module)]
    first_trained = min(trained, default=None)
    parts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    active = 0
    for name, (stage, rule) in matched.items():
        module = base.get_submodule(name)
        behind = first_trained is not None and first_trained < stage  # its input carries a gradient
        if rule.pairs and hasattr(module, "o_proj"):
            width = cast(nn.Linear, getattr(module.o_proj, "base_layer", module.o_proj)).in_features
            parts[rule.part][0] += 4 * rule.pairs * width
            parts[rule.part][1] += 8 * rule.pairs * width * behind
        if not isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or not rule.rows:
            continue
        part, forward = LORA if ".lora_" in name else rule.part, 2 * module.weight.numel() * rule.rows
        before = name.replace(".lora_B.", ".lora_A.")
        inner = before != name and cast(nn.Linear, base.get_submodule(before)).weight.requires_grad
        weight = module.weight.requires_grad or _has_trained_rows(base, name)
        parts[part][0] += forward
        parts[part][1] += forward * (bool(behind or inner) + weight)
        active += module.weight.numel() * rule.real * (part != LORA)
    return FlopCount({part: (f, b) for part, (f, b) in parts.items()}, round(active / max(1, num_tokens)), num_tokens)


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU by torch's name for it; None for one the table does not know."""
    return next((peak for name, peak in PEAK_DENSE_BF16.items() if re.fullmatch(name, device_name)), None)


def mfu(flops: float, seconds: float, peak: float | None) -> float | None:
    """Model FLOP utilisation: operations per second over the device's peak; None where the peak is not known."""
    return None if peak is None else flops / seconds / peak


def causal_pairs(lengths: Sequence[int]) -> int:
    """Query-key pairs of causal attention within each of some samples: L * (L + 1) / 2 of L positions."""
    return sum(length * (length + 1) // 2 for length in lengths)


def _match(base: nn.Module, rules: Sequence[Rule]) -> dict[str, tuple[tuple[int, int, int], Rule]]:
    """Module name -> its place in the flow (section, layer, step), and its rule."""
    stages = list(dict.fromkeys(rule.stage for rule in rules))
    sections = list(dict.fromkeys(stage.partition(".")[0] for stage in stages))
    compiled = [(re.compile(rule.pattern), rule) for rule in rules]
    matched: dict[str, tuple[tuple[int, int, int], Rule]] = {}
    for name, module in base.named_modules():
        if ".lora_magnitude_vector." in name:
            raise ValueError(f"{name}: the operations of DoRA are not counted")
        if ".original_module" in name:  # PEFT's copy of a module trained in full; it never runs
            continue
        plain = PEFT_LAYERS.sub("", name)
        for pattern, rule in compiled:
            if found := pattern.fullmatch(plain):
                layer = int(found.group(1)) if pattern.groups and found.group(1) else -1
                place = (sections.index(rule.stage.partition(".")[0]), layer, stages.index(rule.stage))
                matched[name] = (place, rule)
                break
        else:
            if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) or _is_trained(module):
                raise ValueError(f"{name}: no rule says how many rows pass through it")
    return matched


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def _has_trained_rows(base: nn.Module, name: str) -> bool:
    """Whether PEFT writes trained rows into this head's weight at every step, which then takes a full gradient."""
    if not name.endswith(".token_adapter.base_layer"):
        return False
    wrapper = base.get_submodule(name.rpartition(".")[0])
    return any(parameter.requires_grad for key, parameter in wrapper.named_parameters() if "trainable_tokens" in key)

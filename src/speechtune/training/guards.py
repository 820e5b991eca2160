"""Guards: checks that stop a run whose training would not be real.

Each raises `TrainingError`, which names what was seen, where, and what to do; see docs/guards.md.
"""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn

from speechtune.errors import TrainingError, some
from speechtune.tensors import gather, non_finite
from speechtune.types import Batch

ADAPTER_MARKS = ("lora_", "modules_to_save", "trainable_tokens")


def check_trainable(parameters: Mapping[str, nn.Parameter], *, lora: bool, additions: Collection[str] = ()) -> None:
    """Before training: something is trainable, with LoRA only adapter and `additions` are, and all of it in float32."""
    if not parameters:
        raise TrainingError("nothing is trainable: every parameter is frozen, so the run would change nothing")
    if lora:
        others = (name for name in parameters if name not in additions)
        accidental = [name for name in others if not any(mark in name for mark in ADAPTER_MARKS)]
        if accidental:
            raise TrainingError(
                f"{len(accidental)} parameters of the base are trainable beside the adapter ({some(accidental)}); "
                "freeze them, or name their module in lora.modules_to_save"
            )
    half = [f"{name} is {p.dtype}" for name, p in parameters.items() if p.dtype in (torch.float16, torch.bfloat16)]
    if half:
        raise TrainingError(
            f"{len(half)} trainable parameters are half precision ({some(half)}): AdamW turns float16 weights into "
            "NaN and loses bfloat16 updates; keep trainable parameters in float32"
        )


def check_targets(batch: Batch, where: str) -> None:
    """A batch must have targets, and for every head it names, or a loss is a constant."""
    if not batch.target_counts:
        raise TrainingError(f"{where}: no target at all in the batch of samples {some(batch.sample_ids)}")
    empty = [head for head, count in batch.target_counts.items() if count == 0]
    if empty:
        raise TrainingError(f"{where}: no target for {some(empty)} in the batch of samples {some(batch.sample_ids)}")


def check_losses(losses: Mapping[str, float], where: str, sample_ids: Sequence[str]) -> None:
    """Every head's mean loss is finite, and not all of them are exactly zero.

    One head may reach 0.0 in float32 once it is sure of a few easy targets; all of them never do on real data.
    """
    for head, value in losses.items():
        if not math.isfinite(value):
            raise TrainingError(f"{where}: the {head} loss is {value}; samples of the step: {some(sample_ids)}")
    if not any(losses.values()):
        heads = " and ".join(losses)
        raise TrainingError(
            f"{where}: the {heads} loss is exactly 0.0, which real data never gives; samples: {some(sample_ids)}"
        )


def check_attached(loss: torch.Tensor, where: str, sample_ids: Sequence[str]) -> None:
    """The loss carries a gradient at all; without one `backward` would fail with a message that names nothing."""
    if not loss.requires_grad:
        raise TrainingError(
            f"{where}: the loss carries no gradient: it does not reach any trainable parameter; samples: "
            f"{some(sample_ids)}"
        )


def check_gradients(parameters: Mapping[str, nn.Parameter], norm: float, where: str, sample_ids: Sequence[str]) -> None:
    """The gradient norm is finite and above zero."""
    if not math.isfinite(norm):
        broken = [name for name, p in parameters.items() if p.grad is not None and not gather(p.grad).isfinite().all()]
        raise TrainingError(
            f"{where}: the gradient norm is {norm}; non-finite gradients in {len(broken)} parameters "
            f"({some(broken)}); samples of the step: {some(sample_ids)}"
        )
    if norm == 0.0:
        raise TrainingError(
            f"{where}: all gradients are zero: the loss does not reach any trainable parameter; samples: "
            f"{some(sample_ids)}"
        )


def check_reached(parameters: Mapping[str, nn.Parameter], where: str) -> None:
    """At the first step every lora_B gets a gradient; lora_A cannot yet, for lora_B starts at zero."""
    unreached = [
        name
        for name, p in parameters.items()
        if "lora_B" in name and (p.grad is None or not bool(gather(p.grad).any()))
    ]
    if unreached:
        raise TrainingError(
            f"{where}: no gradient reached {len(unreached)} lora_B ({some(unreached)}): these adapters are attached "
            "where the loss does not pass; narrow lora.targets"
        )


def still_unreached(parameters: Mapping[str, nn.Parameter], names: Collection[str]) -> set[str]:
    """Those of the named parameters that this step's gradient does not reach."""
    gradients = {name: parameters[name].grad for name in sorted(names)}
    return {name for name, grad in gradients.items() if grad is None or not bool(gather(grad).any())}


def check_additions_reached(unreached: Collection[str], steps: int, enough: int) -> None:
    """Within `enough` steps a gradient has reached every tensor that is trained beside the adapter.

    Not at the first one: a gate that starts at zero lets nothing through to what lies behind it, and not every sample
    has what the module is for.
    """
    if unreached and steps >= enough:
        raise TrainingError(
            f"step {steps}: no gradient has reached {len(unreached)} tensors beside the adapter so far "
            f"({some(sorted(unreached))}): does the data hold what they are for?"
        )


def check_moved(before: Mapping[str, str], after: Mapping[str, str], where: str) -> None:
    """The optimizer step changed something; `before` and `after` are checksums of the trainable parameters."""
    if before == after:
        raise TrainingError(
            f"{where}: the optimizer step changed none of the {len(after)} trainable parameters; is the learning rate "
            "zero, or does the optimizer hold other parameters than the model?"
        )


def check_finite(parameters: Mapping[str, nn.Parameter], where: str, sample_ids: Sequence[str]) -> None:
    """The optimizer step left finite parameters: a checkpoint with NaN would carry it into every resume."""
    norm = nn.utils.get_total_norm([parameter.detach().float() for parameter in parameters.values()])
    # One number for all first: asking each parameter would wait for the device that many times.
    if not bool(gather(norm).isfinite()) and (broken := non_finite(parameters.items())):
        raise TrainingError(
            f"{where}: the optimizer step left {len(broken)} parameters that are not finite ({some(broken)}); samples "
            f"of the step: {some(sample_ids)}"
        )


def check_equal(difference: float, tolerance: float, what: str) -> None:
    """Two models' logits for the same input differ by at most `tolerance`, and not by NaN."""
    if not difference <= tolerance:
        raise TrainingError(
            f"{what} answers differently: logits differ by {difference:.2e}, allowed is {tolerance:.0e}"
        )

"""Several ranks behind one interface: a whole model on each (DDP), or its weights sharded over them (FSDP2).

Sharding is torch's own `fully_shard`: accelerate, given an FSDP plugin on a CPU, ran DDP without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from speechtune.errors import TrainingError

log = logging.getLogger("speechtune")


class Engine:
    """Model and loss as the loop calls them on this rank.

    Args:
        objective: model and loss as one module, on this rank's device.
        accelerator: knows the ranks.
        parallel: what several ranks do; `fsdp` shards `objective` in place.
        defer: with `fsdp`, keep whole gradients until a step's last micro-batch: right for an adapter, whose gradients
            are small; those of a full model would fill the memory that sharding frees.

    Raises:
        TrainingError: the model has no blocks to shard, or is not sharded afterwards.

    Attributes:
        objective: for forward and backward passes of training.
        plain: for evaluation.
    """

    def __init__(
        self, objective: nn.Module, accelerator: Accelerator, parallel: Literal["ddp", "fsdp"], *, defer: bool
    ) -> None:
        self.accelerator, self.defer = accelerator, defer
        if parallel == "fsdp":
            self.objective = self.plain = shard(objective, accelerator)
        else:
            self.objective = accelerator.prepare(objective)
            self.plain = accelerator.unwrap_model(self.objective)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward pass; ranks add up gradients in the `last` one of a step."""
        if isinstance(self.objective, FSDPModule):
            self.objective.set_requires_gradient_sync(last or not self.defer)
            yield
        elif last:
            yield
        else:
            with self.accelerator.no_sync(self.objective):
                yield


def shard(objective: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Shard every repeated block of a model, then what is left, over all ranks; proves that it happened.

    Raises:
        TrainingError: no blocks, or tensors that stayed whole.
    """
    ranks = accelerator.num_processes
    mesh = init_device_mesh(accelerator.device.type, (ranks,), mesh_dim_names=("shard",))
    found = blocks(objective)
    if not found:
        raise TrainingError(
            "speed.parallel=fsdp: the model names no repeated blocks (_no_split_modules), so every pass would gather "
            "all of it on each rank: use speed.parallel=ddp"
        )
    # Also the root gives its whole weights back: outside a pass every parameter is a shard, whoever looks.
    for module in (*found.values(), objective):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    held, total = check_sharded(dict(objective.named_parameters()), ranks)
    shares = cast(list[int], gather_object([held]))
    if sum(shares) != total:
        raise TrainingError(f"speed.parallel=fsdp: ranks hold {shares} bytes, together not the model's {total}")
    per_rank = ", ".join(f"{share / 1e6:,.3f}" for share in shares)
    log.info(
        "FSDP2: %d blocks and the rest sharded over %d ranks; MB per rank: %s of %.3f",
        len(found),
        ranks,
        per_rank,
        total / 1e6,
    )
    return objective


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated layers of a model: what its classes name in `_no_split_modules`, subclasses of these included."""
    names = {str(name) for part in model.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    return {
        path: module
        for path, module in model.named_modules()
        if any(kind.__name__ in names for kind in type(module).__mro__) and any(True for _ in module.parameters())
    }


def check_sharded(parameters: Mapping[str, nn.Parameter], ranks: int) -> tuple[int, int]:
    """Every parameter is a shard over `ranks` ranks; the bytes held here, and those of the whole model.

    Raises:
        TrainingError: names parameters that are whole, or sharded over other ranks.
    """
    unsharded = [name for name, p in parameters.items() if not isinstance(p, DTensor) or p.device_mesh.size() != ranks]
    if unsharded:
        raise TrainingError(
            f"speed.parallel=fsdp: {len(unsharded)} of {len(parameters)} parameters are not sharded over {ranks} ranks "
            f"(first {unsharded[0]})"
        )
    shards = cast(list[DTensor], list(parameters.values()))
    held = sum(p.to_local().numel() * p.element_size() for p in shards)
    return held, sum(p.numel() * p.element_size() for p in shards)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are shards."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded tensor, gathered from all ranks, which must all ask; another tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same on every rank, cut as `reference` is."""
    if not isinstance(reference, DTensor) or tensor.shape != reference.shape:
        return tensor
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def cut_optimizer_state(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A saved optimizer state, its tensors cut as this rank's parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        number: {name: like(value, parameters[number]) for name, value in moments.items()}
        for number, moments in state["state"].items()
    }
    return {**state, "state": cut}

"""Helpers on tensors: checksums, finiteness, sharded tensors, random state."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

CHUNK_ELEMENTS = 1 << 24  # 128 MiB once widened to 64 bits


@torch.no_grad()
def tensor_checksum(tensor: torch.Tensor) -> str:
    """Checksum of a tensor's bits, computed on its device: any flipped bit or swapped element changes it.

    Not cryptographic: it shows accidents, not forgeries. A sharded tensor is gathered, so every rank must call this.
    """
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = gather(tensor.detach()).contiguous().view(-1).view(kinds[tensor.element_size()])
    sums = []
    for chunk in bits.split(CHUNK_ELEMENTS):
        values = chunk.long()
        weights = torch.arange(1, len(values) + 1, device=values.device) % 65_521
        sums += [int(values.sum()), int((values * weights).sum())]
    return f"{tuple(tensor.shape)} {sums}"


def checksums(named: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Checksum of each tensor by name."""
    return {name: tensor_checksum(tensor) for name, tensor in named.items()}


def tensors_fingerprint(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """One hash over names and checksums of tensors in memory."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor_checksum(tensor)}\n".encode())
    return digest.hexdigest()


def non_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of the tensors that hold NaN or infinity, with what they hold."""
    gathered = ((name, gather(tensor.detach())) for name, tensor in tensors)
    broken = [(name, tensor) for name, tensor in gathered if not bool(torch.isfinite(tensor).all())]
    return [f"{name} holds {'NaN' if bool(tensor.isnan().any()) else 'infinity'}" for name, tensor in broken]


def rng_state() -> dict[str, torch.Tensor]:
    """Random state of this process, as tensors (loadable without unpickling)."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_state(states: Mapping[str, torch.Tensor]) -> None:
    """Put back what `rng_state` returned."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def is_sharded(model: nn.Module) -> bool:
    """Whether a model's parameters are shards."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """A sharded tensor in full, gathered from all ranks, which must all call this; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Shard a full tensor, the same on every rank, as `reference` is sharded."""
    if not isinstance(reference, DTensor) or tensor.shape != reference.shape:
        return tensor
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)

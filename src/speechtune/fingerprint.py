"""Identities by content: of a model folder, of tensors in memory."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from blake3 import blake3

from speechtune.sharding import whole

CHUNK_ELEMENTS = 1 << 24  # 128 MiB once widened to 64 bits


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_blake3(path: Path) -> str:
    """BLAKE3 of a file's bytes, as hex: what manifests hold, for it keeps up with a fast disk."""
    # One thread: a pool of threads would be missing in a process forked from this one, and its first hash would hang.
    return blake3(map_file(path)).hexdigest()


def map_file(path: Path) -> mmap.mmap | bytes:
    """A file's bytes for reading, mapped at once where the system can, which saves a page fault each 4 KiB."""
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return b""
        return mmap.mmap(
            file.fileno(), 0, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0), prot=mmap.PROT_READ
        )


def folder_fingerprint(directory: Path) -> str:
    """SHA-256 over the names and bytes of a model folder's config and weights."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*")):
        if path.suffix in {".json", ".safetensors", ".bin"}:
            digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


@torch.no_grad()
def tensor_checksum(tensor: torch.Tensor) -> str:
    """Two checksums of a tensor's bits, computed where it lies: any flipped bit or swapped element changes them.

    Not cryptographic: it shows accidents, not forgeries. A sharded tensor is gathered, so every rank must ask.
    """
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = whole(tensor.detach()).contiguous().view(-1).view(kinds[tensor.element_size()])
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

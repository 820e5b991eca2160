"""Identities by content: of a model folder, of tensors in memory."""

import hashlib
import mmap
from pathlib import Path

from blake3 import blake3


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

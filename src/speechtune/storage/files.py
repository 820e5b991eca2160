"""Single files: written so that readers see the old content or the new, never half of it; hashed and mapped."""

import hashlib
import mmap
import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from blake3 import blake3


def write_atomically(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file beside its place, sync it, and rename it; its folder is made if need be.

    Raises OSError: it could not be written; an older file is untouched then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `tempfile`: its files are for the owner alone, and these keep the umask's mode.
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with aside.open("xb") as file:
            file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        with suppress(OSError):  # where the folder cannot be written, the error under way says so
            aside.unlink(missing_ok=True)


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
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ) if path.stat().st_size else b""


def folder_fingerprint(directory: Path) -> str:
    """SHA-256 over the names and bytes of a model folder's config and weights."""
    digest = hashlib.sha256()
    for path in sorted(directory.glob("*")):
        if path.suffix in {".json", ".safetensors", ".bin"}:
            digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()

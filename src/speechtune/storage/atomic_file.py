"""Write one file so that readers see the old content or the new, never half of it."""

import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


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

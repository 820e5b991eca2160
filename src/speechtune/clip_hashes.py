"""What a clip contains, known without reading it again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from speechtune.audio import content_hash
from speechtune.families.base import AudioRef
from speechtune.feature_store import read_json_lines

SETTLE_SECONDS = 2.0  # coarsest modification time in use (FAT): a younger file may change and keep its stamp


class ClipHasher:
    """Content hash of clips, remembered on disk by path, size and times so that a start need not read all files.

    Args:
        root: cache folder; holds `hashes.jsonl`.
        allow_urls: fetch clips given as URL.
    """

    def __init__(self, root: Path, *, allow_urls: bool = False) -> None:
        self._path = Path(root) / "hashes.jsonl"
        self._allow_urls = allow_urls
        self._known: dict[bytes, str] = {}
        if self._path.exists():
            for row, _ in read_json_lines(self._path):
                if "file" in row and "hash" in row:
                    self._known[_short(row["file"])] = row["hash"]

    def __call__(self, ref: AudioRef) -> str:
        """Return the content hash of `ref` (64 hex digits).

        Raises:
            AudioError: the clip cannot be read.
        """
        now = time.time()
        try:
            stat = os.stat(ref.place) if ref.place is not None else None
        except OSError:
            stat = None  # content_hash reports it
        if stat is None:
            return content_hash(ref, allow_urls=self._allow_urls)
        # The change time is kept as well: tools like rsync and cp -p set the modification time of a new file back.
        times = (stat.st_mtime_ns, stat.st_ctime_ns)
        file = (os.path.abspath(ref.place or ""), stat.st_size, *times, ref.offset_seconds, ref.duration_seconds)
        short = _short(file)
        if short not in self._known:
            digest = content_hash(ref, allow_urls=self._allow_urls)
            if now - stat.st_mtime < SETTLE_SECONDS:
                return digest
            self._known[short] = digest
            self._remember({"file": file, "hash": digest})
        return self._known[short]

    def _remember(self, row: dict) -> None:
        # The line begins with a newline, so that one torn by a kill spoils no other. Failure costs only time.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                file.write(b"\n" + json.dumps(row).encode() + b"\n")


def _short(file: Sequence[Any]) -> bytes:
    """A file's path, size, times and segment, in 16 bytes."""
    return hashlib.blake2b(json.dumps(file).encode(), digest_size=16).digest()

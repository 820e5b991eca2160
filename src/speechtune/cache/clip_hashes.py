"""Content hashes of clips, kept on disk so that unchanged files are not read again."""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from speechtune.audio import content_hash
from speechtune.cache.packed_map import CLIP_KEY_BYTES, PackedMap, short_key
from speechtune.cache.store import read_json_lines
from speechtune.types import AudioRef

SETTLE_SECONDS = 2.0  # coarsest modification time in use (FAT): a younger file may change and keep its stamp


class ClipHasher:
    """Content hash of a clip; that of a file is remembered by path, size and times.

    Args:
        root: cache folder; holds `hashes.jsonl`.
        allow_urls: fetch clips given as URL.
    """

    def __init__(self, root: Path, *, allow_urls: bool = False) -> None:
        self._path = Path(root) / "hashes.jsonl"
        self._allow_urls = allow_urls

    def __call__(self, ref: AudioRef) -> str:
        """The content hash of `ref`, 64 hex digits."""
        now = time.time()
        try:
            stat = os.stat(ref.path) if ref.path is not None else None
        except OSError:
            stat = None  # content_hash reports it
        if stat is None:
            return content_hash(ref, allow_urls=self._allow_urls)
        # With the change time, because rsync and cp -p give a new file the modification time of the old one.
        times = (stat.st_mtime_ns, stat.st_ctime_ns)
        file = (os.path.abspath(ref.path or ""), stat.st_size, *times, ref.offset_seconds, ref.duration_seconds)
        place = self._known.place(key := _short(file))
        if place is not None:
            return self._known.values[place].tobytes().hex()
        digest = content_hash(ref, allow_urls=self._allow_urls)
        if now - stat.st_mtime >= SETTLE_SECONDS:
            self._known[key] = bytes.fromhex(digest)
            self._remember({"file": file, "hash": digest})
        return digest

    @cached_property
    def _known(self) -> PackedMap:
        """The remembered hashes, read at the first use: collecting the clips before that takes memory, too."""
        known = PackedMap(f"V{CLIP_KEY_BYTES}")
        if self._path.exists():
            for row, _ in read_json_lines(self._path):
                with contextlib.suppress(KeyError, TypeError, ValueError):
                    if len(digest := bytes.fromhex(row["hash"])) == CLIP_KEY_BYTES:
                        known[_short(row["file"])] = digest
        return known

    def _remember(self, row: dict[str, object]) -> None:
        # The line begins with a newline, so that a line torn by a kill does not swallow it. Failure costs only time.
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab", buffering=0) as file:
                file.write(b"\n" + json.dumps(row).encode() + b"\n")


def _short(file: Sequence[Any]) -> bytes:
    """Key of a file's path, size, times and segment."""
    return short_key(json.dumps(file))

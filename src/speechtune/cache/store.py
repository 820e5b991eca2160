"""Arrays on disk by content key: append-only, memory-mapped, and safe to kill at any moment.

A store is a folder of append-only parts, one per writer: `part-0000.bin` holds raw arrays, `part-0000.jsonl` one line
per array, written after its data. So a complete line names complete data.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import time
import zlib
from collections import deque
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from speechtune.cache.packed_map import Numbered, PackedMap, short_key
from speechtune.errors import AudioError, ConfigError
from speechtune.storage.files import write_atomically

ALIGNMENT = 64  # bytes; a cache line, and enough for any dtype
SYNC_ARRAYS = 256
SYNC_SECONDS = 10.0

_PLACE = np.dtype([("part", "u4"), ("offset", "i8"), ("kind", "u4"), ("crc32", "u4"), ("checked", "?")])


class _Entry(NamedTuple):
    """Where an array lies, and what it is."""

    part: str
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: str
    crc32: int

    @property
    def end(self) -> int:
        return self.offset + math.prod(self.shape) * np.dtype(self.dtype).itemsize


class FeatureStore:
    """Arrays by key for one encoding (`encode_key`), in a folder of its own; many processes may read and write it."""

    def __init__(self, root: Path, encode_key: str) -> None:
        self.root = Path(root)
        self.encode_key = encode_key
        self.folder = self.root / hashlib.sha256(encode_key.encode()).hexdigest()[:16]
        self._positions: dict[str, tuple[int, int]] = {}  # part -> inode and bytes read of its index
        self._maps: dict[str, np.memmap] = {}
        self._parts: Numbered[str] = Numbered()
        self._kinds: Numbered[tuple[tuple[int, ...], str]] = Numbered()  # shape and dtype
        self._writer: _Writer | None = None
        self._claim_folder()

    def __reduce__(self) -> tuple[type["FeatureStore"], tuple[Path, str]]:
        return FeatureStore, (self.root, self.encode_key)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, key: str) -> bool:
        return short_key(key) in self._index

    def __len__(self) -> int:
        return len(self._index)

    @cached_property
    def _index(self) -> PackedMap:
        """Where each array lies; read at the first use, because hashing the clips before that takes memory, too."""
        self.__dict__["_index"] = PackedMap(_PLACE)  # `refresh` fills it
        self.refresh()
        return self.__dict__["_index"]

    def refresh(self) -> None:
        """Read what other processes have added since the last call."""
        known = self._index
        for index in sorted(self.folder.glob("part-*.jsonl")):
            stat = index.stat()
            # Measured after the index: each line in it was written after its data.
            num_data_bytes = _size(index.with_suffix(".bin"))
            inode, position = self._positions.get(index.stem, (stat.st_ino, 0))
            if inode != stat.st_ino or stat.st_size < position:  # rewritten by a writer that dropped entries
                known.clear()
                self._positions.clear()
                return self.refresh()
            for key, entry, end in _read_index(index, position):
                if end > stat.st_size:
                    break  # came since; its data were not measured
                if entry is not None and entry.end <= num_data_bytes:
                    self._add(key, entry)
                position = end
            self._positions[index.stem] = (stat.st_ino, position)

    def get(self, key: str) -> np.ndarray:
        """The array of `key`, a read-only view into the memory-mapped part; its bytes are checked once per process."""
        if key not in self:
            self.refresh()
        located = self._find(key)
        if located is None:
            raise KeyError(key)
        place, entry = located
        data = self._bytes(entry)
        checked = self._index.values["checked"]
        if not checked[place]:
            if zlib.crc32(data.data) != entry.crc32:
                raise AudioError(
                    f"{self.folder / entry.part}.bin: the encoded clip {key} is damaged at byte {entry.offset}; "
                    "encode again with verification, or delete this folder"
                )
            checked[place] = True
        return data.view(entry.dtype).reshape(entry.shape)

    def put(self, key: str, array: np.ndarray) -> None:
        """Store `array` under `key`; a key that is there already keeps its array.

        The array survives the death of this process when put returns, and a power cut after the next sync (256 arrays,
        10 seconds, or close).
        """
        if array.size == 0 or array.dtype.kind not in "biufc":
            raise ValueError(f"{key}: cannot store an array of shape {array.shape} and dtype {array.dtype}")
        if key in self:
            return
        try:
            if self._writer is None:
                self._writer = _open_writer(self.folder)
            self._add(key, self._writer.append(key, array))
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot write encoded audio: {error.strerror}; make room, or set data.cache_dir to a "
                "local disk; clips already encoded are kept"
            ) from error

    def verify(self) -> list[str]:
        """Return the keys whose bytes on disk are not those written; reads everything."""
        self.refresh()
        damaged: list[str] = []
        for index in sorted(self.folder.glob("part-*.jsonl")):
            for key, entry, _ in _read_index(index):  # the index in memory holds hashes of the keys only
                located = self._find(key)
                if entry is None or located is None or located[1] != entry:
                    continue  # replaced by a later entry, or without its data
                if zlib.crc32(self._bytes(entry).data) != entry.crc32:
                    damaged.append(key)
        return damaged

    def discard(self, keys: Collection[str]) -> None:
        """Forget `keys`, so that they are encoded anew."""
        self.close()
        for part in sorted({located[1].part for located in map(self._find, keys) if located is not None}):
            try:
                _Writer(self.folder, part, drop=frozenset(keys)).close()
            except OSError as error:
                raise ConfigError(
                    f"{self.folder / part}.bin: cannot drop damaged clips: {error.strerror}; another process may be "
                    "encoding into it: wait for its end"
                ) from error
        self.refresh()

    def close(self) -> None:
        """Sync and release the part written; reading goes on working."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, key: str, entry: _Entry) -> None:
        part, kind = self._parts.number(entry.part), self._kinds.number((entry.shape, entry.dtype))
        self._index[short_key(key)] = (part, entry.offset, kind, entry.crc32, False)

    def _find(self, key: str) -> tuple[int, _Entry] | None:
        place = self._index.place(short_key(key))
        if place is None:
            return None
        part, offset, kind, crc32, _ = self._index.values[place].item()
        return place, _Entry(self._parts[part], offset, *self._kinds[kind], crc32)

    def _claim_folder(self) -> None:
        path = self.folder / "encode_key.txt"
        try:
            if not path.exists():
                write_atomically(path, self.encode_key.encode())
            stored = path.read_bytes().decode(errors="replace")
        except OSError as error:
            raise ConfigError(
                f"{self.folder}: cannot open the cache: {error.strerror}; set data.cache_dir to a writable folder"
            ) from error
        if stored != self.encode_key:
            raise ConfigError(
                f"{path}: holds {stored!r}, expected {self.encode_key!r}; this folder was made for another encoding: "
                "delete it, or set data.cache_dir to another folder"
            )

    def _bytes(self, entry: _Entry) -> np.ndarray:
        """The uint8 data of an entry; too short when the file was cut off since."""
        mapped = self._maps.get(entry.part)
        if mapped is None or len(mapped) < entry.end:
            path = self.folder / f"{entry.part}.bin"
            if _size(path) < entry.end:
                return np.empty(0, np.uint8)
            mapped = self._maps[entry.part] = np.memmap(path, np.uint8, mode="r")
        return np.asarray(mapped[entry.offset : entry.end])


class _Writer:
    """The only writer of one part, as long as it holds the lock on the part's data file."""

    def __init__(self, folder: Path, part: str, drop: frozenset[str] = frozenset()) -> None:
        self._part = part
        self._index_path = folder / f"{part}.jsonl"
        self._data = os.open(folder / f"{part}.bin", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._data, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._data)
            raise
        self._end = self._recover(drop)
        self._index = os.open(self._index_path, os.O_RDWR | os.O_CREAT, 0o644)
        self._index_end = os.fstat(self._index).st_size
        self._unsynced = 0
        self._synced_at = time.monotonic()

    def _recover(self, drop: frozenset[str]) -> int:
        """Cut off what a killed writer left incomplete; return the end of the data in bytes."""
        if not self._index_path.exists():
            os.ftruncate(self._data, 0)
            return 0
        size = os.fstat(self._data).st_size
        end, after, some_lost = 0, 0, False
        recent: deque[_Entry] = deque()
        for key, entry, position in _read_index(self._index_path):
            after = position
            if entry is None:
                continue
            if entry.end > size or key in drop:
                some_lost = True
                continue
            recent.append(entry)
            if len(recent) > SYNC_ARRAYS:
                end = max(end, recent.popleft().end)
        # Only arrays since the last sync can have lost their bytes to a power cut while the file kept its length.
        broken = {entry for entry in recent if not self._is_intact(entry)}
        end = max([end, *(entry.end for entry in recent if entry not in broken)])
        if some_lost or broken:
            # Left in place, the line of a lost array would name whatever is written there next.
            lines = (
                _index_line(key, entry)
                for key, entry, _ in _read_index(self._index_path)
                if entry is not None and entry.end <= size and key not in drop and entry not in broken
            )
            write_atomically(self._index_path, lines)
        else:
            os.truncate(self._index_path, after)
        os.ftruncate(self._data, end)
        return end

    def _is_intact(self, entry: _Entry) -> bool:
        return zlib.crc32(os.pread(self._data, entry.end - entry.offset, entry.offset)) == entry.crc32

    def append(self, key: str, array: np.ndarray) -> _Entry:
        data = array.tobytes()
        offset = math.ceil(self._end / ALIGNMENT) * ALIGNMENT
        entry = _Entry(self._part, offset, array.shape, array.dtype.str, zlib.crc32(data))
        line = _index_line(key, entry)
        _write_at(self._data, data, offset)
        _write_at(self._index, line, self._index_end)
        self._end, self._index_end = entry.end, self._index_end + len(line)
        self._unsynced += 1
        if self._unsynced >= SYNC_ARRAYS or time.monotonic() - self._synced_at >= SYNC_SECONDS:
            self._sync()
        return entry

    def close(self) -> None:
        try:
            self._sync()
        finally:
            fcntl.flock(self._data, fcntl.LOCK_UN)  # a forked child may hold a copy of the descriptor
            os.close(self._data)
            os.close(self._index)

    def _sync(self) -> None:
        os.fsync(self._data)
        os.fsync(self._index)
        self._unsynced, self._synced_at = 0, time.monotonic()


def _open_writer(folder: Path) -> _Writer:
    """Take the first part that no living process writes."""
    for number in itertools.count():
        with contextlib.suppress(BlockingIOError):
            return _Writer(folder, f"part-{number:04d}")
    raise AssertionError


def _index_line(key: str, entry: _Entry) -> bytes:
    row = {"key": key, "offset": entry.offset, "shape": entry.shape, "dtype": entry.dtype, "crc32": entry.crc32}
    return json.dumps(row).encode() + b"\n"


def _read_index(path: Path, start: int = 0) -> Iterator[tuple[str, _Entry | None, int]]:
    """Key, entry (None for a line that does not parse) and end of each complete line from byte `start`."""
    for row, end in read_json_lines(path, start):
        key, entry = "", None
        with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
            shape, dtype = tuple(map(int, row["shape"])), str(row["dtype"])
            np.dtype(dtype)
            offset, crc32 = int(row["offset"]), int(row["crc32"])
            if 0 <= offset < 2**63 and 0 <= crc32 < 2**32:
                key, entry = str(row["key"]), _Entry(path.stem, offset, shape, dtype, crc32)
        yield key, entry, end


def read_json_lines(path: Path, start: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The complete lines of `path` from byte `start`, parsed, each with the position after it.

    A line that is no JSON object, which is what a power cut leaves, gives an empty one.
    """
    position = start
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            position += len(line)
            row = None
            with contextlib.suppress(ValueError):
                row = json.loads(line)
            yield row if isinstance(row, dict) else {}, position


def _write_at(descriptor: int, data: bytes, start: int) -> None:
    """Write all of `data` at byte `start`, or leave the file ending there."""
    view = memoryview(data)
    try:
        while view:
            written = os.pwrite(descriptor, view, start + len(data) - len(view))
            view = view[written:]
    except OSError:
        os.ftruncate(descriptor, start)
        raise


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0

"""Maps and lists of a million short records in numpy arrays: tens of bytes each, where Python objects take hundreds."""

import hashlib
from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import DTypeLike

KEY_BYTES = 16
CLIP_KEY_BYTES = 32  # SHA-256
RECENT = 2**14  # entries that may wait as objects

Value = TypeVar("Value", bound=Hashable)


def short_key(text: str) -> bytes:
    """The key of a `PackedMap` for a text of any length: its hash."""
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=KEY_BYTES).digest()


class PackedMap:
    """Records of one numpy dtype by keys of 16 bytes, sorted by key.

    New entries wait, first in a dict and then in arrays, and are sorted in at the next search: a million entries set
    one after the other are sorted once.

    Attributes:
        values: the sorted records; an index into it is valid until the next call.
    """

    def __init__(self, dtype: DTypeLike) -> None:
        self._keys = np.empty(0, f"S{KEY_BYTES}")
        self.values = np.empty(0, dtype)
        self._recent: dict[bytes, Any] = {}
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []  # keys and records, older than the recent ones

    def __len__(self) -> int:
        self._settle()
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return key in self._recent or self._search(key) is not None

    def __setitem__(self, key: bytes, record: Any) -> None:
        self._recent[key] = record
        if len(self._recent) >= RECENT:
            self._pack()

    def place(self, key: bytes) -> int | None:
        """Index in `values` of the record of `key`, or None."""
        if key in self._recent:
            self._pack()
        return self._search(key)

    def clear(self) -> None:
        """Forget everything."""
        self._keys, self.values = self._keys[:0], self.values[:0]
        self._recent.clear()
        self._waiting.clear()

    def _search(self, key: bytes) -> int | None:
        if self._waiting:
            self._settle()
        place = int(self._keys.searchsorted(np.bytes_(key)))
        # Compared as bytes: numpy drops zero bytes at the end of a string.
        return place if self._keys[place : place + 1].tobytes() == key else None

    def _pack(self) -> None:
        keys = np.array(list(self._recent), self._keys.dtype)
        self._waiting.append((keys, np.array(list(self._recent.values()), self.values.dtype)))
        self._recent = {}

    def _settle(self) -> None:
        if self._recent:
            self._pack()
        if not self._waiting:
            return
        keys = np.concatenate([self._keys, *(keys for keys, _ in self._waiting)])
        self.values = np.concatenate([self.values, *(values for _, values in self._waiting)])
        self._waiting = []
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        newest = np.append(keys[1:] != keys[:-1], True)  # of equal keys the last, because the sort is stable
        self._keys, self.values = keys[newest], self.values[order[newest]]


class Numbered(Generic[Value]):
    """Distinct values, numbered from 0 in order of appearance."""

    def __init__(self) -> None:
        self._values: list[Value] = []
        self._numbers: dict[Value, int] = {}

    def __getitem__(self, number: int) -> Value:
        return self._values[number]

    def number(self, value: Value) -> int:
        """The number of a value; a new value gets the next one."""
        number = self._numbers.setdefault(value, len(self._values))
        if number == len(self._values):
            self._values.append(value)
        return number


class ClipKeys(Sequence[tuple[str, ...]]):
    """The keys of each sample's clips in hex, one after the other; "" stands for a clip that has none.

    Args:
        digests: 32 bytes for each clip, zeros for none.
        uses: the number of the clip, for each clip of each sample.
        ends: where each sample's uses end.
    """

    def __init__(self, digests: bytearray, uses: Sequence[int], ends: Sequence[int]) -> None:
        self._digests = np.frombuffer(digests, f"V{CLIP_KEY_BYTES}")
        self._uses, self._ends = uses, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple[str, ...]:  # type: ignore[override]
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return tuple(self.key(number) for number in self._uses[start : self._ends[index]])

    def key(self, number: int) -> str:
        """The key of one clip."""
        digest = self._digests[number].tobytes()
        return digest.hex() if any(digest) else ""

    def distinct(self) -> np.ndarray:
        """The first clip of each key, in order."""
        keys, first = np.unique(self._digests.view(f"S{CLIP_KEY_BYTES}"), return_index=True)
        return np.sort(first[keys != b""])  # numpy drops zero bytes at the end: zeros are b""

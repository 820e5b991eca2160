"""Packed collections: what they hold is what a dict or a list of tuples would hold, in a tenth of the memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from speechtune.cache import packed_map
from speechtune.cache.encode import ClipHasher
from speechtune.cache.packed_map import CLIP_KEY_BYTES, ClipKeys, Numbered, PackedMap
from speechtune.cache.store import FeatureStore

ROWS = 20_000


def test_a_packed_map_is_a_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that end in zeros, written again, asked for while they wait and after they are sorted in."""
    monkeypatch.setattr(packed_map, "RECENT", 7)
    random = np.random.default_rng(0)
    # few different bytes, so that keys share beginnings, and end in zeros often
    keys = [random.integers(0, 2, packed_map.KEY_BYTES, np.uint8).tobytes() for _ in range(80)]
    keys += [bytes(packed_map.KEY_BYTES), bytes(15) + b"\1", b"\1" + bytes(15)]
    ours, plain = PackedMap(np.dtype([("number", "i8"), ("flag", "?")])), {}
    for number in range(600):
        key = keys[random.integers(len(keys))]
        if number % 3:
            ours[key] = plain[key] = (number, bool(number % 2))
        place = ours.place(key) if number % 5 else None
        if place is not None:
            assert ours.values[place].item() == plain[key]
        assert (key in ours) == (key in plain)
    assert len(ours) == len(plain)
    for key in keys:
        place = ours.place(key)
        assert (None if place is None else ours.values[place].item()) == plain.get(key)
    ours.clear()
    assert len(ours) == 0 and keys[0] not in ours and ours.place(keys[0]) is None


def test_clip_keys_are_the_tuples_they_stand_for() -> None:
    digests = [bytes([value]) * CLIP_KEY_BYTES for value in (5, 3, 0, 5)]
    digests.append(b"\7" + bytes(CLIP_KEY_BYTES - 1))  # ends in zeros, and is a key all the same
    keys = ClipKeys(bytearray(b"".join(digests)), [1, 0, 2, 3, 4], [2, 2, 5])
    plain = [(digests[1].hex(), digests[0].hex()), (), ("", digests[3].hex(), digests[4].hex())]
    assert list(keys) == plain and keys[-1] == plain[-1] and len(keys) == 3
    assert keys.distinct().tolist() == [0, 1, 4]
    with pytest.raises(IndexError):
        keys[3]
    none = ClipKeys(bytearray(), [], [])
    assert list(none) == [] and none.distinct().tolist() == []


def test_values_are_numbered_once() -> None:
    numbered: Numbered[str] = Numbered()
    assert [numbered.number(value) for value in "abcab"] == [0, 1, 2, 0, 1]
    assert [numbered[number] for number in range(3)] == ["a", "b", "c"]


def stored_index(root: Path) -> FeatureStore:
    store = FeatureStore(root, "key")
    with (store.folder / "part-0000.jsonl").open("w") as index:
        for number in range(ROWS):
            row = {"key": f"{number:064x}", "offset": number * 64, "shape": [4, 8], "dtype": "<i2", "crc32": number}
            index.write(json.dumps(row) + "\n")
    with (store.folder / "part-0000.bin").open("wb") as data:
        data.truncate(ROWS * 64)
    return store


def hashed_clips(root: Path) -> ClipHasher:
    with (root / "hashes.jsonl").open("w") as file:
        for number in range(ROWS):
            file.write(
                json.dumps({"file": [f"/clip-{number}.wav", 1, 2, 3, 0.0, None], "hash": f"{number:064x}"}) + "\n"
            )
    return ClipHasher(root)


@pytest.mark.parametrize(
    ("make", "read", "limit"),
    [(stored_index, len, 60), (hashed_clips, lambda hasher: len(hasher._known), 70)],
    ids=["index of the store", "remembered hashes"],
)
def test_bytes_of_an_entry(tmp_path: Path, make: Callable[[Path], Any], read: Callable[[Any], int], limit: int) -> None:
    """Issue: an entry took 340 bytes in the index and 250 among the hashes, as text in dicts."""
    made = make(tmp_path)
    tracemalloc.start()
    try:
        assert read(made) == ROWS
        size = tracemalloc.get_traced_memory()[0] / ROWS
    finally:
        tracemalloc.stop()
    assert size < limit


def test_what_is_no_entry_is_passed_over(tmp_path: Path) -> None:
    """Lines that only a damaged disk can hold, numbers out of bounds among them."""
    store = FeatureStore(tmp_path, "key")
    sound = {"key": "sound", "offset": 0, "shape": [2], "dtype": "|u1", "crc32": 3069713155}
    bad: list[Any] = [{"offset": -1}, {"offset": 2**70}, {"crc32": 2**40}, {"shape": [[1]]}, {"shape": ["a"]}]
    bad += [{"dtype": "none"}, {"dtype": {"names": ["a"], "formats": ["i2"]}}, {"shape": 3}, {"offset": None}]
    lines = [json.dumps(sound | {"key": f"bad-{number}"} | change) for number, change in enumerate(bad)]
    (store.folder / "part-0000.jsonl").write_text("\n".join([*lines, "[]", "{}", json.dumps(sound)]) + "\n")
    (store.folder / "part-0000.bin").write_bytes(b"\1\2")
    assert len(store) == 1 and "sound" in store


def test_hashes_that_are_none_are_passed_over(tmp_path: Path) -> None:
    rows = [{"file": ["/a"], "hash": value} for value in ("", "ab", "no hex", 7, None)] + [{"file": ["/b"]}]
    (tmp_path / "hashes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(ClipHasher(tmp_path)._known) == 0

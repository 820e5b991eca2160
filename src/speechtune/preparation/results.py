"""What a step found, in a file of its own that a killed process cannot damage."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, Self, TypeVar

from pydantic import BaseModel

from speechtune.storage.files import write_atomically

HASH_DIGITS = 8
VERSION = 1  # of what the steps compute; another one computes everything anew

Progress = Callable[[str, float, float], None]
"""Called with (step, work done, work in all)."""


class Result(BaseModel, frozen=True, extra="forbid"):
    """Base of what steps find."""


ResultT = TypeVar("ResultT", bound=Result)
Item = TypeVar("Item")


class Results(Generic[ResultT]):
    """Results of one step by key: JSON lines, each appended and synced when it is found.

    The first line says what they were computed with, and the file's name has a hash of it: results with other settings
    lie beside it. What a killed process left of the last line is cut off.
    """

    def __init__(self, folder: Path, step: str, kind: type[ResultT], computed_with: Mapping[str, object]) -> None:
        header = _header(computed_with)
        path = folder / f"{step}-{digest(computed_with)}.jsonl"
        self._found: dict[str, ResultT] = {}
        content = path.read_bytes() if path.is_file() else b""
        size = len(header)
        if content.startswith(header):
            for line in content[size:].splitlines(keepends=True):
                try:
                    row = json.loads(line if line.endswith(b"\n") else b"")
                    self._found[row["key"]] = kind.model_validate(row["result"])
                except (ValueError, KeyError):
                    break
                size += len(line)
        else:
            write_atomically(path, header)
        self._file = path.open("r+b")
        self._file.truncate(size)
        self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> ResultT:
        return self._found[key]

    def put(self, key: str, result: ResultT) -> None:
        """Keep a result, on disk before this returns."""
        line = json.dumps({"key": key, "result": result.model_dump(mode="json")}, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._found[key] = result


def digest(computed_with: Mapping[str, object]) -> str:
    """A short hash of settings and of this version, for names."""
    return hashlib.sha256(_header(computed_with)).hexdigest()[:HASH_DIGITS]


def _header(computed_with: Mapping[str, object]) -> bytes:
    return json.dumps({"version": VERSION, **computed_with}, ensure_ascii=False).encode() + b"\n"


def compute(
    folder: Path,
    step: str,
    kind: type[ResultT],
    computed_with: Mapping[str, object],
    items: Mapping[str, Item],
    work: Callable[[Item], ResultT],
    progress: Progress,
) -> dict[str, ResultT]:
    """Results of a step for items by key: those in its file, and the others from `work`, one after the other."""
    with Results(folder, step, kind, computed_with) as results:
        for number, (key, item) in enumerate(items.items()):
            progress(step, number, len(items))
            if key not in results:
                results.put(key, work(item))
        progress(step, len(items), len(items))
        return {key: results[key] for key in items}

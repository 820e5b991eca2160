"""Rows of parquet files and of folders that `datasets` saved, with the clips inside them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil

from speechtune.data.rows import SPLITS, Place, Row, Split
from speechtune.errors import ManifestError, printable

_PLACES = ("*.parquet", "data/*.parquet", "train/*.parquet", "test/*.parquet")
_FIRST_WORD = re.compile("[A-Za-z]+")
_BATCH_ROWS = 64  # with inline clips of some 120 kB each


def parquet_files(path: Path) -> dict[Split | None, list[Path]]:
    """The parquet files of a folder, or the one file, by split; None where neither file nor its folder names one."""
    paths = {file for place in _PLACES for file in path.glob(place) if not file.name.startswith(".")}
    result: dict[Split | None, list[Path]] = {}
    for file in filter(os.path.isfile, sorted(paths) if path.is_dir() else [path] * (path.suffix == ".parquet")):
        begin = _FIRST_WORD.match(file.name)
        names = (begin[0] if begin else "", file.parent.name)
        named: list[Split] = [split for name in names for split in SPLITS if split == name]
        result.setdefault(named[0] if named else None, []).append(file)
    return result


def parquet_splits(path: Path) -> tuple[Split, ...]:
    """The splits that parquet files name; empty where there are none."""
    files = parquet_files(path)
    return tuple(split for split in SPLITS if split in files)


def saved_files(path: Path) -> list[Path]:
    """The files of a folder that `Dataset.save_to_disk` wrote, or the one file."""
    files = [path] if path.suffix == ".arrow" else sorted(path.glob("*.arrow"))
    return [file for file in files if os.path.isfile(file) and not file.name.startswith((".", "cache-", "indices"))]


def columns(place: Place) -> set[str]:
    """The names of the columns of parquet files.

    Raises ManifestError: one cannot be read; ModuleNotFoundError: pyarrow is not installed.
    """
    import pyarrow
    from pyarrow import parquet

    (file, *_) = _chosen(place)
    try:
        return set(parquet.read_schema(file).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise ManifestError(f"{file}: cannot be read as parquet: {error}") from None


def arrow_rows(place: Place) -> Iterator[Row]:
    """Rows of the split's files. Their clips are held in memory, so they must fit into it.

    Of a folder whose files name no split all are read, and so is a file that is named itself.

    Raises ManifestError: no file of the split, damaged ones, or more than the memory holds; ModuleNotFoundError:
    pyarrow is not installed.
    """
    import pyarrow
    from pyarrow import ipc, parquet

    files = saved_files(place.path) or _chosen(place)
    size, free = sum(file.stat().st_size for file in files), psutil.virtual_memory().available
    if size > free:
        reason = f"{size / 2**30:.1f} GiB of clips and texts would be read into memory, {free / 2**30:.1f} GiB are free"
        raise ManifestError(f"{place.path}: {reason}; write the clips into files, see docs/data.md")
    number = 0
    for file in files:
        line = 0
        try:
            with pyarrow.OSFile(str(file)) as source:
                saved = file.suffix == ".arrow"
                batches = ipc.open_stream(source) if saved else parquet.ParquetFile(source).iter_batches(_BATCH_ROWS)
                for batch in batches:
                    for start in range(0, batch.num_rows, _BATCH_ROWS):
                        for value in batch.slice(start, _BATCH_ROWS).to_pylist():
                            number, line = number + 1, line + 1
                            yield Row(number, f"{file}:{line}", value)
        except (pyarrow.ArrowException, ValueError, OSError) as error:
            kind = "an Arrow stream" if file.suffix == ".arrow" else "parquet"
            raise ManifestError(f"{file}: cannot be read as {kind}: {error}") from None


def _chosen(place: Place) -> list[Path]:
    files = parquet_files(place.path)
    own = files.get(place.split) or (None if files.keys() & {*SPLITS} else files.get(None))
    own = [place.path] if place.path.is_file() else own
    if not own:
        reason = f"holds no parquet file of the split {place.split!r}, such as data/{place.split}-*.parquet"
        raise ManifestError(f"{place.path}: {reason}")
    return own


def left_out(place: Place) -> list[str]:
    """A note on the parquet files of a folder that name no split, where others do."""
    files = parquet_files(place.path)
    others = files.get(None, []) if files.keys() & {*SPLITS} else []
    names = printable(", ".join(file.name for file in others))
    return [f"parquet files that name neither train nor test are left out: {names:.200}"] if others else []

"""The table of layouts: how each is recognised, and how its rows are read."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from speechtune.data.arrow import arrow_rows, parquet_files, saved_files
from speechtune.data.folders import (
    is_kaldi,
    is_pairs,
    kaldi_rows,
    pair_rows,
    parallel_rows,
    text_folder,
    walk,
)
from speechtune.data.plain_rows import AUDIO, advice, is_clip
from speechtune.data.rows import SPLITS, Place, Row, json_rows
from speechtune.data.tables import first_lines, is_list, is_table, list_rows, table_rows
from speechtune.errors import ManifestError, printable, some


@dataclass(frozen=True, slots=True)
class Layout:
    """A way in which people lay out data.

    Attributes:
        name: as docs/data.md calls it.
        matches: whether a file or folder is laid out so.
        rows: its rows, as the objects that `read_row` reads.
    """

    name: str
    matches: Callable[[Place], object]
    rows: Callable[[Place], Iterator[Row]]


LAYOUTS = (
    Layout("Kaldi", is_kaldi, kaldi_rows),
    Layout("clips and texts apart", text_folder, parallel_rows),
    Layout("pairs", is_pairs, pair_rows),
    Layout("parquet", lambda place: parquet_files(place.path), arrow_rows),
    Layout("save_to_disk", lambda place: saved_files(place.path), arrow_rows),
    Layout("JSON", lambda place: place.head.lstrip().startswith(("[", "{")), json_rows),
    Layout("table", is_table, table_rows),
    Layout("list", is_list, list_rows),
)
"""Tried in this order. A further one is a line here, its two functions, and a row of the table in docs/data.md."""

_FILES = ("metadata.json", "metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.list")
"""Files of a folder that are read before anything else in it."""
_ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".list", ".lst", ".txt")
_PACKED = {"PK": "zip", "\x1f\udc8b": "gzip", "7z\udcbc": "7z", "Rar!": "rar"}
SEE = "docs/data.md lists the layouts that are read"


def find_layout(place: Place) -> tuple[Layout, Place]:
    """The layout of a file or folder, and the file or folder in it that holds the rows.

    Raises ManifestError: there is no such file, or it is of no known layout.
    """
    path = place.path
    if not path.exists() and path.name in SPLITS and parquet_files(path.parent):
        place = Place(path.parent, "test" if path.name == "test" else "train")
    elif path.is_dir():
        place = next((Place(path / name, place.split) for name in _FILES if (path / name).is_file()), place)
    elif not path.is_file():
        raise ManifestError(f"{path}: no such file or folder; {SEE}")
    layout = next((layout for layout in LAYOUTS if layout.matches(place)), None)
    if layout is not None:
        return layout, place
    if not place.path.is_dir():
        raise ManifestError(f"{place.path}: {_why_unknown(place)}; {SEE}")
    return find_layout(Place(_inside(place), place.split))


def iterate_rows(place: Place) -> Iterator[Row]:
    """Stream the rows of data of any layout."""
    layout, place = find_layout(place)
    try:
        yield from layout.rows(place)
    except OSError as error:
        raise ManifestError(f"{error.filename or place.path}: cannot be read: {error.strerror}") from None


def _inside(place: Place) -> Path:
    """What to read of a folder that holds several data files, or a folder for each split."""
    folder, split = place.path, place.split
    if (folder / split).is_dir():
        return folder / split
    names = sorted(name for name in os.listdir(folder) if name.lower().endswith(_ENDINGS) and name[0] != ".")
    files = {name.partition(".")[0]: name for name in names if _names_clips(Place(folder / name))}
    whole = [stem for stem in files if stem not in SPLITS]
    if chosen := files.get(split) or (files[whole[0]] if len(files) == len(whole) == 1 else None):
        return folder / chosen
    if "validated" in files and len(files) == len(whole):  # of Common Voice, whose other tables are parts of it or bad
        return folder / files["validated"]
    if files:
        raise ManifestError(f"{folder}: name the data file in it that is meant, such as {some([*files.values()])}")
    if any(is_clip(name) for _, found in walk(folder) for name in found):
        raise ManifestError(f"{folder}: no audio file has a .txt or .lab of the same name beside it; {SEE}")
    raise ManifestError(f"{folder}: holds neither metadata.json nor any other data file, nor clips with texts; {SEE}")


def _names_clips(place: Place) -> bool:
    layout = next((layout for layout in LAYOUTS if layout.matches(place)), None)
    if layout is None or layout.rows is list_rows:
        return layout is not None
    value = next((row.value for row in layout.rows(place)), None)
    return isinstance(value, dict) and not value.keys().isdisjoint((*AUDIO, "messages", "conversations", "query"))


def _why_unknown(place: Place) -> str:
    """Why a file cannot be read, and what to do about it."""
    head, suffix = place.head, place.path.suffix
    packed = next((kind for mark, kind in _PACKED.items() if head.startswith(mark)), None)
    if packed or head[257:262] == "ustar":
        if suffix in (".xlsx", ".ods"):
            return "a spreadsheet: save it as CSV with the columns 'audio' and 'text'"
        return f"a {packed or 'tar'} archive: unpack it, and name the folder"
    if head.startswith("version https://git-lfs"):
        return "a Git LFS pointer in place of the file: run `git lfs pull`"
    if head.startswith(("\udcff\udcfe", "\udcfe\udcff")):
        return "UTF-16 text: save it as UTF-8"
    if is_clip(place.path.name):
        return "a clip, not data: name a file that lists clips and texts, or the folder"
    first, *others = first_lines(place, 2)
    if len(first) > 1 and any(map(is_clip, first)):
        return "the clip comes first in a line of a list without header, then the text, with | between them"
    if len(first) > 1:
        what = advice(dict(zip(first, others[0] if others else first, strict=False)))
        return printable(f"neither JSON nor a table with known columns: {what}")
    return f"neither JSON nor JSONL nor a table (begins with {head[:20]!r})"

"""A file that is written is there in full or as it was before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from speechtune.storage.files import write_atomically


def test_content_and_folder_are_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_atomically(path, b"one")
    write_atomically(path, (part for part in (b"tw", b"o")))
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["file.txt"]


def test_a_failed_write_leaves_the_older_file(tmp_path: Path) -> None:
    """Guards against a file cut short by a full disk in the middle of a rewrite."""

    def parts() -> Iterator[bytes]:
        yield b"half"
        raise OSError("no space left on device")

    path = tmp_path / "file.txt"
    path.write_bytes(b"older")
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, parts())
    assert path.read_bytes() == b"older" and os.listdir(tmp_path) == ["file.txt"]


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    """Guards against `tempfile`'s files of mode 0600, which colleagues cannot read."""
    (tmp_path / "plain").touch()
    write_atomically(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode

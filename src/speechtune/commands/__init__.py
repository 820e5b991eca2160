"""The verbs of the command line, one file each; only these modules print."""

import json
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

UNBROKEN = 10_000  # columns: no table of ours is wider, and rich pads nothing up to it


def wide_console() -> "Console":
    """Where tables are printed: as wide as the terminal, and unbroken in a pipe or file."""
    from rich.console import Console  # the parser needs none of it, and `--help` is to come at once

    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else UNBROKEN)


def print_json(values: object, indent: int | None = None) -> None:
    """Print what a verb found as JSON; half of a surrogate pair in a text is no UTF-8, but escaped it is still JSON."""
    text = json.dumps(values, ensure_ascii=False, indent=indent, default=str)
    print(text.encode(errors="backslashreplace").decode())


def print_result(values: object, lines: Iterable[str], as_json: bool, status: int = 0) -> int:
    """Print what a verb found, as JSON or as lines for people; return `status`, the exit code."""
    if as_json:
        print_json(values)
    else:
        print("".join(f"{line}\n" for line in lines), end="")
    return status


def require_words(flag: str, text: str | None) -> None:
    """Refuse a flag whose text, where it is given, has no letter or digit."""
    from speechtune.errors import ConfigError

    if text is not None and not any(character.isalnum() for character in text):
        raise ConfigError(f"{flag} {text!r}: there is nothing to say in it")


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket for a server, which does not listen yet.

    Raises ConfigError: the address cannot be had.
    """
    from speechtune.errors import ConfigError

    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigError(f"--port {port}: cannot be had on {host} ({error.strerror}): name another") from None
    return bound


def check_output(out: Path, *, folder: bool, flag: str = "--out") -> None:
    """Refuse the `flag` of an output that cannot be written before work begins.

    Raises ConfigError: a file stands where a folder is written, or a folder where a file is; CheckpointError: no
    permission, no space, a file system that is read-only.
    """
    from speechtune.errors import ConfigError
    from speechtune.storage.verified_folder import check_writable  # it imports torch

    if out.exists() and out.is_dir() != folder:
        wanted, there = ("folder", "file") if folder else ("file", "folder")
        raise ConfigError(f"{flag} {out}: a {wanted} is written, and a {there} of that name exists; name another")
    place = out if folder else out.parent
    while not place.exists() and place != place.parent:
        place = place.parent  # nothing is made yet: work that is refused later leaves no empty folder
    check_writable(place, 0)

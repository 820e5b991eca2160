"""The verbs of the command line; only these modules print."""

import json
from collections.abc import Iterable

from speechtune.errors import ConfigError


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
    if text is not None and not any(character.isalnum() for character in text):
        raise ConfigError(f"{flag} {text!r}: there is nothing to say in it")

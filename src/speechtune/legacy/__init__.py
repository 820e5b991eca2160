"""The original pipelines' command lines, translated into recipes: what their flags have in common."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from speechtune.errors import SpeechtuneError


class Flag(NamedTuple):
    """One flag: its name, the option it sets, and its default; a bool default makes it a switch."""

    name: str
    option: str
    default: str | float | bool | None
    help: str

    @property
    def key(self) -> str:
        """Name in parsed options."""
        return self.name.removeprefix("--").replace("-", "_")


@contextmanager
def flags_in_messages(flags: Iterable[Flag]) -> Iterator[None]:
    """Let our errors name these flags where they name their options, which this command line does not take."""
    try:
        yield
    except SpeechtuneError as error:
        message = str(error)
        for flag in flags:
            message = re.sub(rf"(?<![\w.]){re.escape(flag.option)}(?![\w.]*\w)", flag.name, message)
        error.args = (message,)
        raise

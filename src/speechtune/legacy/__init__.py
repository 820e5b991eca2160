"""The original pipelines' command lines, translated into recipes: what their flags have in common."""

import argparse
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, NoReturn

from speechtune.config import RunConfig, option_names
from speechtune.errors import ConfigError, SpeechtuneError

log = logging.getLogger("speechtune")


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


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours, so that several ranks show them once."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}\n{self.format_usage().rstrip()}")


@contextmanager
def flags_in_messages(flags: Sequence[Flag]) -> Iterator[None]:
    """Let errors and log lines name these flags, and --set, where they name options of a recipe."""

    def reword(record: logging.LogRecord) -> bool:
        record.msg, record.args = in_flags(record.getMessage(), flags), ()
        return True

    log.addFilter(reword)
    try:
        yield
    except SpeechtuneError as error:
        error.args = (in_flags(str(error), flags),)
        raise
    finally:
        log.removeFilter(reword)


def in_flags(message: str, flags: Sequence[Flag]) -> str:
    """A message with what can be typed here, a flag or `--set`, in the place of options and of `option=value`."""

    def typed(match: re.Match[str], flag: Flag) -> str:
        value = match[1]
        if not isinstance(flag.default, bool):
            return f"{flag.name} {value}" if value else flag.name
        return flag.name if value in (None, "true", flag.name.removeprefix("--")) else match[0]

    for flag in flags:
        option = rf"(?<![\w./-]){re.escape(flag.option)}(?:=(\S*\w))?(?![\w.]*\w)"
        message = re.sub(option, lambda match, flag=flag: typed(match, flag), message)
    others = "|".join(re.escape(name) for name in option_names(RunConfig) if "." in name)
    return re.sub(rf"(?<!--set )(?<![\w./-])({others})(?![\w.]*\w)", r"--set \1", message)

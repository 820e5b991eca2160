"""What the tabs share: errors as messages on the page, and choices that follow the folder."""

import inspect
from collections.abc import Callable, Iterator
from functools import wraps
from html import escape
from typing import Any

import gradio as gr

from speechtune.commands.guarded import EXTRAS
from speechtune.errors import SpeechtuneError


def message_of(error: Exception) -> gr.Error:
    """An error that users can meet, as a message that stays until it is closed."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError):
        text = f"{error.name} is missing: pip install 'speechtune[{EXTRAS[str(error.name)]}]'"
    return gr.Error(escape(text).replace("\n", "<br>"), duration=None, print_exception=False)


def reported(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose errors for users appear on the page; faults of ours go to the console, as everywhere."""
    caught = (SpeechtuneError, OSError)

    def known(error: ModuleNotFoundError) -> bool:
        return error.name in EXTRAS

    if inspect.isgeneratorfunction(function):

        @wraps(function)
        def generate(*arguments: Any) -> Iterator[Any]:
            try:
                yield from function(*arguments)
            except caught as error:
                raise message_of(error) from None
            except ModuleNotFoundError as error:
                if not known(error):
                    raise
                raise message_of(error) from None

        return generate

    @wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except caught as error:
            raise message_of(error) from None
        except ModuleNotFoundError as error:
            if not known(error):
                raise
            raise message_of(error) from None

    return call


def player(label: str, path: str | None = None, **options: Any) -> gr.Audio:
    """A player without the button that uploads what it plays to a service."""
    return gr.Audio(path, label=label, interactive=False, buttons=["download"], **options)


def choices(names: list[str], chosen: str | None = None) -> dict[str, Any]:
    """An update of a list to choose from: the newest is chosen where the chosen one is gone."""
    return gr.update(choices=names, value=chosen if chosen in names else next(iter(names), None))

"""What the tabs share: errors as messages on the page, and choices that follow the folder."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from html import escape
from typing import Any

import gradio as gr

from speechtune.commands.guarded import EXTRAS
from speechtune.errors import SpeechtuneError

MODEL = "model"
"""Handlers that load a model wait for one another: two at once may not fit the memory."""


@contextmanager
def messages() -> Iterator[None]:
    """Errors that users can meet become messages that stay until they are closed; faults of ours go to the console."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        raise message(f"{error.name} is missing: pip install 'speechtune[{EXTRAS[error.name]}]'") from None
    except (SpeechtuneError, OSError) as error:
        raise message(str(error)) from None


def message(text: str) -> gr.Error:
    """A message on the page, to be raised."""
    return gr.Error(escape(text).replace("\n", "<br>"), duration=None, print_exception=False)


def reported(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose errors appear on the page, see `messages`."""
    if inspect.isgeneratorfunction(function):

        @wraps(function)
        def generate(*arguments: Any) -> Iterator[Any]:
            with messages():
                yield from function(*arguments)

        return generate

    @wraps(function)
    def call(*arguments: Any) -> Any:
        with messages():
            return function(*arguments)

    return call


def player(label: str, path: str | None = None, **options: Any) -> gr.Audio:
    """A player without the button that uploads what it plays to a service."""
    return gr.Audio(path, label=label, interactive=False, buttons=["download"], **options)


def recorder(label: str, source: str, **options: Any) -> gr.Audio:
    """A field for a recording: from `source`, "microphone" or "upload", first, and without that button too."""
    sources: Any = sorted(("microphone", "upload"), key=lambda one: one != source)
    return gr.Audio(label=label, sources=sources, type="filepath", buttons=["download"], **options)


def frame(html: str) -> str:
    """A report inside the page. It has a script of its own, so it is kept apart, without access to this page."""
    return f'<iframe class="report" sandbox="allow-scripts" title="report" srcdoc="{escape(html)}"></iframe>'


def choices(names: list[str], chosen: str | None = None) -> dict[str, Any]:
    """An update of a list to choose from: the newest is chosen where the chosen one is gone."""
    return gr.update(choices=names, value=chosen if chosen in names else next(iter(names), None))

"""The verb `serve`: a model behind an HTTP interface."""

import ctypes
import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from speechtune.commands import bound_socket, check_output
from speechtune.commands.generate import speaking_base
from speechtune.errors import ConfigError
from speechtune.inference.adapter_set import AdapterSet
from speechtune.inference.load import open_adapter
from speechtune.storage.lock import locked
from speechtune.tasks.pronunciation.alignment import pronunciation_dictionary

log = logging.getLogger("speechtune")

API_KEY = "SPEECHTUNE_API_KEY"
PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
MAX_HEADER_BYTES = 16 * 1024
M_ARENA_MAX, ARENAS = -8, 2  # of glibc's malloc.h


def keep_few_arenas() -> None:
    """Have glibc's malloc share two arenas: by default each thread has its own, which keeps what it once needed.

    Another C library is left as it is.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_ARENA_MAX, ARENAS)


def run_serve(
    *,
    model: str | None,
    model_options: Mapping[str, str],
    adapter: Sequence[str],
    adapter_root: Path | None,
    directory: Path,
    host: str,
    port: int,
    batch_size: int,
    max_new_tokens: int | None,
    max_characters: int,
    max_requests: int,
    deadline: float,
) -> int:
    """Serve until a signal; what runs then is finished first; 0."""
    for package in PACKAGES:
        importlib.import_module(package)
    import uvicorn

    from speechtune.serving.app import create_app
    from speechtune.serving.guard import LOOPBACK
    from speechtune.serving.service import Limits, Service

    api_key = os.environ.get(API_KEY) or None
    if api_key is None and host not in LOOPBACK:
        raise ConfigError(f"--host {host}: others can reach it, so it needs a key: set {API_KEY} in the environment")
    folders = named_folders(adapter)
    if adapter_root is not None and not adapter_root.is_dir():
        raise ConfigError(f"--adapter-root {adapter_root}: no such folder")
    check_output(directory, folder=True, flag="--dir")
    keep_few_arenas()
    socket = bound_socket(host, port)
    first = open_adapter(next(iter(folders.values()))) if folders and model is None else None
    if model is None and first is None:
        model, model_options = speaking_base(model_options)
    with locked(directory):
        models = AdapterSet(model, model_options, first)
        if "assess pronunciation" in models.family.abilities:
            pronunciation_dictionary()  # a missing package is reported before the first request
        limits = Limits(batch_size, max_new_tokens, max_characters, max_requests, deadline_seconds=deadline)
        app = create_app(lambda: Service(models, directory, limits, folders, adapter_root), api_key)
        config = uvicorn.Config(
            app,
            http="h11",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            limit_concurrency=2 * max_requests,
        )
        address = f"[{host}]" if ":" in host else host
        log.info("serving %s on http://%s:%d", models.config.model.path, address, socket.getsockname()[1])
        uvicorn.Server(config).run(sockets=[socket])
    return 0


def named_folders(words: Sequence[str]) -> dict[str, Path]:
    """Folders by name, of NAME=FOLDER.

    Raises ConfigError: no name, one that cannot be one, or one that is given twice.
    """
    import re

    from speechtune.serving.service import BASE
    from speechtune.serving.voices import NAME

    folders: dict[str, Path] = {}
    for word in words:
        name, _, folder = word.partition("=")
        if not folder or not re.match(NAME, name) or name in (BASE, *folders):
            raise ConfigError(f"--adapter {word}: name each once as NAME=FOLDER, letters, digits, _ and - in the name")
        folders[name] = Path(folder)
    return folders

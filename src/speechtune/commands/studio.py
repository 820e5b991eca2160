"""The verb `studio`: a page in a browser, served on this machine alone."""

from collections.abc import Sequence
from pathlib import Path

from speechtune.commands import bound_socket, check_output
from speechtune.errors import ConfigError


def run_studio(directory: Path, allow: Sequence[Path], port: int) -> int:
    """Serve the studio of a folder until it is ended; 0.

    Raises ConfigError: a folder that may be read is none, the studio's own cannot be written, or the port is taken.
    """
    for folder in allow:
        if not folder.is_dir():
            raise ConfigError(f"--allow {folder}: no such folder")
    check_output(directory, folder=True, flag="--dir")
    from speechtune.studio.app import LOOPBACK, serve
    from speechtune.studio.workspace import Workspace

    bound_socket(LOOPBACK, port).close()
    directory.mkdir(parents=True, exist_ok=True)
    print(f"speechtune studio: http://{LOOPBACK}:{port} (files in {directory.resolve()}; Ctrl-C ends it, runs go on)")
    serve(Workspace(directory.resolve(), tuple(folder.resolve() for folder in allow)), port)
    return 0

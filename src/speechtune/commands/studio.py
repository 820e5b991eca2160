"""The verb `studio`: a page in a browser, served on this machine alone."""

from collections.abc import Sequence
from pathlib import Path

from speechtune.errors import ConfigError


def run_studio(directory: Path, allow: Sequence[Path], port: int) -> int:
    """Serve the studio of a folder until it is ended; 0.

    Raises ConfigError: a folder that may be read is none.
    """
    for folder in allow:
        if not folder.is_dir():
            raise ConfigError(f"--allow {folder}: no such folder")
    from speechtune.studio.app import serve
    from speechtune.studio.workspace import Workspace

    directory.mkdir(parents=True, exist_ok=True)
    print(f"speechtune studio: http://127.0.0.1:{port} (files in {directory.resolve()}; Ctrl-C ends it, runs go on)")
    serve(Workspace(directory.resolve(), tuple(folder.resolve() for folder in allow)), port)
    return 0

"""Commands that a studio starts: runs, which outlive it, and short ones, whose answer it waits for."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from speechtune.config import RunConfig
from speechtune.errors import ConfigError, SpeechtuneError
from speechtune.storage.files import write_atomically
from speechtune.storage.lock import lock_holder

PROCESS_NAME = "process.json"
RECIPE_NAME, CONFIG_NAME = "recipe.yaml", "config.yaml"
LOG_NAME = "train.log"
LOG_SHOWN_BYTES = 16_384
COMMAND = (sys.executable, "-m", "speechtune")


def start_run(config: RunConfig, directory: Path, *, resume: bool = False) -> int:
    """Start `speechtune train` as a process of its own, in the studio's `directory`; returns its id.

    Its recipe, console output and process id lie in the run's folder.

    Raises ConfigError: a process already works on that run.
    """
    run = config.output_dir
    if (process := find_process(run)) is not None:
        raise ConfigError(f"{run.name}: process {process.pid} works on this run already")
    run.mkdir(parents=True, exist_ok=True)
    recipe = str(recipe_of(run)) if resume else write_recipe(config, run / RECIPE_NAME)
    command = [*COMMAND, "train", recipe, *(["checkpoint.resume=auto"] if resume else [])]
    with (run / LOG_NAME).open("ab") as log:
        # A session of its own: neither Ctrl-C in the studio's terminal nor the end of the studio reaches it.
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=os.environ | {"TQDM_DISABLE": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    mark = {"pid": process.pid, "created": psutil.Process(process.pid).create_time()}
    write_atomically(run / PROCESS_NAME, json.dumps(mark).encode())
    return process.pid


def write_recipe(config: RunConfig, path: Path) -> str:
    """Write a configuration as a recipe; returns its path."""
    write_atomically(path, config.to_yaml().encode())
    return str(path)


def recipe_of(run: Path) -> Path:
    """The recipe that a run was started with; of one that no studio started, what its recipe resolved to."""
    recipe = run / RECIPE_NAME
    return recipe if recipe.is_file() else run / CONFIG_NAME


def find_process(run: Path) -> psutil.Process | None:
    """The process that works on a run: the one that a studio started, or that holds the lock of the run's folder.

    Until a run has read its recipe and the libraries, it holds no lock; later, also one of a command line is found.
    """
    mark: Mapping[str, Any] = {}
    try:
        mark = json.loads((run / PROCESS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass
    for pid in (lock_holder(run), mark.get("pid")):
        try:
            process = psutil.Process(pid) if pid else None
            if process is None or process.status() == psutil.STATUS_ZOMBIE:
                continue
            # a process id is given again to another process after a while; the two together are unique
            if pid != mark.get("pid") or abs(process.create_time() - mark["created"]) < 1:
                return process
        except psutil.Error:
            continue
    return None


def stop_run(run: Path) -> int:
    """Ask a run to finish its step, save and end; returns the id of its process.

    Raises ConfigError: no process works on it.
    """
    process = find_process(run)
    if process is None:
        raise ConfigError(f"{run.name}: no process works on this run")
    process.send_signal(signal.SIGTERM)
    return process.pid


def end_of_log(run: Path) -> str:
    """The last lines that a run printed."""
    try:
        with (run / LOG_NAME).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LOG_SHOWN_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def run_verb(directory: Path, *arguments: str) -> Any:
    """The JSON that a verb of the command line prints, in a process of its own: what it takes is given back at its end.

    Raises SpeechtuneError: with what the verb said.
    """
    result = subprocess.run([*COMMAND, *arguments, "--json"], cwd=directory, capture_output=True, check=False)
    try:
        return json.loads(result.stdout)
    except ValueError:
        said = result.stderr.decode(errors="replace").strip()
        said = said.rpartition("speechtune: ")[2] or f"no answer, exit code {result.returncode}"
        raise SpeechtuneError(f"speechtune {arguments[0]}: {said}") from None

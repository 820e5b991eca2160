"""The folder that a studio writes into, and the folders beside it that it may read."""

import os
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from speechtune.audio import file_name
from speechtune.config import RunConfig
from speechtune.errors import ConfigError, printable
from speechtune.report.read_run import RunReport, read_run

ASSETS = Path(__file__).parents[1] / "assets"
"""What ships with speechtune, which every studio may read."""


@dataclass(frozen=True)
class Workspace:
    """One studio: everything it writes lies in `directory`; `allowed` are folders of data that it only reads."""

    directory: Path
    allowed: tuple[Path, ...] = ()

    @property
    def roots(self) -> tuple[Path, ...]:
        """The folders that may be read."""
        return (self.directory.resolve(), *(folder.resolve() for folder in self.allowed), ASSETS)

    def readable(self, path: str | Path) -> Path:
        """A path that was typed or chosen, resolved; relative ones start in the studio's folder.

        Raises ConfigError: it leads, links followed, out of the folders that may be read.
        """
        try:
            place = (self.directory / path).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{printable(str(path))!r} is no path: {error}") from None
        if any(place.is_relative_to(root) for root in self.roots):
            return place
        raise ConfigError(
            f"{printable(str(path))}: lies outside the studio's folder ({self.directory}); to use data that lie "
            "elsewhere, start the studio with --allow FOLDER"
        )

    def place(self, kind: str, name: str | None) -> Path:
        """The folder of that name among those of a kind: "data", "runs", "exports" and so on.

        Raises ConfigError: no name, or one that is more than a name.
        """
        if not name:
            raise ConfigError(f"{kind}: choose or type a name first")
        if file_name(name) != name:
            raise ConfigError(f"{printable(name)!r}: a name is made of letters, digits, '-', '_' and '.'")
        return self.directory / kind / name

    def names(self, kind: str, *files: str) -> list[str]:
        """Names of the folders of a kind that hold one of the files, the newest first."""
        folders = [path for path in (self.directory / kind).glob("*") if path.is_dir()]
        found = [path for path in folders if not files or any((path / file).is_file() for file in files)]
        return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]

    def run(self, name: str | None) -> Path:
        """The folder of a run. Raises ConfigError: there is none of that name."""
        run = self.place("runs", name)
        if not run.is_dir():
            raise ConfigError(f"{name}: no such run in {run.parent}")
        return run

    def report(self, name: str | None, *, verify: bool = True) -> RunReport:
        """What is known of a run; see `read_run`."""
        return read_run(self.run(name), name, verify=verify)

    def check_paths(self, config: RunConfig) -> None:
        """Refuse a configuration that names anything outside. Raises ConfigError: names each option."""
        issues = []
        for name, value in path_options(config):
            try:
                self.readable(value)
            except ConfigError as error:
                issues.append(f"{name}: {error}")
        if issues:
            raise ConfigError("\n  ".join([f"{len(issues)} issue(s) in the configuration", *issues]), tuple(issues))


def path_options(config: RunConfig) -> list[tuple[str, Path]]:
    """Dotted names and values of all options that name files.

    Of the models, scorers and checkpoints that are given as texts, those count that are written as a path or are one:
    others are ids on the hub, or words such as `auto`.
    """
    found: list[tuple[str, Path]] = []
    for section_name, section in config:
        for name, value in section if isinstance(section, BaseModel) else [("", section)]:
            dotted = f"{section_name}.{name}".rstrip(".")
            for item in value if isinstance(value, tuple) else (value,):
                if isinstance(item, Path):
                    found.append((dotted, item))
                elif isinstance(item, str) and section_name in ("model", "evaluate", "checkpoint"):
                    found += [(dotted, path) for path in paths_in(item)]
    return found


def paths_in(text: str) -> list[Path]:
    """The path that a text such as `model` or `faster-whisper:model` names, where it names one."""
    return [Path(part) for part in {text, text.partition(":")[2]} if _is_path(part)]


def _is_path(text: str) -> bool:
    return bool(text) and (os.path.exists(text) or os.path.isabs(text) or text[0] in "~." or ".." in Path(text).parts)

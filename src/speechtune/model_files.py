"""Files of a model folder: complete and uncorrupted, before anything tries to load them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file, extract_commit_hash

from speechtune.checkpoint import Problem
from speechtune.errors import ConfigError

HEAD_BYTES = 256
LFS_HEAD = b"version https://git-lfs"
INDEX_SUFFIX = ".index.json"


def inspect_folder(directory: Path) -> list[Problem]:
    """Everything wrong with the JSON and safetensors files of a folder; an empty list means all of them open.

    Found are LFS pointers and HTML pages saved under a file's name, JSON that does not parse, safetensors whose header
    does not fit the file's size, and shards that an index names and nobody has.
    """
    problems = []
    for path in sorted(directory.glob("*")):
        if path.suffix in {".json", ".safetensors"} and path.is_file():
            reason = _reason(path)
            if reason:
                problems.append(Problem(path.name, reason))
            elif path.name.endswith(INDEX_SUFFIX):
                problems += _missing_shards(path)
    return problems


def require_sound(place: str, option: str) -> None:
    """Refuse a local model folder that is not there, or whose files are corrupt; a hub id passes.

    Raises:
        ConfigError: names every file and its fault.
    """
    directory = Path(place)
    if not directory.is_dir() and place.startswith(("/", ".", "~")):
        raise ConfigError(f"{option}={place}: no such folder")
    problems = inspect_folder(directory) if directory.is_dir() else []
    if problems:
        listed = "; ".join(map(str, problems))
        raise ConfigError(f"{option}={place}: {listed}; download these files again")


def copy_files(place: str, revision: str | None, patterns: Sequence[str], directory: Path) -> None:
    """Copy the files of a model folder or hub id that match one of the patterns."""
    source = Path(place)
    if not source.is_dir():
        source = Path(snapshot_download(place, revision=revision, allow_patterns=list(patterns)))
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, directory / file.name)


def hub_commit(repository: str, revision: str | None) -> str:
    """Commit that a hub id stands at: a branch may move under the same name.

    Raises:
        ConfigError: the hub does not answer, and nothing is cached.
    """
    try:
        file = cached_file(repository, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{repository}: not found on the hub or in its cache: {error}") from None
    return extract_commit_hash(file, None) or "unknown"


def _reason(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not head:
        return "0 bytes"
    if head.startswith(LFS_HEAD):
        return "a git-lfs pointer, not the file itself (git lfs pull fetches it)"
    if head.lstrip()[:1] == b"<":
        return "a web page saved under this name"
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return f"not valid JSON: {error}"
        return None
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        return f"truncated or corrupt safetensors: {error}"
    return None


def _missing_shards(index: Path) -> list[Problem]:
    shards = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
    return [
        Problem(shard, f"missing, {index.name} names it")
        for shard in sorted(shards)
        if not (index.parent / shard).is_file()
    ]

"""Files of a model folder: complete and uncorrupted, before anything tries to load them."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file, extract_commit_hash

from speechtune.config import ModelConfig
from speechtune.errors import ConfigError, Issue

HEAD_BYTES = 256
INDEX_SUFFIX = ".index.json"
OBJECTS = ("config.json", "tokenizer.json", INDEX_SUFFIX)  # ends of names; any other file may hold any JSON


def inspect_folder(directory: Path) -> list[Issue]:
    """Look at the JSON and safetensors files of a folder; an empty list means all of them open.

    Reported are LFS pointers and HTML pages saved under a file's name, JSON that does not parse, safetensors whose
    header does not fit the file's size, and shards that an index names and that are not there.
    """
    issues = []
    for path in sorted(directory.glob("*")):
        if path.suffix in {".json", ".safetensors"} and path.is_file():
            reason = _reason(path)
            if reason:
                issues.append(Issue(path.name, "", "damaged_file", reason))
            elif path.name.endswith(INDEX_SUFFIX):
                issues += _missing_shards(path)
    return issues


def is_missing_folder(place: str) -> bool:
    """Whether a text can only mean a local folder, which is not there: hub ids have one slash, and no dot in front."""
    return (place.startswith(("/", ".", "~")) or place.count("/") > 1 or "\\" in place) and not Path(place).is_dir()


def require_sound(place: str, option: str) -> None:
    """Refuse a local model folder that is missing or has corrupt files (ConfigError names each); a hub id passes."""
    directory = Path(place)
    if is_missing_folder(place):
        raise ConfigError(f"{option}={place}: no such folder")
    issues = inspect_folder(directory) if directory.is_dir() else []
    if issues:
        listed = "; ".join(map(str, issues))
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


def load_pretrained(
    model_class: Any, settings: ModelConfig, revision: str | None, dtype: torch.dtype, **options: Any
) -> tuple[nn.Module, Mapping[str, Any]]:
    """Load a native model, or raise ConfigError; also returns what weights are missing, unexpected and mismatched."""
    try:
        return model_class.from_pretrained(
            settings.path,
            revision=revision,
            dtype=dtype,
            attn_implementation=settings.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed, for `require_fit`
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"model.path={settings.path}: the base model does not load: {error}") from None


def require_fit(place: str, missing: Iterable[str], mismatched: Iterable[Any]) -> None:
    """Refuse weights that do not fit the model: ConfigError names the first of them."""
    lost, other = sorted(missing), list(mismatched)
    if lost or other:
        raise ConfigError(
            f"model.path={place}: the weights do not fit the model: missing {lost[:5]}, mismatched {other[:5]}"
        )


def load_tokenizer(settings: ModelConfig, revision: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base; ConfigError where there is none, or it does not load."""
    require_sound(settings.path, "model.path")
    folder = Path(settings.path)
    if folder.is_dir() and not (folder / "tokenizer.json").is_file():
        # transformers would ask for sentencepiece, which does not help
        raise ConfigError(f"model.path={folder}: tokenizer.json is missing; copy the base's tokenizer files there")
    try:
        # Without the argument, transformers asks at the terminal whether to run code that the folder holds.
        return AutoTokenizer.from_pretrained(settings.path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"model.path={settings.path}: no usable tokenizer there: {error}") from None


def hub_commit(repository: str, revision: str | None) -> str:
    """Commit that a hub id stands at (a branch may move); ConfigError where neither hub nor cache has an answer."""
    try:
        file = cached_file(repository, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{repository}: not found on the hub or in its cache: {error}") from None
    return extract_commit_hash(file, None) or "unknown"


def not_downloaded(path: Path) -> str | None:
    """What lies in a file's place after a download that failed; None for anything else."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES).lstrip()
    if not head:
        return "empty (0 bytes)"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: fetch it with `git lfs pull`"
    return "a web page, not the file itself: the download failed; fetch it again" if head.startswith(b"<") else None


def _reason(path: Path) -> str | None:
    if reason := not_downloaded(path):
        return reason
    if path.suffix == ".json":
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            return f"not valid JSON: {error}"
        return _issue_of_object(path.name, value) if path.name.endswith(OBJECTS) else None
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except SafetensorError as error:
        return f"truncated or corrupt safetensors: {error}"
    return None


def _issue_of_object(name: str, value: object) -> str | None:
    if not isinstance(value, dict):
        return f"holds no JSON object but {type(value).__name__}"
    if name == "tokenizer.json" and not isinstance(value.get("model"), dict):
        return "not a tokenizer: it has no entry 'model'"
    if name.endswith(INDEX_SUFFIX):
        shards = value.get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            return "not an index of weights: its entry 'weight_map' does not give each tensor a file"
    return None


def _missing_shards(index: Path) -> list[Issue]:
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [
        Issue(shard, "", "missing_file", f"missing, {index.name} names it")
        for shard in sorted(shards)
        if not (index.parent / shard).is_file()
    ]

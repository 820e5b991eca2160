"""Helpers of the scorers: optional packages, where weights lie and what identifies them, audio as networks take it."""

import importlib
import importlib.util
import pickle
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from safetensors import SafetensorError

from speechtune.audio import resample
from speechtune.errors import ConfigError
from speechtune.storage.files import file_sha256, folder_fingerprint
from speechtune.types import Audio

RATE = 16_000
"""Sampling rate in Hz that every scorer here was trained on."""
INT16_MAX = 2**15 - 1
HASH_DIGITS = 12
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, pickle.UnpicklingError)
"""Raised by loading absent, unfit, truncated or tampered weights."""


def need(module: str, wanted_by: str, install: str) -> ModuleType:
    """Import a module of an optional package.

    Raises ConfigError: it, or something it imports, is missing; names the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{wanted_by}: the package {error.name} is missing: {install}") from None


def package_file(package: str, name: str, wanted_by: str, install: str) -> Path:
    """A file inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder, name)).is_file():
            return path
    raise ConfigError(f"{wanted_by}: the package {package} (its file {name}) is missing: {install}")


def place_of(spec: str) -> tuple[str, str | None]:
    """Folder, or hub id and revision ("name@revision"), of a spec such as "whisper:openai/whisper-large-v3"."""
    kind, _, argument = spec.partition(":")
    if not argument:
        raise ConfigError(f"{spec}: name its weights: {kind}:FOLDER or {kind}:HUB_ID")
    folder = Path(argument).expanduser()
    if folder.is_dir():
        return str(folder), None
    if argument.startswith(("/", ".", "~")):
        raise ConfigError(f"{spec}: no such folder: {folder}")
    place, _, revision = argument.partition("@")
    return place, revision or None


def load_pretrained(
    processor_type: Any, model_type: Any, spec: str, device: str, *, kind: str, label: str
) -> tuple[Any, Any, str]:
    """What two classes of transformers load from the place of a spec: processor, model, and the model's `identity`.

    `kind` is what the place should hold, for errors; in `label` the place stands for the braces.
    """
    place, revision = place_of(spec)
    options = {"revision": revision} if revision else {}
    try:
        processor = processor_type.from_pretrained(place, **options)
        model = model_type.from_pretrained(place, weights_only=True, **options)
    except LOAD_ERRORS as error:
        raise ConfigError(f"{spec}: does not load as {kind}: {error}") from None
    folder = Path(place) if Path(place).is_dir() else None
    name = identity("transformers", folder, label.format(place), getattr(model.config, "_commit_hash", None))
    return processor, model.eval().to(device), name


def identity(package: str, weights: Path | None, place: str = "", commit: str | None = None) -> str:
    """One line that identifies a scorer: package, version, place, and a hash of the weights or the hub's commit."""
    line = f"{package} {version(package)}"
    if place:
        line += f", {place}"
    if commit:
        return f"{line} at {commit[:HASH_DIGITS]}"
    if weights is None:
        return line
    digest = folder_fingerprint(weights) if weights.is_dir() else file_sha256(weights)
    return f"{line} (sha256 {digest[:HASH_DIGITS]})"


def waveform(audio: Audio) -> np.ndarray:
    """Samples float32 of shape (num_samples,) at `RATE`, clipped at full scale as a written wav is; at least one."""
    samples = resample(audio, RATE).samples.clip(-1.0, 1.0)
    return samples if len(samples) else np.zeros(1, np.float32)


def pcm16(samples: np.ndarray) -> bytes:
    """Samples as 16-bit PCM in the machine's byte order."""
    return np.round(samples * INT16_MAX).astype(np.int16).tobytes()

"""Find LoRA adapters on disk by what is in the files, whatever their folders are called."""

import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from speechtune.errors import AdapterError
from speechtune.lora.files import BIN_NAME, CONFIG_NAME, WEIGHTS_NAME, in_checkpoint
from speechtune.storage.verified_folder import ASIDE

MAX_HEADER_BYTES = 100 << 20


def find_adapters(root: Path) -> tuple[list[Path], list[Path]]:
    """Folders of adapters under `root`, and of full checkpoints with LoRA weights inside.

    Links are followed, but no folder is visited twice.

    Raises AdapterError: `root` is no folder.
    """
    root = in_checkpoint(root)
    if not root.is_dir():
        raise AdapterError(f"{root}: no such folder")
    adapters, checkpoints = [], []
    for folder, names in _folders(root):
        if CONFIG_NAME in names or WEIGHTS_NAME in names or BIN_NAME in names:
            adapters.append(folder)
        elif any(holds_lora(folder / name) for name in names):
            checkpoints.append(folder)
    return adapters, checkpoints


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if name != ".git" and not name.startswith(ASIDE))
        yield Path(folder), sorted(names)


def holds_lora(file: Path) -> bool:
    """Whether a weights file names LoRA tensors, from its header or its pickle's bytes; nothing is unpickled."""
    try:
        if file.suffix == ".safetensors":
            with file.open("rb") as stream:
                size = int.from_bytes(stream.read(8), "little")
                return b"lora_A" in stream.read(min(size, MAX_HEADER_BYTES))
        if file.suffix in {".bin", ".pt", ".pth"} and zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                pickles = [name for name in archive.namelist() if re.search(r"(^|/)data\.pkl$", name)]
                return any(b"lora_A" in archive.read(name) for name in pickles)
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError):
        return False
    return False

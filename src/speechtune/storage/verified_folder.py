"""Folders that appear only when complete: written aside, synced, read back, compared, listed in a manifest, renamed."""

import errno
import json
import logging
import mmap
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from safetensors import SafetensorError
from safetensors.torch import load_file

from speechtune.errors import CheckpointError, Issue
from speechtune.storage.files import file_blake3, map_file, write_atomically

saves = logging.getLogger("speechtune.saving")  # a level of its own: `tracking.log_saves` switches it off

MANIFEST_NAME = "MANIFEST.json"
STATE_NAME = "trainer_state.json"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
ASIDE = ".writing-"
SPACE_MARGIN_BYTES = 16 << 20
PIECE_BYTES = 1 << 20


def write_verified(
    directory: Path, write: Callable[[Path], None], tensors: Mapping[str, torch.Tensor], *, replace: bool = False
) -> Path:
    """Publish a folder only once all of it is on disk and reads back equal to what is in memory.

    `write` fills the empty folder it is given, whose safetensors files must then hold `tensors`, bit for bit; with
    `replace` the new folder takes the place of an older one.
    Raises CheckpointError: with what went wrong, where, and what to do; an older folder is untouched then.
    """
    if directory.exists() and not replace:
        raise CheckpointError(f"{directory}: exists already; remove it or choose another output folder")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside = directory.parent / f"{ASIDE}{directory.name}-{uuid.uuid4().hex[:8]}"
        aside.mkdir()
    except OSError as error:
        raise _save_error(directory, error) from error
    try:
        mode = stat.S_IMODE(aside.stat().st_mode)  # what the umask leaves
        write(aside)
        for path in aside.rglob("*"):
            path.chmod(mode if path.is_dir() else mode & 0o666)  # safetensors makes files for the owner alone
        with ThreadPoolExecutor(1) as pool:  # reading back goes on while the disk writes
            entries = pool.submit(_read_back, aside, tensors)
            for file in _files(aside):
                _sync(file)
            write_atomically(aside / MANIFEST_NAME, json.dumps({"files": entries.result()}, indent=1).encode())
        _sync(aside)
        _publish(aside, directory)
    except OSError as error:
        raise _save_error(directory, error) from error
    except (SafetensorError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise CheckpointError(f"{directory}: writing the weights failed: {error}; check space on the disk") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory


def verify_folder(directory: Path, names: Collection[str] | None = None, *, sizes_only: bool = False) -> list[Issue]:
    """Compare a folder with its MANIFEST.json; an empty list means every byte is as it was written.

    `names` are the files to look at, which must all be listed (None: all that are); `sizes_only` hashes none.
    """
    try:
        listed = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
        entries = {str(entry["name"]): (entry["bytes"], entry["blake3"]) for entry in listed}
    except OSError:
        return [Issue(MANIFEST_NAME, "", "no_manifest", "missing: the folder was never finished")]
    except (ValueError, KeyError, TypeError):
        return [Issue(MANIFEST_NAME, "", "bad_manifest", "not readable as a manifest")]
    issues = []
    for name in entries if names is None else sorted(names):
        file = directory / name
        if name not in entries:
            issues.append(Issue(name, "", "unlisted_file", f"not in {MANIFEST_NAME}"))
            continue
        num_bytes, digest = entries[name]
        if not file.is_file():
            issues.append(Issue(name, "", "missing_file", "missing"))
        elif (size := file.stat().st_size) != num_bytes:
            issues.append(Issue(name, "", "changed_file", f"{size} bytes, {num_bytes} were written"))
        elif not sizes_only and file_blake3(file) != digest:
            issues.append(Issue(name, "", "changed_file", "changed since it was written (blake3 differs)"))
    return issues


def find_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders of a run as (step, path), oldest first; verified or not."""
    folders = []
    with suppress(FileNotFoundError):  # somebody removes the run's folder at this moment
        folders = [path for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    return sorted((int(match[1]), path) for path in folders if (match := CHECKPOINT.fullmatch(path.name)))


def newest_valid(output_dir: Path) -> tuple[Path | None, list[tuple[Path, Issue]]]:
    """The newest checkpoint that verifies, and the newer ones passed over, each with its first issue."""
    passed_over = []
    for _, path in reversed(find_checkpoints(output_dir)):
        issues = verify_folder(path)
        if not issues:
            return path, passed_over
        passed_over.append((path, issues[0]))
    return None, passed_over


def prune(output_dir: Path, keep_last: int, protected: Sequence[Path] = (), up_to: int | None = None) -> list[Path]:
    """Remove the oldest checkpoints beyond `keep_last`, never a protected one; returns those removed.

    Checkpoints of steps after `up_to` are damaged ones that a resume passed over: they are neither counted nor removed.
    """
    checkpoints = [path for step, path in find_checkpoints(output_dir) if up_to is None or step <= up_to]
    removed = [path for path in checkpoints[:-keep_last] if path not in protected]
    for path in removed:
        (path / MANIFEST_NAME).unlink(missing_ok=True)  # a half-removed folder is no checkpoint
        with suppress(FileNotFoundError):  # somebody else removes it at the same time
            shutil.rmtree(path)
    return removed


def clear_leftovers(output_dir: Path) -> None:
    """Remove what interrupted saves left; called before a run writes, when no other run may be writing here."""
    for path in output_dir.glob(f"{ASIDE}*"):
        shutil.rmtree(path, ignore_errors=True)


def check_writable(output_dir: Path, bytes_needed: int) -> int:
    """Prove by writing that a folder takes files, and that the disk has room; returns the bytes free.

    Raises CheckpointError: what is not so.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output_dir, prefix=".write-test-") as file:
            file.write(b"speechtune")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(output_dir).free
    except OSError as error:
        raise _save_error(output_dir, error) from error
    if free < bytes_needed + SPACE_MARGIN_BYTES:
        raise CheckpointError(
            f"{output_dir}: {free / 1e9:.2f} GB free, a save needs {bytes_needed / 1e9:.2f} GB; free space or write "
            "to another disk"
        )
    return free


def check_place(output_dir: Path, bytes_needed: int) -> None:
    """`check_writable` before a save, with log lines."""
    existed = output_dir.is_dir()
    free = check_writable(output_dir, bytes_needed)
    saves.info("Output directory %s: %s", "exists" if existed else "created", output_dir)
    saves.info("Write test passed: %d bytes needed, %.1f GB free", bytes_needed, free / 1e9)


def log_saved(directory: Path, tensors: Collection[str]) -> None:
    """Say what a verified save left, file by file."""
    try:
        for path in sorted(directory.iterdir()):
            saves.info("  %s  %d bytes", path.name, path.stat().st_size)
    except FileNotFoundError:
        saves.error("%s: deleted right after it was saved", directory)
    saves.info("Verified: %d tensors read back equal to those in memory, %s written", len(tensors), MANIFEST_NAME)


def share_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Lay files of one folder into another, in this order; weights as hard links where the disk knows them.

    Raises CheckpointError: the folder cannot be written, or the disk is full.
    """
    try:
        for name in names:
            (target / name).unlink(missing_ok=True)
        for name in names:
            try:
                if not name.endswith(".safetensors"):  # small files are changed by hand: each folder has its own
                    raise OSError
                os.link(source / name, target / name)
            except OSError:
                shutil.copyfile(source / name, target / name)
    except OSError as error:
        raise _save_error(target, error) from error


def read_state(directory: Path) -> dict[str, Any]:
    """The trainer state of a checkpoint; CheckpointError where it is not readable."""
    try:
        return json.loads((directory / STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}/{STATE_NAME}: not readable: {error}") from None


def _save_error(directory: Path, error: OSError) -> CheckpointError:
    in_the_way = "a file stands where a folder should be: remove it or write elsewhere"
    no_permission = "no permission: change the folder's owner or mode, or write elsewhere"
    cures = {
        errno.ENOSPC: "the disk is full: free space or write to another disk",
        errno.EDQUOT: "the quota is used up: free space or write to another disk",
        errno.EROFS: "the file system is read-only: write to one that is not",
        errno.EACCES: no_permission,
        errno.EPERM: no_permission,
        errno.ENOENT: "a folder above it cannot be made: name another",
        errno.ENOTDIR: in_the_way,
        errno.EEXIST: in_the_way,
    }
    cure = cures.get(error.errno or 0, "see the system's message")
    return CheckpointError(f"{directory}: saving failed: {type(error).__name__}: {error}; {cure}")


def _files(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.rglob("*")) if path.is_file()]


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_back(directory: Path, tensors: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Name, size and hash of every file; on the way the weights are compared with those in memory."""
    _check_kinds(directory, tensors)
    entries = []
    for path in _files(directory):
        compared = tensors if path.parent == directory and path.suffix == ".safetensors" else {}
        name, digest = str(path.relative_to(directory)), _read_file(path, compared)
        entries.append({"name": name, "bytes": path.stat().st_size, "blake3": digest})
    return entries


def _check_kinds(directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights with other names, dtypes or shapes than those in memory."""
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        if path.stat().st_size == 0:
            raise CheckpointError(f"{path.name}: empty after writing")
        stored.update(load_file(path))  # maps the file; no byte of a tensor is read yet
    missing, extra = sorted(set(tensors) - set(stored)), sorted(set(stored) - set(tensors))
    if missing or extra:
        raise CheckpointError(
            f"{directory.name}: read back {len(stored)} tensors of {len(tensors)}: missing {missing[:3]}, "
            f"left over {extra[:3]}; the object saved is not the model trained"
        )
    for name, tensor in tensors.items():
        if stored[name].dtype != tensor.dtype or stored[name].shape != tensor.shape:
            raise _different(directory, name)


def _read_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """BLAKE3 of a file; each piece of a tensor in it is compared while a core's cache still holds it."""
    content, digest, done = map_file(path), blake3(), 0
    for name, start, end in _tensor_places(content) if tensors else ():
        digest.update(memoryview(content)[done:start])
        live = tensors[name].detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy()
        for place in range(start, end, PIECE_BYTES):
            piece = np.frombuffer(content, np.uint8, min(PIECE_BYTES, end - place), place)
            digest.update(piece.data)
            if not _same_bytes(piece, live[place - start :][: len(piece)]):
                raise _different(path.parent, name)
        done = end
    digest.update(memoryview(content)[done:])
    return digest.hexdigest()


def _different(directory: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{directory.name}: {name} reads back different from the tensor in memory")


def _same_bytes(one: np.ndarray, other: np.ndarray) -> bool:
    if len(one) % 8 == len(other) % 8 == 0:  # eight bytes at a time: twice as fast
        one, other = one.view(np.uint64), other.view(np.uint64)
    return np.array_equal(one, other)


def _tensor_places(content: mmap.mmap | bytes) -> list[tuple[str, int, int]]:
    """Name, first byte and end of each tensor of a safetensors file, in the order in which they lie in it."""
    data_start = 8 + int.from_bytes(content[:8], "little")  # a length of 8 bytes, a JSON header, the data
    header = json.loads(content[8:data_start])
    offsets = sorted((*entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__")
    return [(name, data_start + start, data_start + end) for start, end, name in offsets]


def _publish(aside: Path, directory: Path) -> None:
    old = None
    if directory.exists():
        old = aside.with_name(f"{aside.name}-old")
        directory.rename(old)
    try:
        aside.rename(directory)
    except OSError:
        if old is not None:
            old.rename(directory)
        raise
    _sync(directory.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)

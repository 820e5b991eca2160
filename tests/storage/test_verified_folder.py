"""Verified folders: nothing incomplete is published, nothing damaged is trusted, and messages say what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from speechtune.errors import CheckpointError
from speechtune.storage import verified_folder as checkpoint
from speechtune.storage.verified_folder import (
    check_writable,
    clear_leftovers,
    find_checkpoints,
    log_saved,
    newest_valid,
    prune,
    read_state,
    verify_folder,
    write_verified,
)

Tensors = dict[str, torch.Tensor]
TENSORS: Tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def writer(tensors: Tensors = TENSORS, note: str = "hello") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        save_file(tensors, folder / "model.safetensors")
        (folder / "sub").mkdir()
        (folder / "sub" / "note.txt").write_text(note)

    return write


def publish(output_dir: Path, step: int) -> Path:
    return write_verified(output_dir / f"checkpoint-{step}", writer(note=f"step {step}"), TENSORS)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def mount() -> Iterator[Callable[..., None]]:
    """Mount something for the time of a test; skips where this process may not."""
    mounted: list[Path] = []

    def run(place: Path, *arguments: str) -> None:
        place.mkdir(exist_ok=True)
        done = subprocess.run(["mount", *arguments, str(place)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting is not possible here: {done.stderr.strip()}")
        if place not in mounted:
            mounted.append(place)

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    yield run
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)  # an exception may hold a file open


# -- writing -------------------------------------------------------------------------------------------------------


def test_a_published_folder_is_complete_and_verifies(tmp_path: Path) -> None:
    folder = publish(tmp_path / "new" / "output", 5)
    assert names(folder) == ["MANIFEST.json", "model.safetensors", "sub"]
    assert names(folder.parent) == ["checkpoint-5"]
    listed = json.loads((folder / "MANIFEST.json").read_text())["files"]
    assert [entry["name"] for entry in listed] == ["model.safetensors", "sub/note.txt"]
    assert verify_folder(folder) == []


WRONG = {
    "a value differs": ({**TENSORS, "a": TENSORS["a"] + 1e-6}, "a reads back different"),
    "a shape differs": ({**TENSORS, "a": TENSORS["a"].view(3, 2)}, "a reads back different"),
    "a dtype differs": ({**TENSORS, "b": TENSORS["b"].float()}, "b reads back different"),
    "one is missing": ({"a": TENSORS["a"]}, "missing ['b']"),
    "one is left over": ({**TENSORS, "c": torch.zeros(1)}, "left over ['c']"),
    "other names": ({"x.a": TENSORS["a"], "x.b": TENSORS["b"]}, "missing ['a', 'b'], left over ['x.a', 'x.b']"),
    "none": ({}, "missing ['a', 'b']"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_reads_back_different_is_not_published(case: str, tmp_path: Path) -> None:
    """`save_pretrained` of a wrapper stores something else than what was trained, and raises nothing."""
    stored, reason = WRONG[case]
    with pytest.raises(CheckpointError) as caught:
        write_verified(tmp_path / "checkpoint-1", writer(stored), TENSORS)
    assert reason in str(caught.value) and caught.value.exit_code == 3
    assert names(tmp_path) == []


@pytest.mark.parametrize("place", range(11))
def test_every_piece_of_a_tensor_is_compared(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the last, shorter one."""
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 16)
    live = torch.arange(11.0)
    stored = live.clone()
    assert verify_folder(write_verified(tmp_path / "checkpoint-1", writer({"a": stored}), {"a": live})) == []
    stored[place] += 1
    with pytest.raises(CheckpointError, match="a reads back different"):
        write_verified(tmp_path / "checkpoint-2", writer({"a": stored}), {"a": live})


def test_files_written_wrong_are_not_published(tmp_path: Path) -> None:
    def empty(folder: Path) -> None:
        (folder / "model.safetensors").touch()

    def truncated(folder: Path) -> None:
        writer()(folder)
        os.truncate(folder / "model.safetensors", 100)

    for write in (empty, truncated, lambda folder: None):
        with pytest.raises(CheckpointError):
            write_verified(tmp_path / "checkpoint-1", write, TENSORS)
        assert names(tmp_path) == []


def test_a_writer_that_dies_leaves_nothing(tmp_path: Path) -> None:
    def die(folder: Path) -> None:
        writer()(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_verified(tmp_path / "checkpoint-1", die, TENSORS)
    assert names(tmp_path) == []


def test_an_existing_folder_is_not_overwritten_unless_asked_to(tmp_path: Path) -> None:
    folder = publish(tmp_path, 1)
    before = (folder / "sub" / "note.txt").stat().st_mtime_ns
    with pytest.raises(CheckpointError, match="exists already"):
        write_verified(folder, writer(), TENSORS)
    assert (folder / "sub" / "note.txt").stat().st_mtime_ns == before and names(tmp_path) == ["checkpoint-1"]
    write_verified(folder, writer(note="new"), TENSORS, replace=True)
    assert (folder / "sub" / "note.txt").read_text() == "new"
    assert verify_folder(folder) == [] and names(tmp_path) == ["checkpoint-1"]


def test_an_older_folder_is_untouched_when_its_replacement_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish(tmp_path, 1)
    for stored, _ in WRONG.values():
        with pytest.raises(CheckpointError):
            write_verified(folder, writer(stored), TENSORS, replace=True)
        assert verify_folder(folder) == [] and names(tmp_path) == ["checkpoint-1"]

    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target == folder and not path.name.endswith("-old"):
            raise PermissionError(1, "Operation not permitted")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)  # the last moment it can fail: the old folder is already set aside
    with pytest.raises(CheckpointError, match="not permitted"):
        write_verified(folder, writer(note="new"), TENSORS, replace=True)
    assert verify_folder(folder) == [] and (folder / "sub" / "note.txt").read_text() == "step 1"
    assert names(tmp_path) == ["checkpoint-1"]


# -- disks that do not play along ----------------------------------------------------------------------------------


def save_tensors(folder: Path) -> None:
    save_file({"a": torch.zeros(600_000)}, folder / "model.safetensors")


def save_optimizer(folder: Path) -> None:
    """torch.save reports a full disk as RuntimeError, not as OSError."""
    torch.save({"state": torch.zeros(600_000)}, folder / "optimizer.pt")


def save_text(folder: Path) -> None:
    (folder / "trainer_state.json").write_text("0" * 2_000_000)


@pytest.mark.parametrize("write", [save_tensors, save_optimizer, save_text])
def test_a_full_disk_is_named_and_leaves_nothing(
    write: Callable[[Path], None], tmp_path: Path, mount: Callable[..., None]
) -> None:
    disk = tmp_path / "disk"
    mount(disk, "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    good = publish(disk, 1)
    with pytest.raises(CheckpointError) as caught:
        write_verified(disk / "checkpoint-2", write, {"a": torch.zeros(600_000)})
    where, _, cure = str(caught.value).rpartition(";")
    assert str(disk / "checkpoint-2") in where and "disk" in cure and caught.value.exit_code == 3
    assert names(disk) == ["checkpoint-1"] and verify_folder(good) == []


def test_too_little_room_is_found_before_the_run(tmp_path: Path, mount: Callable[..., None]) -> None:
    disk = tmp_path / "disk"
    mount(disk, "-t", "tmpfs", "-o", "size=20m", "tmpfs")
    check_writable(disk / "output", 1_000_000)
    with pytest.raises(CheckpointError, match=r"0\.02 GB free, a save needs 0\.01 GB; free space or write"):
        check_writable(disk / "output", 10_000_000)
    assert names(disk / "output") == []
    (disk / "filler").write_bytes(b"0" * shutil.disk_usage(disk).free)
    with pytest.raises(CheckpointError, match="the disk is full: free space or write to another disk"):
        check_writable(disk / "output", 0)


def test_a_read_only_folder_is_named_with_its_cure(tmp_path: Path, mount: Callable[..., None]) -> None:
    """A bind mount, because the mode bits of a folder do not hold back root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount(disk, "--bind", str(disk))
    mount(disk, "-o", "remount,bind,ro")
    for action in (
        lambda: check_writable(disk, 0),
        lambda: check_writable(disk / "new" / "output", 0),
        lambda: publish(disk, 1),
    ):
        with pytest.raises(CheckpointError, match=r"read-only: write to one that is not") as caught:
            action()
        assert str(disk) in str(caught.value) and caught.value.exit_code == 3


def test_a_file_where_a_folder_should_be_is_named_with_its_cure(tmp_path: Path) -> None:
    file = tmp_path / "output"
    file.write_text("mine")
    for action in (
        lambda: check_writable(file, 0),
        lambda: check_writable(file / "run", 0),
        lambda: publish(file, 1),
        lambda: publish(file / "run", 1),
    ):
        with pytest.raises(CheckpointError, match="a file stands where a folder should be: remove it or") as caught:
            action()
        assert str(file) in str(caught.value) and caught.value.exit_code == 3
    assert file.read_text() == "mine"


# -- trusting ------------------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def put(content: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def cut_to(size: int) -> Callable[[Path], object]:
    return lambda path: os.truncate(path, size)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "file missing": ("model.safetensors", Path.unlink, "missing"),
    "file in a subfolder missing": ("sub/note.txt", Path.unlink, "missing"),
    "a folder in its place": ("sub/note.txt", replace_by_a_folder, "missing"),
    "truncated": ("model.safetensors", cut_to(50), "50 bytes"),
    "emptied": ("model.safetensors", cut_to(0), "0 bytes"),
    "longer": ("sub/note.txt", put("step 1 and more"), "15 bytes, 6 were written"),
    "one bit flipped": ("model.safetensors", flip_a_byte, "blake3"),
    "no manifest": ("MANIFEST.json", Path.unlink, "never finished"),
    "torn manifest": ("MANIFEST.json", cut_to(60), "not readable"),
    "not text": ("MANIFEST.json", put(b"\xff\xfe"), "not readable"),
    "another JSON": ("MANIFEST.json", put("[]"), "not readable"),
    "entries of no use": ("MANIFEST.json", put('{"files": [{"name": "x"}]}'), "not readable"),
    "no entries": ("MANIFEST.json", put('{"files": 3}'), "not readable"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_and_named(case: str, tmp_path: Path) -> None:
    name, damage, reason = DAMAGE[case]
    folder = publish(tmp_path, 1)
    damage(folder / name)
    (issue,) = verify_folder(folder)
    assert issue.source == name and reason in issue.message and str(issue).startswith(f"{name}: {issue.message}")


def test_all_damage_is_listed(tmp_path: Path) -> None:
    folder = publish(tmp_path, 1)
    flip_a_byte(folder / "model.safetensors")
    (folder / "sub" / "note.txt").unlink()
    assert [issue.source for issue in verify_folder(folder)] == ["model.safetensors", "sub/note.txt"]


def test_checkpoints_are_found_in_order_of_steps(tmp_path: Path) -> None:
    for step in (1000, 20, 3):
        publish(tmp_path, step)
    for other in ("checkpoint-", "checkpoint-x", "checkpoint-5-old", ".writing-checkpoint-7-abc", "lora_adapters"):
        (tmp_path / other).mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    assert [step for step, _ in find_checkpoints(tmp_path)] == [3, 20, 1000]
    assert find_checkpoints(tmp_path / "nowhere") == []


def test_the_newest_valid_one_is_chosen_and_damaged_ones_are_named(tmp_path: Path) -> None:
    folders = {step: publish(tmp_path, step) for step in (1, 2, 3, 4)}
    os.truncate(folders[4] / "model.safetensors", 10)
    (folders[3] / "MANIFEST.json").unlink()
    chosen, passed_over = newest_valid(tmp_path)
    assert chosen == folders[2]
    assert [path.name for path, _ in passed_over] == ["checkpoint-4", "checkpoint-3"]
    assert passed_over[0][1].source == "model.safetensors" and "never finished" in passed_over[1][1].message
    for step in (1, 2):
        flip_a_byte(folders[step] / "model.safetensors")
    chosen, passed_over = newest_valid(tmp_path)
    assert chosen is None and len(passed_over) == 4
    assert newest_valid(tmp_path / "nowhere") == (None, [])


def test_an_unreadable_state_is_named(tmp_path: Path) -> None:
    for content in (None, "{", b"\xff".decode("latin-1")):
        if content is not None:
            (tmp_path / "trainer_state.json").write_text(content, encoding="latin-1")
        with pytest.raises(CheckpointError, match=r"trainer_state\.json: not readable"):
            read_state(tmp_path)


# -- tidying -------------------------------------------------------------------------------------------------------


def test_pruning_keeps_the_last_and_the_protected(tmp_path: Path) -> None:
    folders = {step: publish(tmp_path, step) for step in (2, 4, 6, 8, 10)}
    removed = prune(tmp_path, 2, [folders[4]])
    assert removed == [folders[2], folders[6]]
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-4", "checkpoint-8"]
    assert prune(tmp_path, 3, [folders[4]]) == []
    assert prune(tmp_path, 1) == [folders[4], folders[8]]
    assert verify_folder(folders[10]) == []


def test_a_removal_that_is_interrupted_leaves_no_valid_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest goes first: a folder that lost some of its files must not pass for a checkpoint."""
    folders = [publish(tmp_path, step) for step in (1, 2)]

    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.shutil, "rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1)
    assert verify_folder(folders[0]) != [] and newest_valid(tmp_path)[0] == folders[1]


def test_a_folder_deleted_while_its_checkpoints_are_looked_for_holds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against a run that ends because somebody tidied up while it looked for old checkpoints."""
    publish(tmp_path / "run", 1)

    def lose_the_race(path: Path) -> object:
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "run")
        return os.scandir(path)

    monkeypatch.setattr(os, "scandir", lose_the_race)
    assert find_checkpoints(tmp_path / "run") == []


def test_two_may_remove_the_same_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a run that ends because somebody tidied up while it removed an old checkpoint."""
    folders = [publish(tmp_path, step) for step in (1, 2)]
    remove = shutil.rmtree

    def lose_the_race(path: Path) -> None:
        remove(path)
        remove(path)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", lose_the_race)
    assert prune(tmp_path, 1) == folders[:1]
    assert find_checkpoints(tmp_path) == [(2, folders[1])]


def test_a_folder_deleted_right_after_its_save_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a run that ends because the list of what it saved could not be printed."""
    log_saved(tmp_path / "checkpoint-1", TENSORS)
    assert f"{tmp_path}/checkpoint-1: deleted right after it was saved" in caplog.text


def test_what_interrupted_saves_left_is_cleared(tmp_path: Path) -> None:
    folder = publish(tmp_path, 1)
    torn = tmp_path / ".writing-checkpoint-2-abc"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    (tmp_path / "mine").mkdir()
    clear_leftovers(tmp_path)
    assert names(tmp_path) == ["checkpoint-1", "mine"] and verify_folder(folder) == []
    clear_leftovers(tmp_path / "nowhere")


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    """Guards against folders of mode 0700: colleagues could not read a shared run directory."""
    old = os.umask(0o027)
    try:
        folder = publish(tmp_path, 1)
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o750

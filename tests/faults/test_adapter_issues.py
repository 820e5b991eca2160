"""Ways in which an adapter can be damaged, and what detects each: `adapters verify`, loading, or only MANIFEST.json."""

from __future__ import annotations

import copy
import pickle
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from adapter_helpers import (
    as_boson,
    copy_adapter,
    edit_config,
    plain_base,
    read_weights,
    to_binary,
    train_adapter,
    write_weights,
)
from helpers import DemoClip
from speechtune.errors import AdapterError
from speechtune.export.verify import Verification, verify_adapter
from speechtune.families.higgs_audio_v2 import tiny
from speechtune.inference.load import open_adapter
from speechtune.lora.apply import load_adapter

Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
Q_B, V_A = Q_A.replace("lora_A", "lora_B"), Q_A.replace("q_proj", "v_proj")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def run(adapter_run: Path) -> Path:
    return adapter_run


@pytest.fixture(scope="module")
def other_run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: Path,
    cache_dir: Path,
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
) -> Path:
    """An adapter of a wider and deeper model."""
    folder = tmp_path_factory.mktemp("other")
    tiny.make_model(folder / "model", hidden_size=96, num_layers=3)
    shutil.copytree(tiny_base / "codec", folder / "codec")
    return train_adapter(folder / "run", folder, cache_dir, write_chatml, demo_clips)


@pytest.fixture(scope="module")
def loaded_base(tiny_base: Path) -> nn.Module:
    return plain_base(tiny_base)


@pytest.fixture
def adapter(tmp_path: Path, run: Path) -> Path:
    return copy_adapter(run / "lora_adapters", tmp_path / "adapter")


@pytest.fixture
def listed(tmp_path: Path, run: Path) -> Path:
    """An adapter with its MANIFEST.json."""
    return copy_adapter(run / "lora_adapters", tmp_path / "listed", manifest=True)


def change(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """A damage that rewrites the tensors whose name holds `name`."""

    def damage(folder: Path) -> None:
        write_weights(folder, {k: function(v.clone()) if name in k else v for k, v in read_weights(folder).items()})

    return damage


def plant(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def function(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[17] = value
        return tensor

    return function


def drop(*names: str) -> Callable[[Path], None]:
    return lambda folder: write_weights(folder, {k: v for k, v in read_weights(folder).items() if k not in names})


def add(name: str, shape: tuple[int, ...] = (4, 64)) -> Callable[[Path], None]:
    return lambda folder: write_weights(folder, read_weights(folder) | {name: torch.ones(shape)})


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def content(name: str, function: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(function((folder / name).read_bytes())) and None


def flip(position: int, bit: int = 0) -> Callable[[bytes], bytes]:
    def function(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[position] ^= 1 << bit
        return bytes(changed)

    return function


def flip_name(data: bytes) -> bytes:
    return flip(data.index(b"q_proj.lora_A"), 1)(data)


def boson(folder: Path) -> None:
    as_boson(folder, folder.parent / "boson")
    shutil.copytree(folder.parent / "boson", folder, dirs_exist_ok=True)


def swap(folder: Path) -> None:
    tensors = read_weights(folder)
    tensors[Q_A], tensors[V_A] = tensors[V_A], tensors[Q_A]
    write_weights(folder, tensors)


def binary(function: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        to_binary(folder)
        content("adapter_model.bin", function)(folder)

    return damage


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 56224\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>"

# damage -> (what it does, what verify says, what loading says)
ISSUES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "weights of zero bytes": (content(WEIGHTS, lambda data: b""), "empty (0 bytes", "empty (0 bytes"),
    "weights cut in half": (content(WEIGHTS, lambda d: d[: len(d) // 2]), "truncated", "truncated"),
    "weights cut by one byte": (content(WEIGHTS, lambda data: data[:-1]), "truncated", "truncated"),
    "bytes appended": (content(WEIGHTS, lambda data: data + b"\0" * 8), "not a weights file", "not a weights file"),
    "bit flipped in the header's length": (content(WEIGHTS, flip(1)), "not a weights file", "not a weights file"),
    "bit flipped in a tensor's name": (content(WEIGHTS, flip_name), "has no lora_", "1 tensors missing"),
    "a web page": (content(WEIGHTS, lambda data: HTML), "a web page", "a web page"),
    "a Git LFS pointer": (content(WEIGHTS, lambda data: LFS), "git lfs pull", "git lfs pull"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "weights are missing", "weights are missing"),
    "NaN in one tensor": (change(Q_A, plant(float("nan"))), "NaN or infinity in 1 tensor", "NaN or infinity in 1"),
    "infinity in one tensor": (change(Q_B, plant(float("inf"))), "NaN or infinity in 1 tensor", "NaN or infinity in 1"),
    "every lora_B zero": (change("lora_B", torch.zeros_like), "never trained", "never trained"),
    "every tensor zero": (change("lora_", torch.zeros_like), "never trained", "never trained"),
    "one lora_A zero": (change(Q_A, torch.zeros_like), "1 lora_A hold only zeros", "1 lora_A hold only zeros"),
    "whole numbers": (change(Q_A, lambda tensor: tensor.long()), "not floating point", "not floating point"),
    "one lora_B missing": (drop(Q_B), "q_proj has no lora_B", "1 tensors missing"),
    "one module missing": (drop(Q_A, Q_B), "2 tensors missing", "2 tensors missing"),
    "a tensor left over": (add("base_model.model.model.norm.weight", (64,)), "1 left over", "1 left over"),
    "a module left over": (add(Q_A.replace("layers.0", "layers.7")), "has no lora_B", "1 left over"),
    "no LoRA tensor at all": (lambda folder: write_weights(folder, {"x": torch.ones(2)}), "no LoRA", "no LoRA"),
    "one tensor transposed": (change(Q_A, lambda tensor: tensor.T), "the config says 4", "the base wants (4, 64)"),
    "the original package's layout": (boson, "convert PATH OUTPUT --to native", "convert PATH OUTPUT --to native"),
    "r changed": (config(r=8), "ranks 4 and 4, the config says 8", "the base wants (8, 64)"),
    "r is no number": (config(r="4"), "r='4'", "r='4'"),
    "targets narrowed": (config(target_modules=["q_proj"]), "target_modules do not name it", "36 left over"),
    "targets widened": (config(target_modules=r".*proj|.*audio_lm_head"), "2 tensors missing", "2 tensors missing"),
    "targets that match nothing": (config(target_modules=["wq"]), "target_modules", "does not load"),
    "DoRA promised": (config(use_dora=True), "20 tensors missing", "20 tensors missing"),
    "a saved module promised": (config(modules_to_save=["text_lm_head"]), "1 tensors missing", "1 tensors missing"),
    "config of IA3": (config(peft_type="IA3"), "peft_type is 'IA3'", "peft_type is 'IA3'"),
    "config of an unknown method": (config(peft_type="MAGIC"), "not readable as a PEFT", "not readable as a PEFT"),
    "config cut in half": (content(CONFIG, lambda d: d[: len(d) // 2]), "not readable as a PEFT", "not readable as a"),
    "config is a list": (content(CONFIG, lambda data: b"[]"), "not readable as a PEFT", "not readable as a PEFT"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "no adapter_config.json", "no adapter_config.json"),
    ".bin cut in half": (binary(lambda data: data[: len(data) // 2]), "truncated", "truncated"),
    ".bin of zero bytes": (binary(lambda data: b""), "empty (0 bytes", "empty (0 bytes"),
    ".bin that is a web page": (binary(lambda data: HTML), "a web page", "a web page"),
}

# What no check of the files' own content can see.
SILENT: dict[str, Callable[[Path], None]] = {
    "bit flipped in a value": content(WEIGHTS, flip(-2)),
    "two tensors exchanged": swap,
    "one lora_B zeroed": change(Q_B, torch.zeros_like),
    "lora_alpha changed": config(lora_alpha=64),
}


def refused(base: nn.Module, folder: Path) -> str:
    """The message with which loading refuses."""
    with pytest.raises(AdapterError) as caught:
        load_adapter(copy.deepcopy(base), open_adapter(folder))
    return str(caught.value)


@pytest.mark.parametrize("name", ISSUES)
@pytest.mark.filterwarnings("ignore")
def test_verify_and_load_both_refuse(name: str, adapter: Path, loaded_base: nn.Module) -> None:
    damage, said, said_on_load = ISSUES[name]
    assert verify_adapter(adapter).valid
    damage(adapter)
    report = verify_adapter(adapter)
    assert not report.valid
    assert said in " ".join(report.issues), report.issues
    assert said_on_load in refused(loaded_base, adapter)


def test_another_models_adapter(other_run: Path, tiny_base: Path, loaded_base: nn.Module, tmp_path: Path) -> None:
    folder = copy_adapter(other_run / "lora_adapters", tmp_path / "foreign")
    assert verify_adapter(folder).valid  # on its own base
    report = verify_adapter(folder, str(tiny_base / "model"))
    assert any("left over" in issue and "the base wants" in issue for issue in report.issues), report.issues
    assert "effect" not in {check.name for check in report.checks}  # nothing is loaded for what cannot fit
    assert "the base wants" in refused(loaded_base, folder)


@pytest.mark.parametrize("name", SILENT)
def test_what_only_the_manifest_detects(name: str, listed: Path, run: Path, loaded_base: nn.Module) -> None:
    SILENT[name](listed)
    issues = verify_adapter(listed).issues
    assert len(issues) == 1 and issues[0].startswith("manifest: adapter_"), issues
    if name == "lora_alpha changed":  # a scale can be changed on purpose; changed weights cannot
        load_adapter(copy.deepcopy(loaded_base), open_adapter(listed))
    else:
        assert "blake3 differs" in refused(loaded_base, listed)
    (listed / "MANIFEST.json").unlink()
    report = verify_adapter(listed)
    status = {check.name: check.status for check in report.checks}
    assert report.valid and status["manifest"] == "unchecked"
    assert status["values"] == ("warning" if name == "one lora_B zeroed" else "ok")
    load_adapter(copy.deepcopy(loaded_base), open_adapter(listed))


def test_a_bin_carries_its_own_checksums(adapter: Path) -> None:
    to_binary(adapter)
    file = adapter / "adapter_model.bin"
    assert verify_adapter(adapter).valid
    before = torch.load(file, weights_only=True)[Q_A]
    content(file.name, flip(file.read_bytes().index(before.numpy().tobytes()) + 2))(adapter)
    assert not torch.equal(torch.load(file, weights_only=True)[Q_A], before)  # read without a word
    assert "the checksum of" in " ".join(verify_adapter(adapter).issues)


def test_weights_of_another_checkpoint(listed: Path, run: Path, loaded_base: nn.Module) -> None:
    shutil.copyfile(run / "checkpoint-2" / WEIGHTS, listed / WEIGHTS)
    assert ["blake3 differs" in issue for issue in verify_adapter(listed).issues] == [True]
    assert "blake3 differs" in refused(loaded_base, listed)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": [{"nbme": "x"}]}', '{"files": []}', '{"files": 3}'])
def test_a_broken_manifest_is_an_issue(text: str, listed: Path, loaded_base: nn.Module) -> None:
    (listed / "MANIFEST.json").write_text(text)
    assert any("manifest: " in issue for issue in verify_adapter(listed).issues)
    assert "MANIFEST.json" in refused(loaded_base, listed)


def test_every_flipped_bit_is_detected_with_a_manifest(listed: Path) -> None:
    data, random_bits = (listed / WEIGHTS).read_bytes(), random.Random(7)
    for _ in range(40):
        position = random_bits.choice([random_bits.randrange(6000), random_bits.randrange(len(data))])
        (listed / WEIGHTS).write_bytes(flip(position, random_bits.randrange(8))(data))
        assert not verify_adapter(listed, look_up_base=False).valid


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.filterwarnings("ignore")
def test_no_damage_ends_in_a_traceback(name: str, adapter: Path) -> None:
    """Flipped bits and cuts at random places, without a manifest: a verdict each time, and no cut passes."""
    data, random_bits = (adapter / name).read_bytes(), random.Random(11)
    for _ in range(60):
        position = random_bits.randrange(1, min(len(data), 6000))
        (adapter / name).write_bytes(flip(position, random_bits.randrange(8))(data))
        assert isinstance(verify_adapter(adapter), Verification)
        (adapter / name).write_bytes(data[: random_bits.randrange(len(data))])
        assert not verify_adapter(adapter).valid


def test_pickled_code_is_not_run(adapter: Path, tmp_path: Path, loaded_base: nn.Module) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    (adapter / WEIGHTS).unlink()
    torch.save({Q_A: Evil()}, adapter / "adapter_model.bin", pickle_module=pickle)
    assert "weights only" in " ".join(verify_adapter(adapter).issues).lower()
    assert "weights only" in refused(loaded_base, adapter).lower()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("named", [None, "gone/base"])
def test_without_a_base_the_check_is_unchecked(named: str | None, adapter: Path) -> None:
    edit_config(adapter, base_model_name_or_path=named)
    report = verify_adapter(adapter)
    assert report.valid and {check.name: check.status for check in report.checks}["base"] == "unchecked"
    drop(Q_B)(adapter)
    assert "has no lora_B" in " ".join(verify_adapter(adapter).issues)


def test_the_effect_is_proven(adapter: Path, tiny_base: Path) -> None:
    report = verify_adapter(adapter, str(tiny_base / "model"))
    assert report.valid and report.checks[-1].name == "effect" and report.checks[-1].status == "ok"
    edit_config(adapter, lora_alpha=0)
    issues = verify_adapter(adapter, str(tiny_base / "model")).issues
    assert len(issues) == 1 and "differ by 0.0" in issues[0]

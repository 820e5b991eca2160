"""Adapters on disk: find them by what is in the files, and verify everything a saved adapter promises."""

from __future__ import annotations

import copy
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from speechtune.config import RunConfig
from speechtune.errors import AdapterError, ConfigError
from speechtune.families import create_family
from speechtune.inference.load import load_model, model_config
from speechtune.lora.apply import adapter_off, adapter_state, lora_b_norms
from speechtune.lora.files import (
    BIN_NAME,
    CONFIG_NAME,
    KEY_PREFIX,
    WEIGHTS_NAME,
    adapter_folder,
    layout_hint,
    lora_module,
    manifest_issues,
    read_config,
    read_tensors,
    value_issues,
    weights_file,
)
from speechtune.storage.verified_folder import ASIDE, CHECKPOINT, MANIFEST_NAME, STATE_NAME

Status = Literal["ok", "issue", "warning", "unchecked"]


MAX_HEADER_BYTES = 100 << 20
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at, and what was found."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True, slots=True)
class Verification:
    """All that can be said of one adapter; `valid` when no check found an issue."""

    path: str
    valid: bool
    base: str | None
    rank: int | None
    alpha: float | None
    step: int | None
    format: str | None
    bytes: int
    modified: str | None
    checks: tuple[Check, ...]

    @property
    def issues(self) -> list[str]:
        """Name and detail of each issue."""
        return [f"{check.name}: {check.detail}" for check in self.checks if check.status == "issue"]


def verify_adapter(path: Path, base: str | None = None, *, look_up_base: bool = True) -> Verification:
    """Check a saved adapter: files, values, keys and shapes, manifest, and with `base` its effect.

    Args:
        path: PEFT folder, or a run's folder with `lora_adapters` in it.
        base: hub id or folder of a base that is loaded with the adapter on it to prove an effect; None checks keys and
            shapes alone, against the base the adapter names where its configuration can be found.
        look_up_base: False leaves the base the adapter names alone.

    Raises:
        AdapterError: `path` is no folder.
        ConfigError: `base` cannot be used.
    """
    directory = adapter_folder(path)
    config, tensors, checks = _check_files(directory)
    named = config.base_model_name_or_path if config else None
    if config and tensors:
        checks.append(_check_structure(config, tensors))
        if base or (look_up_base and named):
            checks.append(_check_base(config, tensors, base, named))
        else:
            reason = "the base was not looked up" if named else "the adapter names no base; --base names one"
            checks.append(Check("base", "unchecked", reason))
        if base and all(check.status != "issue" for check in checks):
            checks.append(_check_effect(model_config(base, None, directory), directory))
    file = _weights_or_none(directory)
    return Verification(
        str(directory),
        all(check.status != "issue" for check in checks),
        base or named,
        config.r if config else None,
        config.lora_alpha if config else None,
        training_step(directory),
        file.suffix.removeprefix(".") if file else None,
        file.stat().st_size if file else 0,
        _date(file) if file else None,
        tuple(checks),
    )


def _check_files(directory: Path) -> tuple[LoraConfig | None, dict[str, torch.Tensor], list[Check]]:
    config, tensors = None, {}
    checks: list[Check] = []
    try:
        config = read_config(directory)
        checks.append(Check("config", "ok", f"LoRA, rank {config.r}, alpha {config.lora_alpha:g}"))
    except AdapterError as error:
        checks.append(Check("config", "issue", str(error)))
    try:
        tensors = read_tensors(weights_file(directory))
        count = sum(tensor.numel() for tensor in tensors.values())
        checks.append(Check("weights", "ok", f"{len(tensors)} tensors, {count:,} parameters"))
    except AdapterError as error:
        checks.append(Check("weights", "issue", str(error)))
    if tensors:
        checks.append(_check_values(tensors))
    if file := _weights_or_none(directory):
        checks.append(_check_manifest(directory, file))
    return config, tensors, checks


def _check_manifest(directory: Path, file: Path) -> Check:
    if (directory / MANIFEST_NAME).exists():
        return _result("manifest", [str(issue) for issue in manifest_issues(directory)], "every byte as written")
    if file.name == BIN_NAME and zipfile.is_zipfile(file):  # which torch.load reads without looking at its checksums
        with zipfile.ZipFile(file) as archive:
            changed = archive.testzip()
        if changed:
            return Check(
                "manifest", "issue", f"{file.name}: the checksum of {changed} differs: changed since it was saved"
            )
    return Check("manifest", "unchecked", f"no {MANIFEST_NAME}: a changed value cannot be told")


def _check_values(tensors: Mapping[str, torch.Tensor]) -> Check:
    if issues := value_issues(tensors):
        return Check("values", "issue", "; ".join(issues))
    norms = lora_b_norms(tensors)
    zero = sorted(name for name, norm in norms.items() if norm == 0.0)
    if zero:
        detail = f"{len(zero)} of {len(norms)} lora_B are zero (first {zero[0]}): never reached, or lost in saving"
        return Check("values", "warning", detail)
    return Check("values", "ok", f"all finite, all {len(norms)} lora_B trained")


def _check_structure(config: LoraConfig, tensors: Mapping[str, torch.Tensor]) -> Check:
    """Without any base: the parts of each module are complete, of the rank the config says, and of a target's."""
    issues = [f"{name} does not start with {KEY_PREFIX}" for name in tensors if not name.startswith(KEY_PREFIX)]
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if module := lora_module(name):
            part = name.removeprefix(KEY_PREFIX).removeprefix(module + ".").removesuffix(".weight")
            modules.setdefault(module, {})[part] = tensor
    rank_pattern = config.rank_pattern or {}
    for module, parts in modules.items():
        rank = rank_pattern.get(get_pattern_key(list(rank_pattern), module), config.r)
        issues += _module_issues(module, parts, rank)
        if config.target_modules and not config.target_parameters and not check_target_module_exists(config, module):
            issues.append(f"{module} has weights, but the config's target_modules do not name it")
    if isinstance(config.target_modules, list | set | tuple):
        ends = sorted(t for t in config.target_modules if not any(f".{m}".endswith(f".{t}") for m in modules))
        issues += [f"target_modules names {end}, but no such module has weights" for end in ends]
    return _result("structure", issues, f"{len(modules)} modules, lora_A and lora_B of matching rank")


def _module_issues(module: str, parts: Mapping[str, torch.Tensor], rank: int) -> list[str]:
    kind = "lora_embedding_" if "lora_embedding_A" in parts or "lora_embedding_B" in parts else "lora_"
    a, b = parts.get(f"{kind}A"), parts.get(f"{kind}B")
    if a is None or b is None:
        return [f"{module} has no {kind}{'A' if a is None else 'B'}"]
    if a.ndim < 2 or b.ndim != a.ndim:
        return [f"{module}: shapes {tuple(a.shape)} and {tuple(b.shape)} are not those of lora_A and lora_B"]
    found = (a.shape[0], b.shape[1])
    return [] if found == (rank, rank) else [f"{module}: ranks {found[0]} and {found[1]}, the config says {rank}"]


def _check_base(config: LoraConfig, tensors: Mapping[str, torch.Tensor], base: str | None, named: str | None) -> Check:
    """Compare names and shapes with those PEFT would make on the base, which is built without its weights."""
    try:
        skeleton = create_family(model_config(base or named, None)).skeleton()
    except ConfigError as error:
        if base:
            raise
        return Check("base", "unchecked", f"{named} could not be checked: {error}")
    if hint := layout_hint(tensors, {name for name, _ in skeleton.named_modules()}):
        return Check("base", "issue", hint)
    try:
        promised = promised_shapes(skeleton, config)
    except (ValueError, TypeError, RuntimeError) as error:
        return Check("base", "issue", f"PEFT cannot put this config on {base or named}: {str(error)[:300]}")
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    missing, extra = sorted(promised.keys() - found), sorted(found.keys() - promised)
    issues = [f"{len(missing)} tensors missing (first {missing[0]})"] if missing else []
    issues += [f"{len(extra)} left over (first {extra[0]})"] if extra else []
    for name in sorted(promised.keys() & found):
        if promised[name] != found[name]:
            issues.append(f"{name}: shape {found[name]}, the base wants {promised[name]}")
    return _result("base", issues, f"names and shapes are those of {base or named}")


def promised_shapes(skeleton: torch.nn.Module, config: LoraConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors an adapter of this config must hold for a base, built on the meta device."""
    empty = copy.deepcopy(config)
    empty.init_lora_weights = False  # some initialisations decompose the base's weights, which are not there
    model = PeftModel(cast(Any, skeleton), empty)
    return {name: tuple(tensor.shape) for name, tensor in adapter_state(model).items()}


def _check_effect(config: RunConfig, directory: Path) -> Check:
    """Load base and adapter with plain PEFT, and compare the logits with the adapter on and off."""
    try:
        family, model = load_model(config, directory)
    except AdapterError as error:
        return Check("effect", "issue", str(error))
    logits, _ = family.probe(model)
    with adapter_off(cast(PeftModel, model)):
        difference = float((family.probe(model)[0] - logits).abs().max())
    if not difference > 0.0:  # also NaN
        return Check("effect", "issue", f"logits with and without the adapter differ by {difference}")
    return Check("effect", "ok", f"logits with and without the adapter differ by up to {difference:.3g}")


def _result(name: str, issues: list[str], fine: str) -> Check:
    more = [f"and {len(issues) - SHOWN} more"] if len(issues) > SHOWN else []
    return Check(name, "issue" if issues else "ok", "; ".join(issues[:SHOWN] + more) or fine)


def _weights_or_none(directory: Path) -> Path | None:
    try:
        return weights_file(directory)
    except AdapterError:
        return None


def _date(file: Path) -> str:
    return datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds")


def training_step(directory: Path) -> int | None:
    """Optimizer step an adapter was saved at, from the folders' names or a trainer state beside it."""
    for folder in (directory, directory.parent):
        if match := CHECKPOINT.fullmatch(folder.absolute().name):
            return int(match[1])
        try:
            state = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
            step = state.get("step", state.get("global_step"))
        except (OSError, ValueError, AttributeError):
            continue
        if isinstance(step, int):
            return step
    return None


def find_adapters(root: Path) -> tuple[list[Verification], list[Path]]:
    """Every adapter under `root`, whatever its folder is called, and full checkpoints with LoRA weights inside.

    Links are followed, but no folder is visited twice. What each adapter's base would say is left to `verify_adapter`.

    Raises:
        AdapterError: `root` is no folder.
    """
    if not root.is_dir():
        raise AdapterError(f"{root}: no such folder")
    adapters, checkpoints = [], []
    for folder, names in _folders(root):
        if CONFIG_NAME in names or WEIGHTS_NAME in names or BIN_NAME in names:
            adapters.append(verify_adapter(folder, look_up_base=False))
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

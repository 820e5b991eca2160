"""Verify a saved adapter: its files, its values, how it fits the base, and its effect."""

import copy
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from speechtune.errors import AdapterError, ConfigError
from speechtune.families import adapter_layouts, create_family
from speechtune.family import NATIVE
from speechtune.inference.load import load_model, model_config
from speechtune.lora.apply import adapter_off, fit_issues
from speechtune.lora.base_identity import read_recipe
from speechtune.lora.files import (
    BIN_NAME,
    KEY_PREFIX,
    ODD_KEY,
    OTHER_TARGETS,
    WEIGHTS_NAME,
    StoredAdapter,
    adapter_folder,
    layout_of,
    lora_module,
    manifest_issues,
    odd_key,
    read_config,
    read_tensors,
    value_issues,
    weights_file,
)
from speechtune.lora.layouts import in_layout
from speechtune.storage.verified_folder import CHECKPOINT, MANIFEST_NAME, STATE_NAME

Status = Literal["ok", "issue", "warning", "unchecked"]


SHOWN = 3


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Outcome of one check of an adapter."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True, slots=True)
class Verification:
    """Facts of a saved adapter and the checks it went through; `valid` when none has an issue."""

    path: str
    valid: bool
    base: str | None
    rank: int | None
    alpha: float | None
    step: int | None
    format: str | None
    bytes: int
    modified: str | None
    checks: tuple[CheckResult, ...]

    @property
    def issues(self) -> list[str]:
        """Name and detail of each issue."""
        return [f"{check.name}: {check.detail}" for check in self.checks if check.status == "issue"]


def verify_adapter(
    path: Path,
    base: str | None = None,
    *,
    model_options: Mapping[str, str] | None = None,
    look_up_base: bool = True,
    any_layout: bool = False,
) -> Verification:
    """Verify a saved adapter: files, values, keys and shapes, manifest, and with `base` its effect.

    Args:
        path: PEFT folder, or a run's folder with `lora_adapters` in it.
        base: hub id or folder of a base that is loaded with the adapter on it to prove an effect; None checks keys and
            shapes alone, against the base the adapter names where its configuration can be found.
        model_options: how `base` is prepared, as for `model_config`.
        look_up_base: False leaves the base the adapter names alone.
        any_layout: accept names of another layout, and compare their native ones with the base.

    Raises AdapterError: `path` is no folder; ConfigError: `base` cannot be used.
    """
    directory = adapter_folder(path)
    file = next((directory / name for name in (WEIGHTS_NAME, BIN_NAME) if (directory / name).is_file()), None)
    config, tensors, checks = _check_files(directory, file)
    named = config.base_model_name_or_path if config else None
    if config and tensors:
        layouts = adapter_layouts()
        stored = StoredAdapter(directory, config, tensors, layout_of(tensors, layouts), None)
        stored = in_layout(stored, NATIVE, layouts) if any_layout else stored
        checks.append(_check_structure(stored))
        if base or (look_up_base and named):
            checks += _check_base(stored, base, named)
        else:
            reason = "the base was not looked up" if named else "the adapter names no base; --base names one"
            checks.append(CheckResult("base", "unchecked", reason))
        if base and all(check.status != "issue" for check in checks):
            checks.append(_check_effect(stored, base, model_options))
    return Verification(
        str(directory),
        all(check.status != "issue" for check in checks),
        base or named,
        config.r if config else None,
        config.lora_alpha if config else None,
        training_step(directory),
        file.suffix.removeprefix(".") if file else None,
        file.stat().st_size if file else 0,
        datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds") if file else None,
        tuple(checks),
    )


def _check_files(
    directory: Path, file: Path | None
) -> tuple[LoraConfig | None, dict[str, torch.Tensor], list[CheckResult]]:
    config, tensors = None, {}
    checks: list[CheckResult] = []
    try:
        config = read_config(directory)
        checks.append(CheckResult("config", "ok", f"LoRA, rank {config.r}, alpha {config.lora_alpha:g}"))
    except AdapterError as error:
        checks.append(CheckResult("config", "issue", str(error)))
    try:
        tensors = read_tensors(weights_file(directory))
        count = sum(tensor.numel() for tensor in tensors.values())
        checks.append(CheckResult("weights", "ok", f"{len(tensors)} tensors, {count:,} parameters"))
    except AdapterError as error:
        checks.append(CheckResult("weights", "issue", str(error)))
    if tensors:
        checks.append(_check_values(tensors))
    if file:
        checks.append(_check_manifest(directory, file))
    return config, tensors, checks


def _check_manifest(directory: Path, file: Path) -> CheckResult:
    if (directory / MANIFEST_NAME).exists():
        return _result("manifest", [str(issue) for issue in manifest_issues(directory)], "every byte as written")
    if file.name == BIN_NAME and zipfile.is_zipfile(file):  # which torch.load reads without looking at its checksums
        with zipfile.ZipFile(file) as archive:
            changed = archive.testzip()
        if changed:
            detail = f"{file.name}: the checksum of {changed} differs: changed since it was saved"
            return CheckResult("manifest", "issue", detail)
    return CheckResult("manifest", "unchecked", f"no {MANIFEST_NAME}: a changed value would not show")


def _check_values(tensors: Mapping[str, torch.Tensor]) -> CheckResult:
    if issues := value_issues(tensors):
        return CheckResult("values", "issue", "; ".join(issues))
    trained = {name: bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name}
    if zero := sorted(name for name in trained if not trained[name]):
        detail = f"{len(zero)} of {len(trained)} lora_B are zero (first {zero[0]}): never reached, or lost in saving"
        return CheckResult("values", "warning", detail)
    return CheckResult("values", "ok", f"all finite, all {len(trained)} lora_B trained")


def _check_structure(stored: StoredAdapter) -> CheckResult:
    """Without any base: the parts of each module are complete, of the rank the config says, and of a target's."""
    config, tensors = stored.config, stored.tensors
    odd = odd_key(tensors)
    issues = [ODD_KEY.format(odd)] if odd else []
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
            issues.append(f"{module} has weights, but the config's target_modules do not name it; {OTHER_TARGETS}")
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
    ranks = (a.shape[0], b.shape[1])
    return [] if ranks == (rank, rank) else [f"{module}: ranks {ranks[0]} and {ranks[1]}, the config says {rank}"]


def _check_base(stored: StoredAdapter, base: str | None, named: str | None) -> list[CheckResult]:
    """Compare names and shapes with those PEFT would make on the base, which is built without its weights.

    A result of its own for everything that the base's family has to say about the adapter.
    """
    try:
        family = create_family(model_config(base or named, None))
        skeleton = family.skeleton()
    except ConfigError as error:
        if base:
            raise
        return [CheckResult("base", "unchecked", f"{named} could not be checked: {error}")]
    if stored.layout in family.adapter_layouts:
        return [CheckResult("base", "issue", stored.layout_hint)]
    found = [
        CheckResult("parts", "issue" if issue.severity == "error" else "warning", issue.message)
        for issue in family.adapter_issues(stored.config, stored.tensors, stored.directory)
    ]
    empty = copy.deepcopy(stored.config)
    empty.init_lora_weights = False  # some initialisations decompose the base's weights, which are not there
    try:
        model = PeftModel(cast(Any, skeleton), empty)
    except (ValueError, TypeError, RuntimeError) as error:
        reason = f"PEFT cannot put this config on {base or named}: {str(error)[:300]}"
        return [*found, CheckResult("base", "issue", reason)]
    issues = fit_issues(model, stored.tensors)
    return [*found, _result("base", issues, f"names and shapes are those of {base or named}")]


def _check_effect(stored: StoredAdapter, base: str, options: Mapping[str, str] | None) -> CheckResult:
    """Put the adapter on its base, and compare the logits with the adapter on and off."""
    try:
        stored = replace(stored, identity=read_recipe(stored.directory))
        family, model = load_model(model_config(base, options, stored), stored)
    except AdapterError as error:
        return CheckResult("effect", "issue", str(error))
    logits, _ = family.probe(model)
    with adapter_off(cast(PeftModel, model)):
        difference = float((family.probe(model)[0] - logits).abs().max())
    if not difference > 0.0:  # also NaN
        return CheckResult("effect", "issue", f"logits with and without the adapter differ by {difference}")
    return CheckResult("effect", "ok", f"logits with and without the adapter differ by up to {difference:.3g}")


def _result(name: str, issues: list[str], fine: str) -> CheckResult:
    more = [f"and {len(issues) - SHOWN} more"] if len(issues) > SHOWN else []
    return CheckResult(name, "issue" if issues else "ok", "; ".join(issues[:SHOWN] + more) or fine)


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

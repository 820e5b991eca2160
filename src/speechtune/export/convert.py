"""Higgs Audio v2 adapters between two key layouts: native, of transformers, and boson, of the original package."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import nn

from speechtune.config import RunConfig
from speechtune.errors import AdapterError, ConfigError
from speechtune.export.verify import verify_adapter
from speechtune.families import create_family
from speechtune.families.higgs_audio_v2.boson import RENAMES, Layout, Rename, layout_of, rename_key
from speechtune.inference.load import model_config
from speechtune.lora.apply import load_adapter
from speechtune.lora.files import (
    CONFIG_NAME,
    KEY_PREFIX,
    WEIGHTS_NAME,
    adapter_folder,
    lora_module,
    read_adapter,
    read_config,
    read_tensors,
    weights_file,
)
from speechtune.precision import plan_precision
from speechtune.storage.verified_folder import write_verified

TOLERANCE = 1e-4  # of the greatest logit: float32 sums in another order


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did; `logit_difference` None when the two layouts were not compared on a base, and why not."""

    output: str
    source_layout: Layout
    layout: Layout
    tensors: int
    renamed: int
    target_modules_listed: bool
    logit_difference: float | None
    adapter_effect: float | None
    not_compared: str | None


def convert(adapter: Path, output: Path, to: Layout, *, base: str | None = None, compare: bool = True) -> ConvertReport:
    """Write an adapter in another key layout, as safetensors; one in that layout already is copied.

    Args:
        adapter: PEFT folder, safetensors or .bin.
        output: a folder that does not exist yet.
        to: the wanted layout.
        base: hub id or folder of the base to compare both layouts on; None takes the one the adapter names where that
            is a local folder, and else compares nothing (a conversion downloads no base).
        compare: False converts without a comparison.

    Raises:
        AdapterError: the adapter is damaged, of neither layout, or gives other logits after the conversion.
        CheckpointError: the folder exists or cannot be written.
    """
    directory = adapter_folder(adapter)
    tensors = read_adapter(directory)
    source = layout_of(tensors)
    if source is None:
        raise AdapterError(
            f"{directory}: keys like {min(tensors)}: neither the native nor the boson layout of Higgs Audio"
        )
    rename = RENAMES[to] if source != to else str
    converted = {KEY_PREFIX + rename(name.removeprefix(KEY_PREFIX)): tensor for name, tensor in tensors.items()}
    values, listed = converted_config(directory, tensors, rename)
    if base:
        values["base_model_name_or_path"] = base
    config, reason = _comparable(directory, base) if compare else (None, "not asked for")
    if source == to:
        config, reason = None, "nothing was renamed"
    difference = effect = None

    def write(aside: Path) -> None:
        nonlocal difference, effect
        write_adapter(aside, values, converted)
        if (directory / "README.md").is_file():
            shutil.copyfile(directory / "README.md", aside / "README.md")
        if compare and (issues := verify_adapter(aside, look_up_base=to == "native").issues):
            raise AdapterError(f"{directory}: cannot be converted to {to}: " + "; ".join(issues))
        if config:
            native, boson = (aside, directory) if to == "native" else (directory, aside)
            difference, effect = compare_layouts(config, native, boson)

    write_verified(output, write, converted)
    renamed = sum(old != new for old, new in zip(tensors, converted, strict=True))
    return ConvertReport(str(output), source, to, len(tensors), renamed, listed, difference, effect, reason)


def converted_config(directory: Path, names: Iterable[str], rename: Rename) -> tuple[dict[str, Any], bool]:
    """An adapter's configuration for renamed tensors, and whether its targets had to become a list of module names.

    Args:
        directory: PEFT folder of the source.
        names: of the source's tensors.
        rename: of parameter names.
    """

    def module_name(name: str) -> str:
        return rename(f"{name}.").removesuffix(".")

    values = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    if rename is not str or not isinstance(values.get("auto_mapping"), dict):
        values["auto_mapping"] = None  # the original package wrote `true` here; a class belongs to one layout only
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(values.get(key), list):
            values[key] = [module_name(name) for name in values[key]]
    places = {module: module_name(module) for name in names if (module := lora_module(name))}
    for key in ("rank_pattern", "alpha_pattern"):
        if values.get(key):
            values[key] = _moved_pattern(values[key], places)
    modules = sorted(places.values())
    config = LoraConfig.from_peft_type(**values)
    if values.get("target_modules") is None or (
        values.get("layers_to_transform") is None
        and all(check_target_module_exists(config, module) for module in modules)
    ):
        return values, False
    values |= {"target_modules": modules, "layers_to_transform": None, "layers_pattern": None}
    return values, True


def _moved_pattern(pattern: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """A rank or alpha pattern that gives each moved module what it gave it before: as it is, or module by module."""
    wanted = {new: pattern.get(get_pattern_key(list(pattern), old)) for old, new in places.items()}
    found = {new: pattern.get(get_pattern_key(list(pattern), new)) for new in places.values()}
    return dict(pattern) if wanted == found else {name: value for name, value in wanted.items() if value is not None}


def write_adapter(directory: Path, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write config and weights of an adapter into an existing folder."""
    (directory / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    own = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}  # none may share memory
    save_file(own, directory / WEIGHTS_NAME, metadata={"format": "pt"})


@contextmanager
def native_adapter(adapter: Path) -> Iterator[Path]:
    """A folder that loads natively: `adapter` itself, or a temporary conversion where it is in the boson layout."""
    directory = adapter_folder(adapter)
    if layout_of(read_adapter(directory)) != "boson":
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="speechtune-native-") as folder:
        convert(directory, Path(folder) / "native", "native", compare=False)
        yield Path(folder) / "native"


def _comparable(directory: Path, base: str | None) -> tuple[RunConfig | None, str | None]:
    """The base to compare on, or None and the reason; a base that was named by the caller must be usable."""
    config = read_config(directory)
    named = config.base_model_name_or_path
    if set(_parts(directory)) - {"lora_A", "lora_B", None}:
        return None, "the comparison knows plain LoRA only, this adapter has other parts"
    if base is None and (named is None or not Path(named).is_dir()):
        return None, f"the base it names ({named}) is no local folder; --base names one"
    try:
        return model_config(base or named, None), None
    except ConfigError as error:
        if base:
            raise
        return None, str(error)


def _parts(directory: Path) -> Iterator[str | None]:
    for name in read_tensors(weights_file(directory)):
        found = re.search(r"\.(lora_\w+)", name)
        yield found[1] if found else None


@torch.no_grad()
def compare_layouts(config: RunConfig, native: Path, boson: Path) -> tuple[float, float]:
    """Greatest logit difference between the native adapter under PEFT and the boson one added to the weights by hand.

    Returns:
        that difference, and the adapter's own effect on the logits.

    Raises:
        AdapterError: they give other logits.
    """
    family = create_family(config)
    model = family.load(plan_precision("fp32")).eval()
    base_logits, _ = family.probe(model)
    adapted = load_adapter(model, native).eval()
    logits, _ = family.probe(adapted)
    plain = adapted.unload()
    add_by_hand(plain, boson)
    difference = float((family.probe(plain)[0] - logits).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(logits.abs().max())):
        raise AdapterError(f"{native}: logits differ by {difference:.2e} between the two layouts; nothing was written")
    return difference, float((base_logits - logits).abs().max())


def add_by_hand(model: nn.Module, boson: Path) -> None:
    """Add `scale * lora_B @ lora_A` of a boson adapter to a native model's weights, without PEFT's loading."""
    config, tensors = read_config(boson), read_tensors(weights_file(boson))
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    for name, tensor in tensors.items():
        module = lora_module(name)
        if module is None:
            model.get_parameter(rename_key(name.removeprefix(KEY_PREFIX))).copy_(tensor)
        elif name.endswith("lora_A.weight"):
            rank = ranks.get(get_pattern_key(list(ranks), module), config.r)
            alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
            scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            weight = model.get_parameter(rename_key(f"{module}.weight"))
            lora_b = tensors[name.replace("lora_A", "lora_B")]
            weight += (scale * (lora_b.float() @ tensor.float())).to(weight)

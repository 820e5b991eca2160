"""Convert adapters between transformers' own layout of names and that of another package, and prove them equal."""

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from torch import nn

from speechtune.config import RunConfig
from speechtune.errors import AdapterError, ConfigError
from speechtune.export.verify import verify_adapter
from speechtune.families import adapter_layouts, create_family
from speechtune.family import NATIVE
from speechtune.inference.load import model_config, open_adapter
from speechtune.lora.apply import load_adapter
from speechtune.lora.files import (
    CARD_NAME,
    KEY_PREFIX,
    StoredAdapter,
    addition_files,
    lora_module,
    read_tensors,
    write_adapter,
)
from speechtune.lora.layouts import in_layout
from speechtune.precision import plan_precision
from speechtune.storage.verified_folder import write_verified

TOLERANCE = 1e-4  # of the greatest logit: float32 sums in another order


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did; `logit_difference` None when the two layouts were not compared on a base, and why not."""

    output: str
    source_layout: str
    layout: str
    tensors: int
    renamed: int
    target_modules_listed: bool
    logit_difference: float | None
    adapter_effect: float | None
    not_compared: str | None


def convert(adapter: Path, output: Path, to: str, *, base: str | None = None) -> ConvertReport:
    """Write an adapter in another layout, as safetensors; one in that layout already is copied.

    Args:
        adapter: PEFT folder, safetensors or .bin.
        output: a folder that does not exist yet.
        to: the wanted layout: NATIVE, or one that a family offers.
        base: hub id or folder of the base to compare both layouts on; None takes the one the adapter names where that
            is a local folder, and else compares nothing (a conversion downloads no base).

    Raises ConfigError: no such layout; AdapterError: the adapter is damaged, of no known layout, or gives other logits
    after the conversion; CheckpointError: the folder exists or cannot be written.
    """
    layouts = adapter_layouts()
    if to not in (NATIVE, *layouts):
        raise ConfigError(f"--to {to}: no such layout; there are: {', '.join([NATIVE, *layouts])}")
    stored = open_adapter(adapter)
    if stored.layout is None:
        known = " nor the ".join([NATIVE, *layouts])
        hint = stored.layout_hint or f"keys like {min(stored.tensors)}: neither the {known} layout"
        raise AdapterError(f"{stored.directory}: {hint}")
    converted = in_layout(stored, to, layouts)
    if base:
        converted.config.base_model_name_or_path = base
    config, reason = (None, "nothing was renamed") if stored.layout == to else _comparable(stored, base)
    difference = effect = None
    beside = addition_files(stored.directory)
    tensors = {name: tensor for file in beside for name, tensor in read_tensors(file).items()}

    def write(aside: Path) -> None:
        nonlocal difference, effect
        write_adapter(aside, converted.config, converted.tensors)
        if (stored.directory / CARD_NAME).is_file():
            shutil.copyfile(stored.directory / CARD_NAME, aside / CARD_NAME)
        for file in beside:
            shutil.copyfile(file, aside / file.name)
        if issues := verify_adapter(aside, look_up_base=to == NATIVE).issues:
            raise AdapterError(f"{stored.directory}: cannot be converted to {to}: " + "; ".join(issues))
        if config:
            native, other = (converted, stored) if to == NATIVE else (in_layout(stored, NATIVE, layouts), converted)
            difference, effect = _compare_layouts(config, native, other, layouts[str(other.layout)].to_native)

    write_verified(output, write, {**converted.tensors, **tensors})
    old, new = stored.config.target_modules, converted.config.target_modules
    return ConvertReport(
        str(output),
        stored.layout,
        to,
        len(stored.tensors),
        len(converted.tensors.keys() - stored.tensors.keys()),
        isinstance(new, list) and set(new) != set(old or ()),
        difference,
        effect,
        reason,
    )


def _comparable(stored: StoredAdapter, base: str | None) -> tuple[RunConfig | None, str | None]:
    """The base to compare on, or None and the reason; a base that was named by the caller must be usable."""
    named = stored.config.base_model_name_or_path
    parts = {part[1] for name in stored.tensors if (part := re.search(r"\.(lora_\w+)", name))}
    if parts - {"lora_A", "lora_B"}:
        return None, "the comparison knows plain LoRA only, this adapter has other parts"
    if base is None and (named is None or not Path(named).is_dir()):
        return None, f"the base it names ({named}) is no local folder; --base names one"
    try:
        return model_config(base or named, None), None
    except ConfigError as error:
        if base:
            raise
        return None, str(error)


@torch.no_grad()
def _compare_layouts(
    config: RunConfig, native: StoredAdapter, other: StoredAdapter, to_native: Callable[[str], str]
) -> tuple[float, float]:
    """Greatest logit difference between the native adapter under PEFT and the other one added by hand, and its effect.

    The other one goes to the weights without PEFT, so that a mistake in the renaming cannot hide on both sides.
    """
    family = create_family(config)
    model = family.load(plan_precision("fp32")).eval()
    base_logits, _ = family.probe(model)
    adapted = load_adapter(model, native)
    logits, _ = family.probe(adapted)
    plain = adapted.unload()
    _add_by_hand(plain, other, to_native)
    difference = float((family.probe(plain)[0] - logits).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(logits.abs().max())):
        raise AdapterError(
            f"{native.directory}: logits differ by {difference:.2e} between the two layouts; nothing was written"
        )
    return difference, float((base_logits - logits).abs().max())


def _add_by_hand(model: nn.Module, other: StoredAdapter, to_native: Callable[[str], str]) -> None:
    """Add `scale * lora_B @ lora_A` of an adapter of another layout to a native model's weights, without PEFT."""
    config, tensors = other.config, other.tensors
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    for name, tensor in tensors.items():
        module = lora_module(name)
        if module is None:
            model.get_parameter(to_native(name.removeprefix(KEY_PREFIX))).copy_(tensor)
        elif name.endswith("lora_A.weight"):
            rank = ranks.get(get_pattern_key(list(ranks), module), config.r)
            alpha = alphas.get(get_pattern_key(list(alphas), module), config.lora_alpha)
            scale = alpha / (math.sqrt(rank) if config.use_rslora else rank)
            weight = model.get_parameter(to_native(f"{module}.weight"))
            lora_b = tensors[name.replace("lora_A", "lora_B")]
            weight += (scale * (lora_b.float() @ tensor.float())).to(weight)

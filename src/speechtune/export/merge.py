"""Merge an adapter into its base: in float32, compared with base and adapter before anything is written."""

import inspect
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import peft
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from speechtune import __version__
from speechtune.config import RunConfig
from speechtune.errors import AdapterError, CheckpointError
from speechtune.export.verify import training_step
from speechtune.families import create_family
from speechtune.family import NATIVE, Family
from speechtune.lora.additions import addition_state, save_additions
from speechtune.lora.apply import adapter_off, load_adapter, load_base, model_tensors, plain_model
from speechtune.lora.files import StoredAdapter
from speechtune.lora.layouts import in_layout
from speechtune.lora.prompts import PROMPTS_NAME
from speechtune.precision import PrecisionPlan
from speechtune.storage.files import folder_fingerprint
from speechtune.storage.model_folder import load_tokenizer
from speechtune.storage.verified_folder import check_writable, write_verified

log = logging.getLogger("speechtune")

GREEDY_STEPS = 24
TOLERANCE = 1e-5  # of the greatest logit, in float32
MAX_SHARD_SIZE = "5GB"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MERGE_PLAN = PrecisionPlan(
    "fp32", torch.device("cpu"), torch.float32, None, False, "merging in bfloat16 loses the adapter"
)

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Greatest logit differences on a text: what the adapter does, and what merging changed."""

    test_input: str
    adapter_effect: float
    merged_difference: float
    changed_positions: int
    positions: int


@dataclass(frozen=True, slots=True)
class MergeReport:
    """Measured on a fixed input: greatest logit differences, and whether greedy generation agrees."""

    adapter_effect: float
    merged_difference: float
    greedy_equal: bool
    comparison: Comparison | None


def merge(
    config: RunConfig,
    adapter: StoredAdapter,
    output: Path,
    *,
    dtype: Dtype | None = None,
    save_tokenizer: bool = True,
    compare_on: str | None = None,
    max_shard_size: str = MAX_SHARD_SIZE,
) -> MergeReport:
    """Write a full model folder that plain transformers loads.

    Args:
        config: names the base.
        adapter: native, or of a layout that the family offers.
        output: a folder that does not exist yet.
        dtype: of the stored weights; None keeps the base's.
        save_tokenizer: copy tokenizer and processor files too.
        compare_on: a text on which base, base with adapter and merged model are compared besides the fixed input.
        max_shard_size: size of a safetensors file from which the weights are split.

    Raises AdapterError: the adapter does not fit, has no effect, or the merged model answers differently;
    CheckpointError: the folder exists or cannot be written.
    """
    if output.exists():
        raise CheckpointError(f"{output}: exists already; remove it or choose another output folder")
    check_writable(output.parent, 0)
    family = create_family(config)
    base = load_base(family, MERGE_PLAN, adapter)
    stored_dtype = DTYPES[dtype] if dtype else _base_dtype(family.skeleton())  # `base` itself was cast
    count = sum(parameter.numel() for parameter in base.parameters())
    check_writable(output.parent, count * stored_dtype.itemsize)
    facts = _provenance(family, config, base, adapter)
    model = load_adapter(base, in_layout(adapter, NATIVE, family.adapter_layouts))
    family.add_to_base(model, adapter.directory)
    merged, report = _merge_checked(family, model, compare_on, _tokenize(config, compare_on) if compare_on else None)
    merged = cast(Any, merged.to(stored_dtype))
    measured = asdict(report)
    measured["merged_difference_float32"] = measured.pop("merged_difference")
    facts |= {"merged_dtype": str(stored_dtype).removeprefix("torch."), **measured}

    for name in inspect.signature(type(merged).__init__).parameters:  # from_pretrained leaves such arguments there
        vars(merged.generation_config).pop(name, None)

    def write(aside: Path) -> None:
        beside = {place for place, _, _ in addition_state(merged)}
        base = {name: tensor for name, tensor in merged.state_dict().items() if name not in beside}
        merged.save_pretrained(aside, state_dict=base if beside else None, max_shard_size=max_shard_size)
        save_additions(merged, aside)
        if save_tokenizer:
            family.save_assets(aside)
        if (prompts := adapter.directory / PROMPTS_NAME).is_file():
            shutil.copyfile(prompts, aside / PROMPTS_NAME)
        (aside / "merge_info.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    write_verified(output, write, model_tensors(merged))
    moved = "merged into %s: logits differ by %.1e from adapter-on, the adapter moves them by %.2g"
    log.info(moved, output, report.merged_difference, report.adapter_effect)
    return report


def _merge_checked(
    family: Family, model: PeftModel, text: str | None, inputs: Mapping[str, torch.Tensor] | None
) -> tuple[nn.Module, MergeReport]:
    """Merge in place, and compare the merged model with the adapter switched on; also on a text with its token ids."""
    logits, rows = family.probe(model, GREEDY_STEPS)
    on = _text_logits(model, inputs)
    with adapter_off(model):
        effect = float((family.probe(model)[0] - logits).abs().max())
        off = _text_logits(model, inputs)
    if not effect > 0.0:  # also NaN
        raise AdapterError("the adapter changes no logit on its base: nothing to merge")
    _untie(model)
    try:
        merged = cast(nn.Module, model.merge_and_unload()).eval()
    except (RuntimeError, ValueError, NotImplementedError) as error:  # such as lora_bias on a layer without a bias
        raise AdapterError(f"PEFT cannot merge this adapter, which can be used unmerged: {error}") from None
    merged_logits, merged_rows = family.probe(merged, GREEDY_STEPS)
    difference = float((merged_logits - logits).abs().max())
    scale = float(logits.abs().max())
    equal = bool(np.array_equal(rows, merged_rows))
    if not difference <= TOLERANCE * max(1.0, scale) or not equal:
        raise AdapterError(
            f"the merged model answers differently: logits by {difference:.2e} (scale {scale:.2g}), greedy "
            f"output {'equal' if equal else 'different'}; nothing was written"
        )
    comparison = None
    if text:
        then = _text_logits(merged, inputs)
        changed = int((on.argmax(-1) != off.argmax(-1)).sum())
        differences = float((on - off).abs().max()), float((then - on).abs().max())
        comparison = Comparison(text, *differences, changed, on[..., 0].numel())
    return merged, MergeReport(effect, difference, equal, comparison)


def _untie(model: PeftModel) -> None:
    """Give the head a weight of its own where it shares the embedding's and the adapter changes one of the two."""
    plain = cast(Any, plain_model(model))
    ends = [plain.get_input_embeddings(), plain.get_output_embeddings()]
    if not any(isinstance(end, LoraLayer) for end in ends):
        return
    embedding, head = (cast(Any, end.get_base_layer()) if isinstance(end, LoraLayer) else end for end in ends)
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        plain.config.tie_word_embeddings = False


def _tokenize(config: RunConfig, text: str) -> dict[str, torch.Tensor]:
    """Token ids and mask of a text."""
    encoded = load_tokenizer(config.model, config.model.revision)(text, return_tensors="pt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def _text_logits(model: Callable[..., Any], inputs: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    """Logits (1, S, V) of a text; empty for none."""
    return model(**inputs).logits.float() if inputs else torch.empty(0)


def _provenance(family: Family, config: RunConfig, base: nn.Module, adapter: StoredAdapter) -> dict[str, Any]:
    """What a merged model was made of: base and its parts by revision or content, adapter by content, versions."""
    folder = Path(config.model.path)
    parts: dict[str, Any] = {}
    for part, (path, revision) in family.parts.items():
        content = folder_fingerprint(Path(path)) if Path(path).is_dir() else None
        parts |= {f"{part}_path": path, f"{part}_revision": revision, f"{part}_sha256": content}
    return {
        "base_model_path": config.model.path,
        "base_revision": config.model.revision or getattr(cast(Any, base).config, "_commit_hash", None),
        "base_sha256": folder_fingerprint(folder) if folder.is_dir() else None,
        "lora_adapter_path": str(adapter.directory),
        "lora_adapter_sha256": adapter.sha256["weights"],
        "lora_config_sha256": adapter.sha256["config"],
        "lora_strength": adapter.strength,
        "lora_step": training_step(adapter.directory),
        "base_prepared": family.recipe(),
        **parts,
        "versions": {
            "speechtune": __version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "torch": torch.__version__,
        },
    }


def _base_dtype(skeleton: torch.nn.Module) -> torch.dtype:
    stored = getattr(cast(Any, skeleton).config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32

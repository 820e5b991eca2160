"""Merge an adapter into its base: in float32, compared with the adapter before anything is published."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import peft
import torch
import transformers
from peft import PeftModel

from speechtune import __version__
from speechtune.adapter import WEIGHTS_NAME, load_adapter
from speechtune.checkpoint import write_verified
from speechtune.config import RunConfig
from speechtune.errors import AdapterError
from speechtune.families import create_family
from speechtune.fingerprint import file_sha256
from speechtune.precision import PrecisionPlan

log = logging.getLogger("speechtune")

GREEDY_STEPS = 24
TOLERANCE = 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class MergeReport:
    """Measured on a fixed input: greatest logit differences, and whether greedy generation agrees."""

    adapter_effect: float
    merged_difference: float
    greedy_equal: bool
    output: Path


def merge(
    config: RunConfig,
    adapter: Path,
    output: Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    save_tokenizer: bool = True,
) -> MergeReport:
    """Write a full model folder that plain transformers loads.

    Args:
        config: names the base.
        adapter: PEFT folder.
        output: a folder that does not exist yet.
        dtype: of the stored weights; None keeps the base's.
        save_tokenizer: copy tokenizer and processor files too.

    Raises:
        AdapterError: the adapter has no effect, or the merged model answers differently.
        CheckpointError: the folder exists or cannot be written.
    """
    family = create_family(config)
    cpu = torch.device("cpu")
    base = family.load(PrecisionPlan("fp32", cpu, torch.float32, None, False, "merging in bfloat16 loses the adapter"))
    stored_dtype = DTYPES[dtype] if dtype else _base_dtype(base)
    model = load_adapter(base, adapter).eval()
    logits, rows = family.probe(model, GREEDY_STEPS)
    with model.disable_adapter():
        effect = float((family.probe(model)[0] - logits).abs().max())
    if effect == 0.0:
        raise AdapterError(f"{adapter}: the adapter changes no logit on the base {config.model.path}; nothing to merge")
    merged = cast(PeftModel, model).merge_and_unload().eval()
    merged_logits, merged_rows = family.probe(merged, GREEDY_STEPS)
    difference = float((merged_logits - logits).abs().max())
    scale = float(logits.abs().max())
    equal = bool((rows == merged_rows).all()) if rows.shape == merged_rows.shape else False
    if difference > TOLERANCE * max(1.0, scale) or not equal:
        raise AdapterError(
            f"{adapter}: the merged model answers differently: logits by {difference:.2e} (scale {scale:.2g}), greedy "
            f"output {'equal' if equal else 'different'}; nothing was written"
        )
    merged = cast(Any, merged.to(stored_dtype))
    info = {
        "base_model_path": config.model.path,
        "base_revision": config.model.revision,
        "lora_adapter_path": str(adapter),
        "lora_adapter_sha256": file_sha256(adapter / WEIGHTS_NAME),
        "codec_path": config.model.codec_path,
        "merged_dtype": str(stored_dtype).removeprefix("torch."),
        "adapter_effect": effect,
        "merged_difference_float32": difference,
        "greedy_equal": equal,
        "versions": {
            "speechtune": __version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "torch": torch.__version__,
        },
    }

    def write(aside: Path) -> None:
        merged.save_pretrained(aside)
        if save_tokenizer:
            family.save_assets(aside)
        (aside / "merge_info.json").write_text(json.dumps(info, indent=1) + "\n", encoding="utf-8")

    write_verified(output, write, merged.state_dict())
    log.info(
        "merged into %s: logits differ by %.1e from adapter-on, the adapter moves them by %.2g",
        output,
        difference,
        effect,
    )
    return MergeReport(effect, difference, equal, output)


def _base_dtype(base: torch.nn.Module) -> torch.dtype:
    stored = getattr(cast(Any, base).config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32

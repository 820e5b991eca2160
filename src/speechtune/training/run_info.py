"""Provenance of a run (versions, hardware, base, data, parameters, command line), and the adapter's model card."""

import importlib.metadata
import os
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import EvalResult, ModelCardData

from speechtune import __version__
from speechtune.cache.encoded_set import EncodedSet
from speechtune.config import RunConfig, world_size
from speechtune.family import Family
from speechtune.lora.apply import ComponentCount
from speechtune.precision import PrecisionPlan

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "soundfile", "soxr")
INFO_NAME = "run_info.json"


def run_info(
    config: RunConfig,
    plan: PrecisionPlan,
    base_fingerprint: str,
    components: Sequence[ComponentCount],
    train_set: EncodedSet,
    eval_set: EncodedSet | None,
) -> dict[str, Any]:
    """The content of run_info.json."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    base = {"path": config.model.path, "revision": config.model.revision, "fingerprint": base_fingerprint}
    return {
        "speechtune": __version__,
        "versions": {"python": platform.python_version(), **versions},
        "hardware": hardware(plan.device),
        "precision": plan.describe(),
        "base": base,
        "data": describe_data(train_set, eval_set),
        "parameters": [asdict(row) for row in components],
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "world_size": world_size(),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """The device a run takes place on, and the machine around it; memory in bytes."""
    on_gpu = device.type == "cuda"
    memory, cpu = psutil.virtual_memory().total, platform.processor() or platform.machine()
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if on_gpu else cpu,
        "count": torch.cuda.device_count() if on_gpu else 1,
        "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else memory,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": memory,
    }


def describe_data(train_set: EncodedSet, eval_set: EncodedSet | None) -> dict[str, Any]:
    """Counts of the training set, its hours by target audio, and how many samples are held back for evaluation."""
    samples = train_set.samples
    return {
        "fingerprint": train_set.fingerprint,
        "samples": len(samples),
        "hours": round(train_set.audio_seconds / 3600, 4),
        "positions": int(train_set.lengths.sum()),
        "speakers": len({sample.speaker for sample in samples}),
        "languages": dict(Counter(sample.language or "(not given)" for sample in samples).most_common()),
        "eval_samples": len(eval_set) if eval_set is not None else 0,
    }


def model_card(
    config: RunConfig, family: Family, train_set: EncodedSet, scores: Mapping[str, float] | None = None
) -> str:
    """The text of README.md; `scores` are those of the run's last (or best) evaluation by name."""
    base, lora, data = config.model.path, config.lora, describe_data(train_set, None)
    rows = [f"| {name} | {value:.4g} |" for name, value in (scores or {}).items()]
    table = "\n".join(["| figure | value |", "|---|---|", *rows])
    return f"""---
{_metadata(config, family, scores or {}).to_yaml()}
---
# LoRA adapter for {Path(base).name if Path(base).exists() else base}

Trained with speechtune {__version__} on {data["samples"]} samples ({data["hours"]:.2f} h, \
{data["speakers"]} speakers): rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, \
targets `{lora.targets}`, learning rate {config.train.learning_rate:g}, seed {config.train.seed}.

Load it with `PeftModel.from_pretrained(base, folder)`. {family.card_note}

## Evaluation

{table if rows else "No evaluation was made in this run."}

## Use

{family.card_use} The licence of the base model holds for this adapter too.
"""


def _metadata(config: RunConfig, family: Family, scores: Mapping[str, float]) -> ModelCardData:
    """The metadata block; a base in a local folder is not named, for nobody else could find it."""
    base, data = config.model.path, config.data
    name = data.eval.name if data.eval else "held out from the training data"
    results = [
        EvalResult(
            task_type=family.pipeline_tag,
            dataset_type="custom",
            dataset_name=name,
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for metric, value in scores.items()
    ]
    return ModelCardData(
        base_model=None if Path(base).exists() else base,
        library_name="peft",
        license=family.base_license,
        pipeline_tag=family.pipeline_tag,
        tags=["lora", "speechtune"],
        model_name=config.output_dir.name,
        eval_results=results or None,
        ignore_metadata_errors=False,
    )

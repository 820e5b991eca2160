"""What a run was made of, written down at its start: versions, hardware, base, data, parameters, command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import torch

from speechtune import __version__
from speechtune.adapter import TowerCount
from speechtune.cache import EncodedSet
from speechtune.config import RunConfig, world_size
from speechtune.precision import PrecisionPlan

PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy", "soundfile", "soxr")
INFO_NAME = "run_info.json"


def run_info(
    config: RunConfig,
    plan: PrecisionPlan,
    identity: Mapping[str, Any],
    towers: Sequence[TowerCount],
    train_set: EncodedSet,
    eval_set: EncodedSet | None,
) -> dict[str, Any]:
    """All of it as one plain dict."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    base = {"path": config.model.path, "revision": config.model.revision, "fingerprint": identity["base"]}
    return {
        "speechtune": __version__,
        "versions": {"python": platform.python_version(), **versions},
        "hardware": hardware(plan.device),
        "precision": plan.describe(),
        "base": base,
        "data": describe_data(train_set, eval_set),
        "parameters": [asdict(row) for row in towers],
        "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "world_size": world_size(),
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """The device a run takes place on, and the machine around it; memory in bytes."""
    on_gpu = device.type == "cuda"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine(),
        "count": torch.cuda.device_count() if on_gpu else 1,
        "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else memory,
        "cpu": platform.processor() or platform.machine(),
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

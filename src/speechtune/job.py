"""What a run of the loop needs, and what it yields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from speechtune.cache import EncodedSet
from speechtune.config import RunConfig
from speechtune.families.base import Family
from speechtune.listening import Listener
from speechtune.precision import PrecisionPlan
from speechtune.saving import RunState


@dataclass(frozen=True)
class Job:
    """All that a run needs, loaded and checked; `identity` is what a resume must find unchanged, `notes` are the
    texts (by file name) that lie beside a saved adapter."""

    config: RunConfig
    family: Family
    model: nn.Module
    precision: PrecisionPlan
    train_set: EncodedSet
    eval_set: EncodedSet | None
    identity: Mapping[str, Any]
    notes: Mapping[str, str]
    listener: Listener | None = None


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Outcome of a run.

    Attributes:
        signal: number of the signal that ended it early, or None.
        scores: of the evaluation that the final adapter stands for; empty without one.
        time: seconds of this launch by what they went into, `total_seconds` in all.
    """

    state: RunState
    first_losses: Mapping[str, float]
    seconds: float
    signal: int | None
    best_checkpoint: Path | None
    scores: Mapping[str, float]
    time: Mapping[str, float]

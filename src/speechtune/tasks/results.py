"""Results of an evaluation as JSON: one file of figures, one of rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechtune.errors import CheckpointError
from speechtune.storage.files import write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

METRICS_NAME = "metrics.json"
UTTERANCES_NAME = "utterances.jsonl"


def to_json(result: DataclassInstance) -> dict[str, Any]:
    """A result dataclass as a plain dict; see `strict_json`.

    Raises TypeError: not a dataclass instance.
    """
    return strict_json(asdict(result))


def strict_json(value: Any) -> Any:
    """A value for `json.dumps`: None for NaN and infinity, lists for tuples, texts as keys."""
    if isinstance(value, Mapping):
        return {str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def write_results(figures: Mapping[str, Any], rows: Sequence[DataclassInstance], directory: Path) -> tuple[Path, Path]:
    """Write `metrics.json` and `utterances.jsonl` (one row per line).

    Raises CheckpointError: a file could not be written.
    """
    metrics = json.dumps(figures, ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    lines = (json.dumps(to_json(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    paths = directory / METRICS_NAME, directory / UTTERANCES_NAME
    for path, text in zip(paths, (metrics, "".join(lines)), strict=True):
        try:
            # half of a surrogate pair in an answer is no UTF-8; as "\udXXX" it is still JSON
            write_atomically(path, text.encode(errors="backslashreplace"))
        except OSError as error:
            raise CheckpointError(
                f"{path}: the evaluation could not be written ({error.strerror or error}); free the disk, or name "
                "another folder that you may write to"
            ) from error
    return paths

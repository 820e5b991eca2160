"""Results of an evaluation as JSON: one file of figures, one of rows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from speechtune.errors import CheckpointError
from speechtune.storage.atomic_file import write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

METRICS_NAME = "metrics.json"
UTTERANCES_NAME = "utterances.jsonl"


class Report(Protocol):
    """The result of an evaluation: its figures as plain values, and one dataclass per utterance."""

    @property
    def rows(self) -> Sequence[DataclassInstance]:
        """One dataclass per utterance."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Everything but the rows."""
        ...


def to_json(result: DataclassInstance) -> dict[str, Any]:
    """A result dataclass as a plain dict for `json.dumps`: NaN, which JSON does not have, becomes None.

    Raises:
        TypeError: not a dataclass instance.
    """
    return _plain(asdict(result))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def write_results(report: Report, directory: Path) -> tuple[Path, Path]:
    """Write `metrics.json` and `utterances.jsonl` (one row per line).

    Raises:
        CheckpointError: a file could not be written.
    """
    figures = json.dumps(report.to_json(), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    lines = (json.dumps(to_json(row), ensure_ascii=False, allow_nan=False) + "\n" for row in report.rows)
    paths = directory / METRICS_NAME, directory / UTTERANCES_NAME
    for path, text in zip(paths, (figures, "".join(lines)), strict=True):
        try:
            # half of a surrogate pair in an answer is no UTF-8; as "\udXXX" it is still JSON
            write_atomically(path, text.encode(errors="backslashreplace"))
        except OSError as error:
            raise CheckpointError(
                f"{path}: the evaluation could not be written ({error.strerror or error}); free the disk, or name "
                "another folder that you may write to"
            ) from error
    return paths

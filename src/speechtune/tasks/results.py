"""Results of an evaluation on disk: one file of figures, one of rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from speechtune.errors import CheckpointError
from speechtune.storage.atomic_file import write_atomically
from speechtune.tasks import statistics

METRICS_NAME = "metrics.json"
UTTERANCES_NAME = "utterances.jsonl"


class Report(Protocol):
    """What an evaluation found: its figures as plain values, and one dataclass per utterance."""

    @property
    def rows(self) -> Sequence[object]:
        """One dataclass per utterance."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Everything but the rows."""
        ...


def write_evaluation(report: Report, directory: Path) -> tuple[Path, Path]:
    """Write `metrics.json` and `utterances.jsonl` (one row per line).

    Raises:
        CheckpointError: a file could not be written.
    """
    figures = json.dumps(report.to_json(), ensure_ascii=False, indent=2, allow_nan=False) + "\n"
    lines = (json.dumps(statistics.to_json(row), ensure_ascii=False, allow_nan=False) + "\n" for row in report.rows)
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

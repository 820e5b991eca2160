"""Results: rows of repeated measurements, the thresholds they are held to, and the table and JSON made of them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from speechtune import __version__

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy")
FILE_WIDTH = 160


@dataclass(frozen=True)
class Threshold:
    """What the median of a row must reach or must not pass."""

    least: float | None = None
    most: float | None = None

    def holds(self, values: Sequence[float]) -> bool:
        """Whether the median is within; without values, or with NaN among them, it is not."""
        if not values or any(value != value for value in values):
            return False
        middle = median(values)
        return (self.least is None or middle >= self.least) and (self.most is None or middle <= self.most)

    def __str__(self) -> str:
        bounds = [f">= {self.least:g}"] if self.least is not None else []
        return " and ".join([*bounds, *([f"<= {self.most:g}"] if self.most is not None else [])])


@dataclass(frozen=True)
class Row:
    """One thing measured, several times."""

    bench: str
    what: str
    values: Sequence[float]
    threshold: Threshold | None = None

    @property
    def holds(self) -> bool:
        return self.threshold is None or self.threshold.holds(self.values)

    def summary(self) -> dict[str, Any]:
        """The row as JSON."""
        found: dict[str, Any] = {"bench": self.bench, "what": self.what, "values": list(self.values)}
        if self.values:
            found |= {"median": median(self.values), "least": min(self.values), "greatest": max(self.values)}
        if self.threshold is not None:
            found |= {"threshold": str(self.threshold), "holds": self.holds}
        return found


def make_rows(bench: str, measured: Mapping[str, Sequence[float]], thresholds: Mapping[str, Threshold]) -> list[Row]:
    """Rows of one bench; a threshold whose row was not measured makes an empty row, which does not hold."""
    rows = [Row(bench, what, values, thresholds.get(what)) for what, values in measured.items()]
    return rows + [Row(bench, what, (), limit) for what, limit in thresholds.items() if what not in measured]


def print_rows(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the table."""
    table = Table("bench", "measured", "median", "least", "greatest", "runs", "wanted", "holds")
    for row in rows:
        numbers = (median(row.values), min(row.values), max(row.values)) if row.values else (float("nan"),) * 3
        wanted, holds = ("", "") if row.threshold is None else (str(row.threshold), "yes" if row.holds else "NO")
        table.add_row(row.bench, row.what, *map(shown, numbers), str(len(row.values)), wanted, holds)
    console = console or Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(table)


def shown(number: float) -> str:
    """Three digits that count, and no exponent for what is a plain number."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def machine() -> dict[str, Any]:
    """What the figures were measured on, and with."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {"speechtune": __version__, **{name: version(name) for name in PACKAGES}},
    }


def cpu_model() -> str:
    """Name of the processor, as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_results(rows: Sequence[Row], path: Path) -> None:
    """Write all of it as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine(), "rows": [row.summary() for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

"""All benches: a table of medians and spreads, and `bench/results/latest.json`; timings are ratios to a named peer."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import save
from rich.console import Console
from rich.table import Table

BENCHES = {"save of a 500 MB adapter": save.measure}


def main() -> None:
    """Run every bench."""
    table = Table("bench", "measured", "median", "least", "greatest", "pairs")
    results = {name: measure() for name, measure in BENCHES.items()}
    for name, rows in results.items():
        for what, values in rows.items():
            numbers = (statistics.median(values), min(values), max(values))
            table.add_row(name, what, *(f"{number:.3g}" for number in numbers), str(len(values)))
    Console().print(table)
    folder = Path(__file__).with_name("results")
    folder.mkdir(exist_ok=True)
    (folder / "latest.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

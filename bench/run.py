"""All benches: one table of medians and spreads, `bench/results/latest.json`, exit code 1 where a threshold is missed.

    python bench/run.py [--only training,save] [--quick] [--json FILE]

Timings are ratios to a named peer in the same run wherever there is one. `bench/evaluate.py`, `bench/scorers.py` and
`bench/gpu.py` have command lines of their own: they take minutes, and what is not installed with the toolkit.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from table import Row, Threshold, make_rows, print_rows, write_results

from speechtune.commands.guarded import limit_kernel_caches

RESULTS = Path(__file__).with_name("results")
QUICK_PAIRS = 2
MOST_MIB = 1.5e9 / 2**20


@dataclass(frozen=True)
class Bench:
    """A module with `measure() -> dict[str, list[float]]`, and what some of its rows must reach."""

    title: str
    thresholds: Mapping[str, Threshold] = field(default_factory=dict)
    usual: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `measure`."""
    quick: Mapping[str, Any] = field(default_factory=lambda: {"pairs": QUICK_PAIRS})
    """Arguments with --quick."""


BENCHES: dict[str, Bench] = {
    "startup": Bench("start-up", {"speechtune --help, CPU seconds": Threshold(most=0.4)}),
    "data_path": Bench("data path, second epoch on", {"codec in the loop / cached codes, time": Threshold(least=10)}),
    "encode": Bench(
        "encoding",
        {
            "released shape: native / ours": Threshold(least=2.0),
            "released shape: share of codes that differ": Threshold(most=1e-3),
            "released shape, short clips: share of codes that differ": Threshold(most=1e-3),
            "small: share of codes that differ": Threshold(most=1e-3),
        },
    ),
    "save": Bench(
        "saving",
        {
            "verified / plain": Threshold(most=1.1),
            "training waits / plain": Threshold(most=1.1),
            "checkpoint: verified / plain": Threshold(most=1.1),
            "checkpoint: training waits / plain": Threshold(most=1.1),
        },
    ),
    "memory": Bench("peak memory", {}),
    "products": Bench("products on a CPU", {}),
    "training": Bench(
        "training",
        {"mixed lengths: ours / peer": Threshold(least=2.0), "equal lengths: ours / peer": Threshold(least=1.1)},
    ),
    "curves": Bench("cost of training", {}),
    "scale": Bench(
        "cost of many samples",
        {
            "1000000 rows: encode everything, MiB": Threshold(most=MOST_MIB),
            "1000000 rows: validate, MiB": Threshold(most=MOST_MIB),
            "1000000 rows: first batch, MiB": Threshold(most=MOST_MIB),
            "validate, bytes a further row: last / before": Threshold(most=1.2),
            "first batch, bytes a further row: last / before": Threshold(most=1.2),
        },
        quick={"sizes": (1_000,)},
    ),
}


def run(name: str, *, quick: bool) -> list[Row]:
    """Measure one bench."""
    bench, threads = BENCHES[name], torch.get_num_threads()
    measured = importlib.import_module(name).measure(**(bench.quick if quick else bench.usual))
    torch.set_num_threads(threads)  # a bench may set them
    thresholds = {what: limit for what, limit in bench.thresholds.items() if what in measured or not quick}
    return make_rows(bench.title, measured, thresholds)


def main() -> int:
    """Run the benches asked for."""
    limit_kernel_caches()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"comma-separated, of: {', '.join(BENCHES)}")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_PAIRS} pairs of each: to try it, not to quote it")
    parser.add_argument("--json", type=Path, default=RESULTS / "latest.json", help="where the results go")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(BENCHES)
    unknown = sorted(set(names) - set(BENCHES))
    if unknown:
        parser.error(f"no bench {unknown[0]!r}")
    rows: list[Row] = []
    for name in names:
        if importlib.util.find_spec(name) is None:
            print(f"{name}: not in this tree, left out")
            continue
        print(f"{name} ...", flush=True)
        rows += run(name, quick=options.quick)
        write_results(rows, options.json)  # after each: what was measured survives a stop
    print_rows(rows)
    missed = [row for row in rows if not row.holds]
    for row in missed:
        print(f"missed: {row.bench}, {row.what}: wanted {row.threshold}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())

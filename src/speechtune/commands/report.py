"""`speechtune report`: write the report of one run or several, and name the files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from speechtune.report.facts import to_json
from speechtune.report.write import write_report


def run_report(runs: Sequence[Path], out: Path | None = None, as_json: bool = False) -> int:
    """Write report.html and, beside it, report.md on one run or several, and name them; 0.

    Args:
        runs: run directories, finished or not.
        out: the HTML file, or a folder for it; by default the run's own folder, for several runs the current one.
        as_json: print the facts as one JSON object.

    Raises:
        ConfigError: a folder is no run, or `out` has another ending than .html.
    """
    reports, path = write_report(runs, out)
    text_path = path.with_suffix(".md")
    if as_json:
        facts = {"html": str(path), "markdown": str(text_path), "runs": [to_json(report) for report in reports]}
        print(json.dumps(facts, ensure_ascii=True, allow_nan=False, default=str))
    else:
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)\n{text_path}")
        for report in reports:
            for line in report.missing:
                print(f"{report.name}: {line}")
    return 0

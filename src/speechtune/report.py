"""`speechtune report`: what a run was and what came of it, as one page that opens without a network."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from speechtune.errors import ConfigError
from speechtune.report_data import RunReport, read_run, short_names
from speechtune.report_facts import to_json
from speechtune.report_html import page
from speechtune.report_markdown import markdown


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


def write_report(runs: Sequence[Path], out: Path | None = None) -> tuple[list[RunReport], Path]:
    """Write both files, as `run_report` says; what was read, and where the page is."""
    reports = [read_run(run, name) for run, name in zip(runs, short_names(runs), strict=True)]
    path = _destination([report.directory for report in reports], out)
    _write(path, page(reports))
    _write(path.with_suffix(".md"), markdown(reports))
    return reports, path


def _destination(directories: Sequence[Path], out: Path | None) -> Path:
    if out is None:
        return (directories[0] if len(directories) == 1 else Path()) / "report.html"
    if out.is_dir() or not out.suffix:
        return out / "report.html"
    if out.suffix.lower() not in {".html", ".htm"}:
        raise ConfigError(f"--out {out}: name a file that ends in .html, or a folder; Markdown is written beside it")
    return out


def _write(path: Path, content: str) -> None:
    """Put the file in place at once: whoever has the old one open must never read half of a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    try:
        aside.write_text(content, encoding="utf-8", errors="replace")  # a text may hold half of a surrogate pair
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)

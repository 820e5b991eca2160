"""Write the report of one run, or of several side by side: one HTML page that needs no network, and Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from speechtune.errors import ConfigError
from speechtune.report.html import page
from speechtune.report.markdown import markdown
from speechtune.report.read_run import RunReport, read_run, short_names
from speechtune.storage.atomic_file import write_atomically


def write_report(runs: Sequence[Path], out: Path | None = None) -> tuple[list[RunReport], Path]:
    """Write both files, as `run_report` says; what was read, and where the page is."""
    reports = [read_run(run, name) for run, name in zip(runs, short_names(runs), strict=True)]
    path = _destination([report.directory for report in reports], out)
    for file, text in ((path, page(reports)), (path.with_suffix(".md"), markdown(reports))):
        write_atomically(file, text.encode(errors="replace"))  # a text may hold half of a surrogate pair
    return reports, path


def _destination(directories: Sequence[Path], out: Path | None) -> Path:
    if out is None:
        return (directories[0] if len(directories) == 1 else Path()) / "report.html"
    if out.is_dir() or not out.suffix:
        return out / "report.html"
    if out.suffix.lower() not in {".html", ".htm"}:
        raise ConfigError(f"--out {out}: name a file that ends in .html, or a folder; Markdown is written beside it")
    return out

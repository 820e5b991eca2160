"""`speechtune report`: write the report of one run or several, and name the files."""

from collections.abc import Sequence
from pathlib import Path

from speechtune.commands import print_result
from speechtune.errors import ConfigError
from speechtune.report.facts import to_json
from speechtune.report.read_run import RunReport, read_run, short_names
from speechtune.report.render import markdown, page
from speechtune.storage.files import write_atomically


def run_report(runs: Sequence[Path], out: Path | None = None, as_json: bool = False) -> int:
    """Write the report of one run or several, and name the files or, with `as_json`, print the facts; 0."""
    reports, path = write_report(runs, out)
    text_path = path.with_suffix(".md")
    facts = {"html": path, "markdown": text_path, "runs": [to_json(report) for report in reports]}
    missing = [f"{report.name}: {line}" for report in reports for line in report.missing]
    return print_result(facts, [f"{path} ({path.stat().st_size / 1e6:.1f} MB)", str(text_path), *missing], as_json)


def write_report(runs: Sequence[Path], out: Path | None = None) -> tuple[list[RunReport], Path]:
    """Write report.html and, beside it, report.md; what was read, and where the page is.

    `out` is the HTML file or a folder for it; by default the run's own folder, for several runs the current one.
    """
    reports = [read_run(run, name) for run, name in zip(runs, short_names(runs), strict=True)]
    path = out or (runs[0] if len(runs) == 1 else Path()) / "report.html"
    if path.is_dir() or not path.suffix:
        path = path / "report.html"
    if path.suffix.lower() not in {".html", ".htm"}:
        raise ConfigError(f"--out {path}: name a file that ends in .html, or a folder; Markdown is written beside it")
    for file, text in ((path, page(reports)), (path.with_suffix(".md"), markdown(reports))):
        write_atomically(file, text.encode(errors="replace"))  # a text may hold half of a surrogate pair
    return reports, path

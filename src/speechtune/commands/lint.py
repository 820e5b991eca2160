"""`speechtune lint`: find issues in training scripts, and with `--fix` fix the clear ones."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

from speechtune.commands import print_json, wide_console
from speechtune.lint.lint import lint_paths


def run_lint(paths: Sequence[Path], fix: bool = False, as_json: bool = False) -> int:
    """Print the issues, fixed where `fix` says so; 1 where errors are left (notes do not count), else 0."""
    reports = lint_paths(paths, fix=fix)
    left = [issue for report in reports for issue in report.left]
    errors = sum(issue.severity == "error" for issue in left)
    if as_json:
        values = {
            "num_files": len(reports),
            "issues": [asdict(issue) for issue in left],
            "fixed": [asdict(issue) for report in reports for issue in report.fixed],
            "backups": {report.path: report.backup for report in reports if report.fixed},
        }
        print_json(values)
        return 1 if errors else 0
    console = wide_console()
    for report in [report for report in reports if report.fixed]:
        codes = ", ".join(issue.code for issue in report.fixed)
        console.print(Text(f"{report.path}: fixed {codes}; the original is {report.backup}\n{report.diff}"))
        console.print(Text(f"{report.path}: confirmed: read again, it compiles, and what was fixed is no longer found"))
    if left:
        table = Table(Column("where", overflow="fold"), "code", "issue", "--fix")
        for issue in left:
            code = issue.code if issue.severity == "error" else f"{issue.code} note"
            table.add_row(*map(Text, (issue.source, code, issue.message, "yes" if issue.fixable else "")))
        console.print(table)
    summary = f"{len(reports)} file(s): {errors} error(s), {len(left) - errors} note(s)"
    console.print(Text(summary, style="bold red" if errors else "green"))
    return 1 if errors else 0

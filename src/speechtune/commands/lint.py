"""`speechtune lint`: find faults in training scripts, and with `--fix` repair the clear ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from speechtune.lint.lint import FixReport, fix_or_lint, lint_paths, scripts_in


def run_lint(paths: Sequence[Path], fix: bool = False, as_json: bool = False) -> int:
    """Print the findings, mended where `fix` says so; 1 where faults are left (notes do not count), else 0.

    Raises:
        ConfigError: as `lint_paths` and `fix`.
    """
    lint_paths(paths)  # before the first file is changed, all are known to be readable
    reports = [fix_or_lint(path, fix) for path in scripts_in(paths)]
    findings = [finding for report in reports for finding in report.left]
    errors = [finding for finding in findings if finding.severity == "error"]
    if as_json:
        changed = [report for report in reports if report.fixed]
        values = {
            "num_files": len(reports),
            "findings": [asdict(finding) for finding in findings],
            "fixed": [asdict(finding) for report in changed for finding in report.fixed],
            "backups": {report.path: report.backup for report in changed},
        }
        print(json.dumps(values, ensure_ascii=False))
    else:
        _print_reports(reports, Console())
    return 1 if errors else 0


def _print_reports(reports: Sequence[FixReport], console: Console) -> None:
    for report in [report for report in reports if report.fixed]:
        codes = ", ".join(finding.code for finding in report.fixed)
        console.print(Text(f"{report.path}: mended {codes}; the original is {report.backup}\n{report.diff}"))
    findings = [finding for report in reports for finding in report.left]
    if findings:
        table = Table(Column("where", overflow="fold"), "code", "finding", "--fix")
        for found in findings:
            where = f"{found.path}:{found.line}:{found.column}"
            code = found.code if found.severity == "error" else f"{found.code} note"
            table.add_row(*map(Text, (where, code, found.message, "yes" if found.fixable else "")))
        console.print(table)
    errors = sum(finding.severity == "error" for finding in findings)
    summary = f"{len(reports)} file(s): {errors} fault(s), {len(findings) - errors} note(s)"
    console.print(Text(summary, style="bold red" if errors else "green"))

"""What happens to invalid rows: the run stops, or they are set aside in a file and the rest is used."""

import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from speechtune.config import DataConfig
from speechtune.data.row_parser import ReadResult
from speechtune.data.rows import UNREADABLE_REST, Row
from speechtune.errors import Issue, ManifestError
from speechtune.types import Sample

logger = logging.getLogger("speechtune")

_ISSUES_SHOWN = 20


def require_valid(path: Path, result: ReadResult) -> list[Sample]:
    """The samples of a file without issues."""
    if result.issues:
        raise _error(f"{path}: {len(result.issues)} issue(s) in its rows", result.issues)
    return result.samples


def keep_valid(
    path: Path,
    result: ReadResult,
    audio_issues: Sequence[Issue],
    config: DataConfig,
    quarantine_dir: Path | None,
    rows: Iterable[Row],
) -> list[Sample]:
    """The samples without issues: all of them, or with `config.on_error` "quarantine" what is left of them.

    The quarantine file gets the contents of the invalid ones among `rows`, which are read only when there are any;
    an issue of no row is looked up by its source.
    """
    issues = sorted([*result.issues, *audio_issues], key=lambda issue: issue.row)
    for note in result.notes:
        logger.warning("%s: %s", path, note)
    if not issues:
        return result.samples
    bad_rows = {issue.row for issue in issues if issue.row}
    kept = [sample for sample in result.samples if sample.row not in bad_rows]
    num_bad = result.num_rows - len(kept)
    head = f"{path}: {len(issues)} issue(s) in {num_bad} of {result.num_rows} rows"
    if config.on_error == "fail":
        raise _error(f"{head}; fix them (`speechtune validate` lists all), or set data.on_error=quarantine", issues)
    folder = quarantine_dir or (path if path.is_dir() else path.parent)
    target = folder / f"quarantine-{path.resolve().stem}.jsonl"
    try:
        _write_quarantine(target, rows, issues)
    except OSError as error:
        raise _error(f"{head}; the quarantine file {target} cannot be written: {error.strerror}", issues) from None
    if any(issue.code == UNREADABLE_REST for issue in issues):
        raise _error(f"{head}; the file breaks off, so the number of rows is unknown", issues)
    share = num_bad / max(result.num_rows, 1)
    if share > config.quarantine_limit:
        limit = f"{share:.1%} exceeds data.quarantine_limit ({config.quarantine_limit:.1%})"
        raise _error(f"{head}; {limit}; see {target}", issues)
    if not kept:
        raise _error(f"{head}; no sample is left; see {target}", issues)
    logger.warning("QUARANTINE: %s; %d samples are left; see %s", head, len(kept), target)
    return kept


def _error(head: str, issues: list[Issue]) -> ManifestError:
    lines = [f"  {issue}" for issue in issues[:_ISSUES_SHOWN]]
    if len(issues) > _ISSUES_SHOWN:
        lines.append(f"  ... and {len(issues) - _ISSUES_SHOWN} more")
    return ManifestError("\n".join([head, *lines]), tuple(issues))


def _write_quarantine(target: Path, rows: Iterable[Row], issues: list[Issue]) -> None:
    """Append the invalid rows as they stand in the manifest; a rerun adds only what is new."""
    by_row: defaultdict[int | str, list[Issue]] = defaultdict(list)
    for issue in issues:
        by_row[issue.row or issue.source].append(issue)
    target.parent.mkdir(parents=True, exist_ok=True)
    known = set(target.read_text(encoding="utf-8").splitlines()) if target.exists() else set()
    lines: list[str] = []
    for row in rows:
        own = by_row.get(row.number or row.source)
        if not own:
            continue
        record: dict[str, Any] = {"source": row.source, "row": row.number, "id": own[0].sample_id}
        record["issues"] = [{"code": issue.code, "message": issue.message} for issue in own]
        record["content"] = row.raw if row.value is None else row.value
        # ASCII: lone surrogates must survive; clips inside a row are not copied
        if (line := json.dumps(record, default=lambda item: f"<{len(item)} bytes>")) not in known:
            lines.append(line + "\n")
    with target.open("a", encoding="utf-8") as file:
        file.write("".join(lines))
        file.flush()
        os.fsync(file.fileno())

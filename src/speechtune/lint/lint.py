"""The verb `lint`: faults of LoRA training scripts that a run does not show, and with `--fix` the cure of two of them.

| code | fault | `--fix` |
|---|---|---|
| L1 | a LoraConfig is never applied to a model | yes, where model and place are certain |
| L2 | save_pretrained of a model that is not the trained one | yes, where the trained one is in reach |
| L3 | trainable fp16 weights without a loss scaler | |
| L4 | a Trainer's training_step without backward | |
| L5 | labels are a copy of input_ids, masked nowhere (a note where no padding is seen) | |
| L6 | note: fp16 with logging_nan_inf_filter left on | |
| L7 | a handler for everything hides the errors of a step or a save | |

Scripts are read, never imported or run. Where a rule cannot be certain it keeps silent.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from speechtune.errors import ConfigError
from speechtune.lint.adapter_rules import half_adapters, unapplied_configs, wrong_saves
from speechtune.lint.fixes import mended_source, write_with_backup
from speechtune.lint.script import Fault, Script
from speechtune.lint.step_rules import hidden_nan, steps_without_backward, swallowed_errors, unmasked_labels

RULES = (
    unapplied_configs,
    wrong_saves,
    half_adapters,
    steps_without_backward,
    unmasked_labels,
    hidden_nan,
    swallowed_errors,
)
_CONCERNED = (b"LoraConfig", b"save_pretrained", b"save_model", b"backward", b"Trainer", b"input_ids", b"training_step")
"""A file with none of these words has nothing that a rule looks for, so it is only parsed."""
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "node_modules"}
_MAX_MENDS = 100


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of a script; `line` and `column` count from 1. A "note" is no fault by itself."""

    path: str
    line: int
    column: int
    code: str
    severity: Literal["error", "note"]
    message: str
    fixable: bool


@dataclass(frozen=True, slots=True)
class FixReport:
    """What `fix` did to a file; without a mend, `backup` is None and `diff` empty.

    A finding in `fixed` has the line it had just before its own mend, one in `left` its line now.
    """

    path: str
    fixed: list[Finding]
    left: list[Finding]
    backup: str | None = None
    diff: str = ""


def lint(path: Path) -> list[Finding]:
    """Findings of one file in source order.

    Raises:
        ConfigError: the file cannot be read, or does not parse (with the line).
    """
    script, faults = _check(path, _read(path))
    return [_finding(script, fault) for fault in faults]


def lint_paths(paths: Sequence[Path]) -> list[Finding]:
    """Findings of files, and of all `*.py` below folders (hidden ones and installed packages left out).

    Raises:
        ConfigError: files that do not exist or do not parse, all named; or a folder without scripts.
    """
    findings, unreadable = [], []
    for path in scripts_in(paths):
        try:
            findings += lint(path)
        except ConfigError as error:
            unreadable.append(str(error))
    if unreadable:
        raise ConfigError("\n".join(unreadable))
    return findings


def fix(path: Path) -> FixReport:
    """Mend what can be mended with certainty, one finding after the other, and keep the original as `<name>.bak`.

    A mend counts only if the result compiles and no longer has the finding. The file is replaced in one step; a backup
    that exists is not overwritten (`.bak1`, `.bak2` ...).

    Raises:
        ConfigError: the file cannot be read, does not parse, or cannot be written.
    """
    original = source = _read(path)
    fixed: list[Finding] = []
    script, faults = _check(path, source)
    while len(fixed) < _MAX_MENDS:
        mended = ((fault, result) for fault in faults if (result := _mended(script, fault, faults)) is not None)
        fault, result = next(mended, (None, source))
        if fault is None:
            break
        fixed.append(_finding(script, fault))
        source = result
        script, faults = _check(path, source)
    left = [_finding(script, fault) for fault in faults]
    if not fixed:
        return FixReport(str(path), fixed, left)
    backup = write_with_backup(path, original, source)
    before, after = (text.decode(script.module.encoding).splitlines() for text in (original, source))
    diff = "\n".join(difflib.unified_diff(before, after, str(backup), str(path), n=1, lineterm=""))
    return FixReport(str(path), fixed, left, str(backup), diff)


def fix_or_lint(path: Path, mend: bool) -> FixReport:
    return fix(path) if mend else FixReport(str(path), [], lint(path))


def scripts_in(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: no such file or folder; name Python scripts, or folders with *.py in them")
        scripts = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        scripts = [s for s in scripts if s == path or not _is_skipped(s.relative_to(path))]
        if not scripts:
            raise ConfigError(f"{path}: no *.py in this folder; name the folder of the training scripts")
        found += [script for script in scripts if script not in found]
    return found


def _is_skipped(path: Path) -> bool:
    return any(part in _SKIPPED_FOLDERS or part.startswith(".") for part in path.parts)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _check(path: Path, source: bytes) -> tuple[Script, list[Fault]]:
    rules = RULES if any(word in source for word in _CONCERNED) else ()
    try:
        script = Script(path, source)
        found = [fault for rule in rules for fault in rule(script)]
    except (RecursionError, MemoryError) as error:  # the compiler's words for too deep
        raise ConfigError(f"{path}: nested too deeply to be read; nothing was checked or changed") from error
    return script, sorted(found, key=lambda fault: (script.start(fault.node), fault.code))


def _finding(script: Script, fault: Fault) -> Finding:
    line, column = script.start(fault.node)
    severity = "note" if fault.note else "error"
    fixable = fault.mend is not None
    return Finding(str(script.path), line, column + 1, fault.code, severity, fault.message, fixable)


def _mended(script: Script, fault: Fault, faults: Sequence[Fault]) -> bytes | None:
    """The source without this fault; None where it cannot be mended, or the mend does not hold."""
    if fault.mend is None:
        return None
    try:
        source = mended_source(script, fault.mend)
        _, left = _check(script.path, source)
    except ConfigError:
        return None
    before, after = ([found.message for found in some if found.code == fault.code] for some in (faults, left))
    return source if after.count(fault.message) < before.count(fault.message) else None

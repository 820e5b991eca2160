"""Issues of LoRA training scripts that a run does not show, and with `fix_script` the correction of some.

| code | issue | `--fix` |
|---|---|---|
| L0 | a file that cannot be read, or not be fixed | |
| L1 | a LoraConfig is never applied to a model, or its PEFT model dropped | yes, where model and place are certain |
| L2 | save_pretrained of a model that is not the trained one | yes, where the trained one is in reach |
| L3 | trainable fp16 weights without a loss scaler | |
| L4 | a Trainer's training_step without backward | |
| L5 | labels are a copy of input_ids, masked nowhere (a note where no padding is seen) | |
| L6 | note: fp16 with logging_nan_inf_filter left on | |
| L7 | a handler for everything hides the errors of a step or a save | |
| L8 | padding is the end token, and padding is masked in the labels | |
| L9 | an adapter loaded, or made, for inference and then trained | |
| L10 | all parameters frozen after LoRA was applied | |
| L11 | an optimizer or trainer made before LoRA is applied | |
| L12 | gradients cleared between backward and step | |

Scripts are read, never imported or run. A rule that cannot be certain reports nothing.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import libcst as cst

from speechtune.errors import ConfigError, Issue
from speechtune.lint import adapter_rules, step_rules, training_rules
from speechtune.lint.fixes import Edit, write_with_backup
from speechtune.lint.notebook import code_cells
from speechtune.lint.script import Match, Script

RULES = (*adapter_rules.RULES, *step_rules.RULES, *training_rules.RULES)
# A file with none of these words has nothing that a rule looks for: it is only parsed, which is ten times as fast.
_CONCERNED = (b"LoraConfig", b"save_pretrained", b"save_model", b"backward", b"Trainer", b"input_ids", b"training_step")
_CONCERNED += (b"get_peft_model", b"pad_token", b"Optimizer", b"optim.")
_SUFFIXES = {".py", ".ipynb"}
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "node_modules"}
_MAX_FIXES = 100


@dataclass(frozen=True, slots=True)
class ScriptIssue(Issue):
    """An issue of a script; `source` is file:line:column (in a notebook file:cell N:line:column), `row` the line."""

    fixable: bool = False


@dataclass(frozen=True, slots=True)
class FixReport:
    """What `fix_script` did to a file; where nothing was fixed, `backup` is None and `diff` empty.

    An issue in `fixed` has the line it had just before its own fix, one in `left` its line now.
    """

    path: str
    fixed: list[ScriptIssue]
    left: list[ScriptIssue]
    backup: str | None = None
    diff: str = ""


def lint(path: Path) -> list[ScriptIssue]:
    """Issues of one script, or of the code cells of one notebook, in source order.

    Raises ConfigError: the file cannot be read, or does not parse (with the line).
    """
    return _issues(*_check(path, _read(path)))


def lint_paths(paths: Sequence[Path], *, fix: bool = False) -> list[FixReport]:
    """Reports on files, and on all scripts and notebooks below folders (hidden ones and installed packages left out).

    A file that cannot be read, or fixed, is an issue of its own (L0); the others are checked all the same.
    Raises ConfigError: none can be read; a path does not exist; a folder without scripts.
    """
    reports = []
    unreadable = {}
    for path in scripts_in(paths):
        try:
            reports.append(fix_script(path) if fix else FixReport(str(path), [], lint(path)))
        except ConfigError as error:
            unreadable[path] = message = str(error)
            where, _, reason = message.removeprefix(str(path)).partition(": ")  # ":7" or nothing stands before it
            row = int(where.rpartition(":")[2] or 0)
            reports.append(FixReport(str(path), [], [ScriptIssue(f"{path}{where}", "", "L0", reason, row)]))
    if len(unreadable) == len(reports):
        raise ConfigError("\n".join(unreadable.values()))
    return reports


def fix_script(path: Path) -> FixReport:
    """Fix what is certain, one issue after the other, and keep the original as `<name>.bak`.

    A fix counts only if the result compiles and no longer has the issue. The file is replaced in one step; a backup
    that exists is not overwritten (`.bak1`, `.bak2` ...).

    Raises ConfigError: the file cannot be read, does not parse, or cannot be written.
    """
    original = source = _read(path)
    fixed: list[ScriptIssue] = []
    script, matches = _check(path, source)
    while len(fixed) < _MAX_FIXES:  # from the start again after each, as a fix moves every line after it
        tries = ((match, result) for match in matches if (result := _without(script, match, matches)) is not None)
        match, result = next(tries, (None, source))
        if match is None:
            break
        fixed += _issues(script, [match])
        source = result
        script, matches = _check(path, source)
    left = _issues(script, matches)
    if not fixed:
        return FixReport(str(path), fixed, left)
    backup = write_with_backup(path, original, source)
    before, after = (text.decode(script.module.encoding).splitlines() for text in (original, source))
    diff = "\n".join(difflib.unified_diff(before, after, str(backup), str(path), n=1, lineterm=""))
    return FixReport(str(path), fixed, left, str(backup), diff)


def scripts_in(paths: Sequence[Path]) -> list[Path]:
    """The files, and all `*.py` and `*.ipynb` below folders, each one time.

    Raises ConfigError: a path does not exist, or a folder holds neither.
    """
    scripts: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: no such file or folder; name scripts, notebooks, or folders with them")
        below = [s for s in sorted(path.rglob("*")) if s.suffix in _SUFFIXES] if path.is_dir() else [path]
        below = [script for script in below if script.is_file() or (script.is_symlink() and not script.exists())]
        parts = {script: script.relative_to(path).parts for script in below}
        below = [s for s in below if not any(part in _SKIPPED_FOLDERS or part.startswith(".") for part in parts[s])]
        if not below:
            raise ConfigError(f"{path}: no *.py and no *.ipynb here; name the folder of the training scripts")
        scripts += below
    return list(dict.fromkeys(scripts))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _check(path: Path, source: bytes) -> tuple[Script, list[Match]]:
    places: Sequence[tuple[int, int]] = ()
    try:
        if path.suffix == ".ipynb":
            source, places = _cells(path, source)
        script = Script(path, source, places)
        if path.suffix not in _SUFFIXES and not any(script.all(cst.Import)) and not any(script.all(cst.ImportFrom)):
            # Most JSON and some YAML parse as Python.
            raise ConfigError(f"{path}: no script: nothing is imported; name a *.py, a *.ipynb, or a folder with them")
        rules = RULES if any(word in source for word in _CONCERNED) else ()
        matches = [match for rule in rules for match in rule(script)]
    except (RecursionError, MemoryError) as error:  # what the compiler raises for expressions that are too deep
        raise ConfigError(f"{path}: nested too deeply to be read; nothing was checked or changed") from error
    if places:
        by_hand = " (--fix leaves notebooks to you)"
        matches = [replace(m, message=m.message + by_hand, fix=None) if m.fix else m for m in matches]
    return script, sorted(matches, key=lambda match: (script.start(match.node), match.code))


def _cells(path: Path, source: bytes) -> tuple[bytes, list[tuple[int, int]]]:
    try:
        return code_cells(source)
    except ValueError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(f"{path}: not readable as a notebook: {reason}; nothing was checked") from error


def _issues(script: Script, matches: Sequence[Match]) -> list[ScriptIssue]:
    issues = []
    for match in matches:
        line, column = script.start(match.node)
        source, severity = f"{script.place(line)}:{column + 1}", "note" if match.note else "error"
        row = script.places[line - 1][1] if script.places else line
        issues.append(ScriptIssue(source, "", match.code, match.message, row, severity, match.fix is not None))
    return issues


def _without(script: Script, match: Match, matches: Sequence[Match]) -> bytes | None:
    """The source without this match; None where it has no fix, or has the same matches after it."""
    if match.fix is None:
        return None
    try:
        source = script.module.visit(Edit(match.fix)).bytes
        _, left = _check(script.path, source)
    except ConfigError:
        return None
    before, after = (sum((m.code, m.message) == (match.code, match.message) for m in some) for some in (matches, left))
    return source if after < before else None

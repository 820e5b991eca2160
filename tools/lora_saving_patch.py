"""Print a standalone saving function for a training script that cannot import speechtune, or list such scripts.

python tools/lora_saving_patch.py > my_project/standalone_lora_saving.py
python tools/lora_saving_patch.py --list my_project
"""

from __future__ import annotations

import argparse
import ast
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN = ("trainer", "src/train_single_config_remote.py")
STANDALONE = Path(__file__).with_name("standalone_lora_saving.py")
SKIPPED = {"__pycache__", "build", "dist", "node_modules", "site-packages", "tests", "venv"}
PEFT_NAMES = {"LoraConfig", "get_peft_model"}


def trainer_scripts(folder: Path) -> Iterator[str]:
    """`file:line: what it builds` for each Trainer, LoraConfig or PEFT model below `folder`; no file is executed.

    A file that cannot be read is named with the reason.
    """
    for path in [folder] if folder.is_file() else sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts[:-1]
        if any(part in SKIPPED or part.startswith(".") for part in parts):
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # SyntaxWarnings of other people's files
                tree = ast.parse(path.read_bytes(), str(path))
        except (OSError, SyntaxError, ValueError) as error:
            yield f"{path}: not readable as Python: {error}"
            continue
        yield from (f"{path}:{line}: {what}" for line, what in sorted(set(traces(tree))))


def traces(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines that make a trainer of a Trainer or LoRA class, and what they do."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = last_name(node.func)
            if name in PEFT_NAMES or name.endswith("Trainer"):
                yield node.lineno, f"{name}(...)"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("speechtune.legacy."):
            yield node.lineno, f"trains by {node.module}, which saves verified adapters by itself"
        elif isinstance(node, ast.ClassDef):
            bases = [last_name(base) for base in node.bases]
            if any(base.endswith("Trainer") for base in bases):
                yield node.lineno, f"class {node.name}({', '.join(bases)})"


def last_name(node: ast.expr) -> str:
    """`transformers.Trainer` and `Trainer` are both "Trainer"."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def main() -> int:
    """Print the function, or the list; exit status 1 if a list is empty, 2 if there is no such folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--list",
        "--list-scripts",
        metavar="FOLDER",
        nargs="?",
        const="",
        help="list training scripts (without FOLDER: of this folder and of speechtune)",
    )
    parser.add_argument("--script", type=Path, help="where one script builds its trainer; `speechtune lint` checks it")
    parser.add_argument("--generate-function", action="store_true", help="print the function (also without any flag)")
    options = parser.parse_args()
    if options.script is None and options.list is None:
        print(STANDALONE.read_text(encoding="utf-8"), end="")
        return 0
    wanted = options.script or Path(options.list)
    if not wanted.exists():
        print(f"{wanted}: no such file or folder", file=sys.stderr)
        return 2
    folders = [wanted]
    if options.list == "" and not ROOT.is_relative_to(Path.cwd()):
        folders += [ROOT / name for name in OWN if (ROOT / name).exists()]
    lines = [line for folder in folders for line in trainer_scripts(folder)]
    for line in lines:
        print(line)
    if not lines:
        print(f"{wanted}: no script builds a Trainer, a LoraConfig or a PEFT model", file=sys.stderr)
    return 0 if lines else 1


if __name__ == "__main__":
    sys.exit(main())

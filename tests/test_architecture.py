"""The rules of docs/architecture.md, checked on the source: who may import whom, by folder, and what is never done."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
MAX_LINES = 400
MAX_TOP_FILES = 10

# A folder (or a file at the top) may import from its own row and from the rows before it.
ROWS = (
    {"__init__", "types", "errors", "tensors"},
    {"config", "precision", "audio"},
    {"storage", "family"},
    {"tasks", "cache", "lora"},
    {"data", "families"},
    {"inference", "training"},
    {"export", "report", "integrations", "preparation"},
    {"serving"},
    {"commands", "studio"},
    {"cli", "legacy", "__main__"},
)
SIBLINGS = (
    {"data", "families"},
    {"inference", "training"},
    {"tasks", "cache", "lora"},
    {"export", "report", "integrations"},
    {"export", "training"},
    {"preparation", "training"},
    {"preparation", "export", "integrations"},
)
ASKS_THE_REGISTRY = ("training.prepare", "inference.load", "export.", "commands.", "studio.", "legacy.")
LINT_SEES = {"errors"}

Modules = dict[str, tuple[Path, ast.Module]]


def read(source: Path) -> Modules:
    """All modules of the package below `source`, named without "speechtune."; the package itself is "__init__"."""
    found: Modules = {}
    for path in sorted((source / "speechtune").rglob("*.py")):
        parts = path.relative_to(source / "speechtune").with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        found[name] = path, ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


def imports(modules: Modules, name: str) -> Iterator[tuple[str, int]]:
    """What a module imports from the package, anywhere in it (functions and TYPE_CHECKING too), with the line."""
    for node in ast.walk(modules[name][1]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in names:
            package, _, rest = full.partition(".")
            if package == "speechtune":  # the longest prefix that is a module: the rest is a name in it
                while rest and rest not in modules:
                    rest = rest.rpartition(".")[0]
                yield rest or "__init__", node.lineno


def row_of(folder: str) -> int | None:
    return next((number for number, row in enumerate(ROWS) if folder in row), None)


def check_imports(modules: Modules) -> Iterator[str]:
    for name in modules:
        folder = name.partition(".")[0]
        if folder != "lint" and row_of(folder) is None:
            yield f"{name}: {folder} stands in no row of ROWS"
            continue
        for imported, line in imports(modules, name):
            other = imported.partition(".")[0]
            if other == folder:
                continue
            if imported == "families" and not name.startswith(ASKS_THE_REGISTRY):
                yield f"{name}:{line}: asks the registry of families; take a Family as an argument"
            if folder == "lint":
                if other not in LINT_SEES:
                    yield f"{name}:{line}: lint imports {imported}"
            elif other == "lint":
                if folder not in {"commands", "legacy"}:
                    yield f"{name}:{line}: imports lint"
            elif (row_of(other) or 0) > (row_of(folder) or 0):
                yield f"{name}:{line}: imports {imported}, which lies higher"
            elif any({folder, other} <= siblings for siblings in SIBLINGS):
                yield f"{name}:{line}: imports its sibling {imported}"


def check_circles(modules: Modules) -> Iterator[str]:
    graph = {name: {imported for imported, _ in imports(modules, name)} - {name, "__init__"} for name in modules}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "imports form a circle: " + " <- ".join(error.args[1])


def check_size(modules: Modules) -> Iterator[str]:
    for name, (path, _) in modules.items():
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > MAX_LINES:
            yield f"{name}: {count} lines, more than {MAX_LINES}"
    top = [name for name, (path, _) in modules.items() if path.parent.name == "speechtune"]
    if len(top) > MAX_TOP_FILES:
        yield f"{len(top)} files at the top, more than {MAX_TOP_FILES}: {', '.join(top)}"


def check_manners(modules: Modules) -> Iterator[str]:
    names = {part for name in modules if name.startswith("families.") for part in [name.split(".")[1]]} - {"layers"}
    for name, (_, tree) in modules.items():
        for node in ast.walk(tree):
            for issue in issues_of(node, name, names):
                yield f"{name}:{getattr(node, 'lineno', 0)}: {issue}"


def issues_of(node: ast.AST, module: str, families: set[str]) -> Iterator[str]:
    if isinstance(node, ast.ImportFrom):
        if node.level:
            yield "relative import; write the full name"
        if any(alias.name == "*" for alias in node.names):
            yield "star import"
    if isinstance(node, ast.ExceptHandler):
        caught = [] if node.type is None else [part for part in ast.walk(node.type) if isinstance(part, ast.Name)]
        if node.type is None or {part.id for part in caught} & {"Exception", "BaseException"}:
            yield "catches everything; name the errors"
    if isinstance(node, ast.keyword):
        value = node.value.value if isinstance(node.value, ast.Constant) else None
        if (node.arg, value) in {("trust_remote_code", True), ("weights_only", False)}:
            yield f"{node.arg}={value} runs code from model files"
    if not module.startswith("integrations") and mentions_trainer(node):
        yield "uses transformers.Trainer; the loop is ours"
    if not module.startswith("families.") and compares_family(node, families):
        yield "asks which family it has; put the difference behind the Family protocol"


def mentions_trainer(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "transformers":
        return "trainer" in (node.module or "") or any("Trainer" in alias.name for alias in node.names)
    if isinstance(node, ast.Import):
        return any(alias.name.startswith("transformers.trainer") for alias in node.names)
    return isinstance(node, ast.Attribute) and ast.unparse(node).endswith(("transformers.Trainer", ".Seq2SeqTrainer"))


def compares_family(node: ast.AST, names: set[str]) -> bool:
    """`family == ...`, `config.family in ...`, `match family.name`, or a family's name compared with anything."""
    if isinstance(node, ast.Match):
        return names_family(node.subject)
    if not isinstance(node, ast.Compare) or all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
        return False
    sides = [node.left, *node.comparators]
    constants = {part.value for side in sides for part in ast.walk(side) if isinstance(part, ast.Constant)}
    return bool(names & constants) or any(names_family(side) for side in sides)


def names_family(node: ast.expr) -> bool:
    text = ast.unparse(node)
    tags = (".family", ".family.name", "family.pipeline_tag", "family.heads")
    return text in {"family", "family.name"} or text.endswith(tags)


CHECKS = (check_imports, check_circles, check_size, check_manners)


def all_issues(source: Path) -> list[str]:
    modules = read(source)
    assert modules, f"no source found under {source}"
    return [issue for check in CHECKS for issue in check(modules)]


def test_the_rules_hold() -> None:
    issues = all_issues(SOURCE)
    assert not issues, "\n" + "\n".join(issues)


PLANTED = {
    "upward": ("lora/apply.py", "from speechtune.training.loop import train", "higher"),
    "upward and lazy": ("errors.py", "def f():\n    import speechtune.cli", "higher"),
    "upward for types": ("errors.py", "if TYPE_CHECKING:\n    from speechtune.cli import main", "higher"),
    "upward from the package": ("config.py", "from speechtune import cli", "higher"),
    "sibling": ("data/rows.py", "from speechtune.families.layers import ops", "sibling"),
    "export and training": ("export/merge.py", "import speechtune.training.loop", "sibling"),
    "preparation and training": ("preparation/cut.py", "import speechtune.training.loop", "sibling"),
    "registry": ("training/loop.py", "from speechtune.families import create_family", "registry"),
    "lint": ("lint/rules.py", "import speechtune.config", "lint imports"),
    "no row": ("helpers.py", "", "no row"),
    "circle": ("cache/store.py", "if TYPE_CHECKING:\n    from speechtune.cache.encode import g", "circle"),
    "long": ("training/loop.py", "x = 1\n" * (MAX_LINES + 1), "more than 400"),
    "star": ("lora/apply.py", "from speechtune.errors import *", "star import"),
    "relative": ("lora/apply.py", "from . import errors", "relative import"),
    "family": ("training/loop.py", "if family == 'x':\n    pass", "which family"),
    "config.family": ("training/loop.py", "x = config.family in ('a', 'b')", "which family"),
    "family's name": ("training/loop.py", "x = kind == 'higgs_audio_v2'", "which family"),
    "family's tag": ("training/loop.py", "x = family.pipeline_tag != 'text-to-speech'", "which family"),
    "match": ("training/loop.py", "match config.family:\n    case 'x':\n        pass", "which family"),
    "trainer": ("training/loop.py", "from transformers import Trainer", "Trainer"),
    "trainer attribute": ("training/loop.py", "import transformers\nx = transformers.Trainer()", "Trainer"),
    "remote code": ("training/loop.py", "load(trust_remote_code=True)", "runs code"),
    "pickle": ("training/loop.py", "load('x', weights_only=False)", "runs code"),
    "except Exception": ("training/loop.py", "try:\n    f()\nexcept (ValueError, Exception):\n    pass", "everything"),
    "bare except": ("training/loop.py", "try:\n    f()\nexcept:\n    pass", "everything"),
}


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A package in which all that is allowed is done once."""
    files = {
        "__init__.py": "",
        "cli.py": "import speechtune.commands.lint",
        "errors.py": "if family is None:\n    f(weights_only=True)",
        "cache/encode.py": "from speechtune.cache.store import h",
        "cache/store.py": "",
        "commands/lint.py": "from speechtune.lint.rules import check\nfrom speechtune.families import create_family",
        "families/__init__.py": "",
        "families/higgs_audio_v2/family.py": "if family == 'x':\n    pass",
        "families/layers/ops.py": "",
        "integrations/transformers.py": "from transformers import TrainerCallback",
        "lint/rules.py": "from speechtune.errors import ConfigError",
        "training/loop.py": "",
    }
    for name, code in files.items():
        (tmp_path / "speechtune" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "speechtune" / name).write_text(code)
    return tmp_path


def test_what_is_allowed_passes(sound: Path) -> None:
    assert all_issues(sound) == []


@pytest.mark.parametrize("name", PLANTED)
def test_every_rule_can_fail(name: str, sound: Path) -> None:
    file, code, expected = PLANTED[name]
    path = sound / "speechtune" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)
    issues = all_issues(sound)
    assert any(expected in issue for issue in issues), issues


def test_an_eleventh_file_at_the_top_is_too_many(sound: Path) -> None:
    for name in ("types", "tensors", "config", "precision", "audio", "family", "__main__", "__init__", "errors", "cli"):
        (sound / "speechtune" / f"{name}.py").touch()
    assert all_issues(sound) == []
    (sound / "speechtune" / "storage.py").touch()
    assert any("files at the top" in issue for issue in all_issues(sound))


@pytest.mark.parametrize(
    ("module", "heavy"),
    [("config", "torch transformers"), ("family", "torch transformers"), ("cache.encode", "torch transformers")],
)
def test_light_modules_stay_light(module: str, heavy: str) -> None:
    """Options are read, and features by worker processes, without a model library."""
    code = f"import sys, speechtune.{module}; sys.exit(any(name in sys.modules for name in {heavy.split()}))"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SOURCE)}, check=False).returncode == 0

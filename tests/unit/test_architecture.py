"""The plan of the house, checked on the source: imports point one way, and some things are not done at all."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
MAX_LINES = 400

# From the ground up: a module may import from its own layer and from those above it in this list. A name ending in
# ".*" stands for the modules of a folder that are not named themselves. A new module needs a line here.
LAYERS = [
    ["speechtune", "speechtune.errors"],
    ["speechtune.config"],
    ["speechtune.families.base"],
    ["speechtune.audio"],
    [
        "speechtune.readers",
        "speechtune.rows",
        "speechtune.prompts",
        "speechtune.seed_list",
        "speechtune.manifest",
        "speechtune.answers",
        "speechtune.phones",
        "speechtune.speechocean",
        "speechtune.speechocean_labels",
        "speechtune.assessment",
        "speechtune.assessment_rows",
        "speechtune.datasets",
        "speechtune.validate",
    ],
    [
        "speechtune.precision",
        "speechtune.fingerprint",
        "speechtune.adapter",
        "speechtune.flops",
        "speechtune.stored_adapter",
        "speechtune.base_recipe",
        "speechtune.guards",
        "speechtune.packed",
        "speechtune.feature_store",
        "speechtune.clip_hashes",
        "speechtune.cache",
        "speechtune.batching",
        "speechtune.feeding",
        "speechtune.objective",
        "speechtune.eval_loss",
        "speechtune.ranks",
        "speechtune.model_files",
        "speechtune.schedule",
        "speechtune.sharding",
        "speechtune.watchdog",
        "speechtune.save_adapters",
        "speechtune.saving",
        "speechtune.checkpoint",
        "speechtune.interruption",
        "speechtune.tracking",
    ],
    [
        "speechtune.metrics",
        "speechtune.mdd",
        "speechtune.evaluation",
        "speechtune.evaluation_files",
        "speechtune.scorer_support",
        "speechtune.scorers",
        "speechtune.scorers_asr",
        "speechtune.scorers_mos",
        "speechtune.scorers_speaker",
        "speechtune.spoken_text",
        "speechtune.voice_compare",
        "speechtune.voice_measure",
    ],
    ["speechtune.families", "speechtune.families.*"],
    ["speechtune.listening"],
    ["speechtune.job", "speechtune.evaluating", "speechtune.loop"],
    ["speechtune.budget"],
    ["speechtune.run", "speechtune.run_info", "speechtune.model_card"],
    [
        "speechtune.adapter_files",
        "speechtune.convert",
        "speechtune.extract",
        "speechtune.lint",
        "speechtune.lint_fixes",
        "speechtune.lint_adapters",
        "speechtune.lint_steps",
        "speechtune.lint_tree",
        "speechtune.merge",
        "speechtune.push",
        "speechtune.fit",
        "speechtune.generate",
        "speechtune.answer_file",
        "speechtune.evaluate",
        "speechtune.evaluate_voice",
        "speechtune.score",
        "speechtune.report",
        "speechtune.report_audio",
        "speechtune.report_clips",
        "speechtune.report_data",
        "speechtune.report_facts",
        "speechtune.report_html",
        "speechtune.report_markdown",
        "speechtune.report_plot",
        "speechtune.doctor",
        "speechtune.demo",
        "speechtune.encoding",
        "speechtune.demo_pronunciation",
        "speechtune.integrations",
        "speechtune.integrations.*",
    ],
    ["speechtune.cli", "speechtune.original", "speechtune.phi4_original", "speechtune.__main__"],
]


def module_name(path: Path, source: Path) -> str:
    parts = list(path.relative_to(source).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules(source: Path) -> dict[str, ast.Module]:
    paths = sorted((source / "speechtune").rglob("*.py"))
    return {module_name(path, source): ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in paths}


def layer_of(module: str) -> int | None:
    folder = module.rpartition(".")[0] + ".*"
    for wanted in (module, folder):
        for number, layer in enumerate(LAYERS):
            if wanted in layer:
                return number
    return None


def walk_at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes, also inside functions, but not what stands under `if TYPE_CHECKING:`."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from walk_at_run_time(other)
        else:
            yield from walk_at_run_time(child)


def imports(name: str, source: Path) -> Iterator[tuple[str, int]]:
    """Modules of the package that `name` imports, with the line; a name imported from a package may be a module."""
    known = modules(source)
    for node in walk_at_run_time(known[name]):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [submodule if submodule in known else node.module for submodule in submodules]
        else:
            continue
        yield from ((module, node.lineno) for module in found if module.partition(".")[0] == "speechtune")


def check_layers(source: Path) -> Iterator[str]:
    for name in modules(source):
        layer = layer_of(name)
        if layer is None:
            yield f"{name}: not in the table of layers; add it to LAYERS in tests/unit/test_architecture.py"
            continue
        for imported, line in imports(name, source):
            below = layer_of(imported)
            if below is not None and below > layer:
                yield f"{name}:{line}: imports {imported}, which lies {below - layer} layer(s) higher"


def check_cycles(source: Path) -> Iterator[str]:
    graph = {name: {imported for imported, _ in imports(name, source)} - {name} for name in modules(source)}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield "imports form a cycle: " + " <- ".join(error.args[1])


def check_size(source: Path) -> Iterator[str]:
    for path in sorted((source / "speechtune").rglob("*.py")):
        count = len(path.read_text(encoding="utf-8").splitlines())
        if count > MAX_LINES:
            yield f"{path.relative_to(source)}: {count} lines, more than {MAX_LINES}"


def check_manners(source: Path) -> Iterator[str]:
    for name, tree in modules(source).items():
        for node in ast.walk(tree):
            for fault in faults_of(node, name, source):
                yield f"{name}:{getattr(node, 'lineno', 0)}: {fault}"


def faults_of(node: ast.AST, module: str, source: Path) -> Iterator[str]:
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
    if not module.startswith("speechtune.integrations") and mentions_trainer(node):
        yield "uses transformers.Trainer; the loop is ours"
    if not module.startswith("speechtune.families") and compares_family(node, family_names(source)):
        yield "asks which family it has; put the difference behind the Family protocol"


def mentions_trainer(node: ast.AST) -> bool:
    if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "transformers":
        return "trainer" in (node.module or "") or any("Trainer" in alias.name for alias in node.names)
    if isinstance(node, ast.Import):
        return any(alias.name.startswith("transformers.trainer") for alias in node.names)
    return isinstance(node, ast.Attribute) and ast.unparse(node).endswith(("transformers.Trainer", ".Seq2SeqTrainer"))


@cache
def family_names(source: Path) -> frozenset[str]:
    tree = modules(source).get("speechtune.families", ast.Module([], []))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FAMILIES":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def compares_family(node: ast.AST, names: frozenset[str]) -> bool:
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
    return text in {"family", "family.name"} or text.endswith((".family", ".family.name"))


CHECKS = [check_layers, check_cycles, check_size, check_manners]


@pytest.mark.parametrize("check", CHECKS)
def test_the_house_is_in_order(check) -> None:
    assert len(modules(SOURCE)) > 5, f"no source found under {SOURCE}"
    faults = list(check(SOURCE))
    assert not faults, "\n" + "\n".join(faults)


def test_known_families_are_found() -> None:
    assert "higgs_audio_v2" in family_names(SOURCE)


@pytest.mark.parametrize("heavy", ["torch", "transformers"])
def test_the_ground_floor_is_light(heavy: str) -> None:
    for name in ("speechtune.errors", "speechtune.config", "speechtune.families.base"):
        nodes = walk_at_run_time(modules(SOURCE)[name])
        imported = [ast.unparse(node) for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
        assert imported and all(heavy not in line for line in imported), f"{name} imports {heavy}"


BAD = {
    "upward": ("adapter.py", "from speechtune.loop import train", "higher"),
    "upward and lazy": ("errors.py", "def f():\n    import speechtune.cli", "higher"),
    "upward from the package": ("config.py", "from speechtune import cli", "higher"),
    "unknown": ("helpers.py", "", "not in the table"),
    "star": ("adapter.py", "from speechtune.errors import *", "star import"),
    "relative": ("adapter.py", "from . import errors", "relative import"),
    "family": ("loop.py", "if family == 'x':\n    pass", "which family"),
    "config.family": ("loop.py", "x = config.family in ('a', 'b')", "which family"),
    "family's name": ("loop.py", "x = kind == 'higgs_audio_v2'", "which family"),
    "match": ("loop.py", "match config.family:\n    case 'x':\n        pass", "which family"),
    "trainer": ("loop.py", "from transformers import Trainer", "Trainer"),
    "trainer attribute": ("loop.py", "import transformers\nx = transformers.Trainer()", "Trainer"),
    "trainer callback": ("loop.py", "from transformers.trainer_callback import TrainerCallback", "Trainer"),
    "remote code": ("loop.py", "load(trust_remote_code=True)", "runs code"),
    "pickle": ("loop.py", "load('x', weights_only=False)", "runs code"),
    "except Exception": ("loop.py", "try:\n    f()\nexcept (ValueError, Exception):\n    pass", "catches everything"),
    "bare except": ("loop.py", "try:\n    f()\nexcept:\n    pass", "catches everything"),
    "long": ("loop.py", "\n".join(["x = 1"] * (MAX_LINES + 1)), "more than"),
    "cycle": ("cache.py", "def f():\n    from speechtune.batching import g", "cycle"),
}


@pytest.mark.parametrize("name", BAD)
def test_every_check_can_fail(name: str, tmp_path: Path) -> None:
    file, code, expected = BAD[name]
    package = tmp_path / "speechtune"
    (package / "families").mkdir(parents=True)
    (package / "families" / "__init__.py").write_text("FAMILIES = {'higgs_audio_v2': 'X'}")
    (package / "batching.py").write_text("from speechtune.cache import h")
    for other in ("loop.py", "cli.py", "cache.py"):
        (package / other).write_text("")
    assert not [fault for check in CHECKS for fault in check(tmp_path)]
    modules.cache_clear()
    family_names.cache_clear()

    (package / file).write_text(code)
    faults = [fault for check in CHECKS for fault in check(tmp_path)]
    assert len(faults) >= 1 and all(expected in fault for fault in faults), faults


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    package = tmp_path / "speechtune"
    (package / "families").mkdir(parents=True)
    (package / "integrations").mkdir()
    (package / "integrations" / "hf.py").write_text("from transformers import TrainerCallback")
    (package / "families" / "x.py").write_text("if family == 'x':\n    pass")
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from speechtune.cli import main\n"
    (package / "errors.py").write_text(guarded + "if family is None:\n    f(weights_only=True)")
    (package / "cli.py").write_text("import speechtune.errors")
    assert not [fault for check in CHECKS for fault in check(tmp_path)]


def test_importing_the_cache_needs_no_model_library() -> None:
    """Workers that only read features start without torch."""
    import subprocess

    code = "import sys, speechtune.cache; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(SOURCE)}, check=False).returncode == 0

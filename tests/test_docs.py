"""The documents name only what exists: files, links, tests and verbs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from speechtune.cli import build_parser

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
TESTS = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
FILES = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if ".venv" not in path.parts}
MADE_BY_RUNS = ["output/", "data/", "models/", "lora_adapters/", "checkpoint-", "samples/", "speechtune-demo/"]


def exists(name: str) -> bool:
    """A path from the root, or the end of one, as in `loop.py` or `training/loop.py`."""
    return any(file == name or file.endswith(f"/{name}") for file in FILES)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_document_names_exists(path: Path) -> None:
    """Guards against pages that go on naming what was renamed."""
    text = path.read_text(encoding="utf-8")
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    missing = {link for link in links if link and not (path.parent / link).exists()}
    if path.name != "CHANGELOG.md":  # it tells of what was
        code = set(re.findall(r"`([^`\n]+)`", text))
        named = {word for word in code if re.fullmatch(r"[\w./-]+\.(py|md|toml|yaml)", word)}
        missing |= {
            name for name in named if "/" in name and not name.startswith(tuple(MADE_BY_RUNS)) and not exists(name)
        }
        tests = {word for word in code if re.fullmatch(r"test_\w+", word)}
        missing |= {name for name in tests if f"def {name}(" not in TESTS}
    assert not missing


def test_verbs_that_documents_name_exist() -> None:
    verbs = next(action.choices for action in build_parser()._actions if action.metavar == "VERB")
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        named = set(re.findall(r"^(?:\S+=\S+ )*speechtune ([a-z]+)", text, re.M)) | set(
            re.findall(r"`speechtune ([a-z]+)", text)
        )
        assert verbs is not None and named <= set(verbs), (path, named - set(verbs))

"""The verb lint: which files are read, and what is said of those that cannot be."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from speechtune.commands.lint import run_lint
from speechtune.errors import ConfigError
from speechtune.lint.lint import lint, lint_paths

CORPUS = Path(__file__).with_name("lint_corpus")
SWALLOWED = "import torch\ntry:\n    m.save_pretrained('o')\nexcept:\n    pass\n"


def script(folder: Path, text: str, name: str = "train.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def notebook(folder: Path, *cells: str | list[str]) -> Path:
    """Code cells, after one of text."""
    parts: list[dict[str, object]] = [{"cell_type": "markdown", "metadata": {}, "source": "# not Python"}]
    parts += [{"cell_type": "code", "metadata": {}, "outputs": [], "source": cell} for cell in cells]
    content = {"cells": parts, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    return script(folder, json.dumps(content), "train.ipynb")


def test_folders(tmp_path: Path) -> None:
    for name in ("b.py", "sub/a.py", ".hidden/c.py", "lib/site-packages/d.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        script(tmp_path, SWALLOWED, name)
    (tmp_path / "folder.py").mkdir()
    os.mkfifo(tmp_path / "pipe.py")
    assert [Path(report.path).name for report in lint_paths([tmp_path])] == ["b.py", "a.py"]
    reports = lint_paths([tmp_path / "notes.txt", tmp_path / "b.py", tmp_path])
    assert len(reports) == 3 and all(report.left for report in reports)
    with pytest.raises(ConfigError, match="no such file"):
        lint_paths([tmp_path / "missing.py"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no \*\.py"):
        lint_paths([tmp_path / "empty"])


def test_an_unreadable_script_is_an_issue_and_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards against a folder of which nothing is checked because one file is of Python 2."""
    good = script(tmp_path, (CORPUS / "invalid_saves_base.py").read_text("utf-8"), "a.py")
    script(tmp_path, "x = 1\nprint 'two'\n", "b.py")
    script(tmp_path, "{}", "c.ipynb")
    (tmp_path / "d.py").symlink_to(tmp_path / "gone.py")
    assert run_lint([tmp_path], fix=True, as_json=True) == 1
    values = json.loads(capsys.readouterr().out)
    assert [issue["source"] for issue in values["fixed"]] == [f"{good}:32:5"]
    found = {(Path(issue["source"]).name, issue["code"]) for issue in values["issues"]}
    assert found == {("b.py:2", "L0"), ("c.ipynb", "L0"), ("d.py", "L0")}
    assert lint(good) == []


def test_a_script_that_cannot_be_fixed_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (CORPUS / "invalid_saves_base.py").read_text("utf-8")
    for name in ("a.py", "b.py"):
        script(tmp_path, text, name)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "a.py" and access(path, mode))
    first, second = lint_paths([tmp_path], fix=True)
    assert [issue.code for issue in first.left] == ["L0"] and "read-only" in first.left[0].message
    assert len(second.fixed) == 1 and second.left == []


def test_where_nothing_can_be_read_that_is_an_error(tmp_path: Path) -> None:
    script(tmp_path, "if\n", "b.py")
    script(tmp_path, "else\n", "c.py")
    with pytest.raises(ConfigError, match=r"(?s)b\.py:1.*c\.py:1"):
        run_lint([tmp_path], fix=True)


NOT_SCRIPTS = {
    "data.json": '{"text": ["a", "b"]}',
    "recipe.yaml": "family: higgs\ntrain: 1\n",
    "run.sh": "x=1\n",
    "notes.md": "training\n",
    "empty": "",
}


@pytest.mark.parametrize("name", NOT_SCRIPTS)
def test_what_only_parses_as_python_is_not_certified(name: str, tmp_path: Path) -> None:
    """Guards against "0 issues" about a file in which there is no script."""
    compile(NOT_SCRIPTS[name], name, "exec")
    with pytest.raises(ConfigError, match="no script"):
        lint(script(tmp_path, NOT_SCRIPTS[name], name))


def test_code_cells_of_a_notebook_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against "0 issues" about a notebook, whose JSON is valid Python."""
    imports = "from peft import LoraConfig\n", "from transformers import AutoModel, Trainer"
    setup = ["%pip install -q peft \\\n", "    transformers\n", "!nvidia-smi\n", "files = !ls\n", "\n", *imports]
    bash, load = "%%bash\nfor x in *; do echo $x; done", "%%time\nm = AutoModel.from_pretrained('x')\nm?"
    path = notebook(tmp_path, setup, bash, load, "c = LoraConfig()", "if c:\n    !ls\n", "Trainer(model=m).train()")
    (issue,) = lint(path)
    assert (issue.source, issue.code, issue.row, issue.fixable) == (f"{path}:cell 5:1:5", "L1", 1, False)
    before = path.read_bytes()
    assert run_lint([tmp_path], fix=True, as_json=True) == 1
    assert path.read_bytes() == before
    assert "--fix leaves notebooks to you" in json.loads(capsys.readouterr().out)["issues"][0]["message"]


def test_a_script_that_a_cell_writes_is_read(tmp_path: Path) -> None:
    path = notebook(tmp_path, f"%%writefile train.py\n{SWALLOWED}", "await something()")
    assert [issue.code for issue in lint(path)] == ["L7"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "not readable as a notebook"),
        ("version https://git-lfs.github.com/spec/v1", "not readable as a notebook"),
        ('{"cells": [{"cell_type": "code", "source": 5}]}', "not readable as a notebook"),
        ('{"cells": [{"cell_type": "code", "source": "x"}, {"cell_type": "code", "source": "if"}]}', "cell 2:1: not"),
    ],
)
def test_what_is_no_notebook(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        lint(script(tmp_path, content, "train.ipynb"))

"""The verb lint: what it finds in a corpus of scripts, and that fixed scripts train an adapter.

A line of the corpus that ends in `# finds L1 fixable` must be found, as that, and no other line may be.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from speechtune.commands.lint import run_lint
from speechtune.errors import ConfigError
from speechtune.lint import fixes as lint_fixes
from speechtune.lint import lint as lint_module
from speechtune.lint.lint import ScriptIssue, fix_script, lint

CORPUS = Path(__file__).with_name("lint_corpus")
ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(CORPUS.glob("*.py"))
TRAINABLE = sorted(script.stem for script in SCRIPTS if "LlamaForCausalLM(CONFIG)" in script.read_text("utf-8"))

# Imports once, then runs each script in a process of its own: `script folder` pairs in, exit codes out.
RUNNER = """
import json, os, runpy, sys, traceback
import accelerate, peft, torch, transformers
codes = []
for script, folder in json.loads(sys.argv[1]):
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.chdir(folder)
            os.dup2(os.open("log.txt", os.O_CREAT | os.O_WRONLY), 1)
            os.dup2(1, 2)
            runpy.run_path(script, run_name="__main__")
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes.append(os.waitpid(child, 0)[1])
print(json.dumps(codes))
"""


def script(folder: Path, text: str, name: str = "train.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def shown(issues: list[ScriptIssue]) -> dict[int, str]:
    return {
        issue.row: issue.code + " fixable" * issue.fixable + " note" * (issue.severity == "note") for issue in issues
    }


def codes(folder: Path, text: str) -> list[str]:
    return [issue.code for issue in lint(script(folder, text))]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_corpus(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    marked = {number: line.partition("# finds ")[2] for number, line in enumerate(lines, 1) if "# finds " in line}
    assert shown(lint(path)) == marked
    assert bool(marked) is not path.stem.startswith("valid_")


def test_corpus_is_varied() -> None:
    codes = {name.split()[0] for name in (*INVALID, *VALID)} | {"L6"}
    assert codes == set(re.findall(r"^\| (L\d+) ", lint_module.__doc__ or "", re.MULTILINE)) - {"L0"}
    assert sum(path.stem.startswith("valid_") for path in SCRIPTS) >= 7 and len(TRAINABLE) >= 7


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], tuple[int, Path]]:
    """Exit code and folder of each trainable script, as it is (False) and fixed (True)."""
    jobs = {}
    for name in TRAINABLE:
        for fixed in (False, True):
            folder = tmp_path_factory.mktemp(name)
            path = script(folder, (CORPUS / f"{name}.py").read_text("utf-8"))
            if fixed:
                fix_script(path)
            jobs[name, fixed] = (str(path), str(folder))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", RUNNER, json.dumps(list(jobs.values()))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return {key: (code, Path(job[1])) for (key, job), code in zip(jobs.items(), results, strict=True)}


def trained_adapter(folder: Path) -> bool:
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file) if file.exists() else {}
    return any("lora_B" in name and bool(tensor.any()) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", TRAINABLE)
def test_a_fixed_script_trains_an_adapter(name: str, runs: dict[tuple[str, bool], tuple[int, Path]]) -> None:
    code, folder = runs[name, True]
    assert code == 0, (folder / "log.txt").read_text()
    assert trained_adapter(folder)
    _, as_it_is = runs[name, False]
    assert not trained_adapter(as_it_is), "the corpus script trains an adapter as it is"


def cases(file: str) -> dict[str, str]:
    """Short scripts of the corpus by name, each after a line `## name`."""
    parts = [part.partition("\n") for part in (CORPUS / file).read_text("utf-8").split("## ")[1:]]
    return {name: code for name, _, code in parts}


IMPORTS = """
import copy
import torch
from torch import nn
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, Trainer, TrainingArguments
"""

INVALID = cases("invalid.txt")


@pytest.mark.parametrize("name", INVALID)
def test_every_issue_is_found(name: str, tmp_path: Path) -> None:
    assert codes(tmp_path, IMPORTS + INVALID[name]) == [name.split()[0]]


VALID = cases("valid.txt")


@pytest.mark.parametrize("name", VALID)
def test_no_false_alarm(name: str, tmp_path: Path) -> None:
    """With the line's `# else:` in its place, the issue is there, and is found."""
    lines = [line.partition("  # else: ") for line in VALID[name].splitlines()]
    indents = [line[: len(line) - len(line.lstrip())] for line, _, _ in lines]
    twin = [indent + other if mark else line for (line, mark, other), indent in zip(lines, indents, strict=True)]
    assert codes(tmp_path, IMPORTS + "\n".join(line for line, _, _ in lines)) == []
    assert codes(tmp_path, IMPORTS + "\n".join(twin)) == [name.split()[0]]


NOT_FIXABLE = cases("not_fixable.txt")


@pytest.mark.parametrize("reason", NOT_FIXABLE)
def test_what_is_not_certain_is_left_with_its_reason(reason: str, tmp_path: Path) -> None:
    imports = IMPORTS.replace(", get_peft_model", "") if reason == "something else" else IMPORTS
    path = script(tmp_path, imports + NOT_FIXABLE[reason])
    report = fix_script(path)
    assert report.fixed == [] and report.backup is None and report.diff == ""
    assert any(reason in issue.message for issue in report.left), report.left
    assert not any(issue.fixable for issue in report.left)
    assert [file.name for file in tmp_path.iterdir()] == ["train.py"] and path.read_text() == imports + NOT_FIXABLE[
        reason
    ]


MARKS = (("< ", "> "), ("> ", "< "))
FIXED = cases("fixed.txt")


@pytest.mark.parametrize("name", FIXED)
def test_fixes(name: str, tmp_path: Path) -> None:
    lines = FIXED[name].splitlines(keepends=True)  # "<" marks a line that goes, ">" one that comes
    before, after = ("".join(line.removeprefix(mark) for line in lines if line[:2] != other) for mark, other in MARKS)
    path = script(tmp_path, before)
    assert len(fix_script(path).fixed) == 1
    assert path.read_text() == after


@pytest.mark.parametrize("kind", ["crlf", "bom", "latin-1", "tabs", "no newline at the end"])
def test_a_fix_changes_nothing_else(kind: str, tmp_path: Path) -> None:
    text = (CORPUS / "invalid_saves_base.py").read_text("utf-8").replace("# finds L2 fixable", "#  as  it   was ;")
    original = {
        "crlf": text.replace("\n", "\r\n").encode(),
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "latin-1": ("# -*- coding: latin-1 -*-\n" + text.replace("prompt", "prömpt")).encode("latin-1"),
        "tabs": text.replace("    ", "\t").encode(),
        "no newline at the end": text.rstrip().encode(),
    }[kind]
    path = tmp_path / "train.py"
    path.write_bytes(original)
    report = fix_script(path)
    assert path.read_bytes() == original.replace(b"base_model.save_pretrained", b"model.save_pretrained")
    changed = [line for line in report.diff.splitlines()[2:] if line.startswith(("+", "-"))]
    assert len(changed) == 2 and report.left == []


def test_inserted_lines_end_as_the_others_do(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_bytes((CORPUS / "invalid_config_unused.py").read_bytes().replace(b"\n", b"\r\n"))
    assert fix_script(path).fixed
    assert path.read_bytes().count(b"\n") == path.read_bytes().count(b"\r\n")


def test_backups_are_kept_and_modes_too(tmp_path: Path) -> None:
    text = (CORPUS / "invalid_config_unused.py").read_text("utf-8")
    path = script(tmp_path, text)
    path.chmod(0o750)
    link = tmp_path / "link.py"
    link.symlink_to(path)
    assert fix_script(link).backup == str(tmp_path / "train.py.bak") and link.is_symlink()
    path.write_text(text, encoding="utf-8")
    assert fix_script(path).backup == str(tmp_path / "train.py.bak1")
    backups = [tmp_path / "train.py.bak", tmp_path / "train.py.bak1"]
    assert all(backup.read_text("utf-8") == text for backup in backups)
    assert {file.stat().st_mode & 0o777 for file in (path, *backups)} == {0o750}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.py", "train.py", "train.py.bak", "train.py.bak1"]
    changed = [
        line for line in difflib.ndiff(text.splitlines(), path.read_text("utf-8").splitlines()) if line[0] in "+-"
    ]
    assert changed == ["+ from peft import get_peft_model", "+ model = get_peft_model(model, lora_config)"]


def test_a_full_disk_leaves_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (CORPUS / "invalid_config_unused.py").read_text("utf-8")
    path = script(tmp_path, text)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        fix_script(path)
    assert path.read_text("utf-8") == text and [file.name for file in tmp_path.iterdir()] == ["train.py"]


def test_without_a_backup_nothing_is_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (CORPUS / "invalid_config_unused.py").read_text("utf-8")
    path = script(tmp_path, text)

    def refuse(path: Path, original: bytes) -> Path:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(lint_fixes, "_backup", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        fix_script(path)
    assert path.read_text("utf-8") == text and [file.name for file in tmp_path.iterdir()] == ["train.py"]


def test_a_script_that_changes_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(tmp_path, (CORPUS / "invalid_config_unused.py").read_text("utf-8"))
    check = lint_module._check

    def slow(*arguments):
        path.write_text("# edited\n")
        return check(*arguments)

    monkeypatch.setattr(lint_module, "_check", slow)
    with pytest.raises(ConfigError, match="changed while"):
        fix_script(path)
    assert path.read_text() == "# edited\n"


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (b"x = 1\nif x:\ny = 2\n", 3),
        (b"import os\nprint 'two'\n", 2),
        (b"x = 1\x00\n", 1),
        (b"# -*- coding: utf-8 -*-\nname = '\xff'\n", 2),
    ],
)
def test_what_is_not_python(source: bytes, line: int, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_bytes(source)
    for read in (lint, fix_script):
        with pytest.raises(ConfigError, match=rf"broken\.py:{line}: not readable as Python"):
            read(path)
    assert path.read_bytes() == source


@pytest.mark.parametrize("text", ["(" * 5000 + ")" * 5000, "+".join("1" * 5000), "-" * 20000 + "1"])
def test_nesting_without_end(text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.py.*nest"):
        lint(script(tmp_path, f"LoraConfig = {text}\n"))


def test_scripts_are_not_run(tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    text = (CORPUS / "invalid_config_unused.py").read_text("utf-8")
    path = script(tmp_path, f"open({str(witness)!r}, 'w').close()\n{text}")
    assert fix_script(path).fixed and lint(path) == []
    assert not witness.exists()


def test_run_lint_prints_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path, (CORPUS / "invalid_config_and_save.py").read_text("utf-8"))
    assert run_lint([path], as_json=True) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["num_files"] == 1 and values["fixed"] == [] and values["backups"] == {}
    (issue,) = values["issues"]
    assert (issue["code"], issue["source"], issue["row"], issue["fixable"]) == ("L1", f"{path}:23:12", 23, True)
    assert run_lint([path], fix=True, as_json=True) == 0
    values = json.loads(capsys.readouterr().out)
    assert [issue["code"] for issue in values["fixed"]] == ["L1", "L2"] and values["issues"] == []
    assert values["backups"] == {str(path): f"{path}.bak"}


def test_notes_do_not_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_lint([CORPUS / "note_fp16.py"]) == 0
    assert "0 error(s), 2 note(s)" in capsys.readouterr().out
    assert run_lint([CORPUS / "invalid_labels.py"]) == 1


def test_run_lint_prints_the_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = script(tmp_path, (CORPUS / "invalid_saves_base.py").read_text("utf-8"))
    run_lint([path])
    printed = capsys.readouterr().out
    assert "train.py:32:5" in printed and "L2" in printed and "base_model is not what was trained" in printed
    run_lint([path], fix=True)
    printed = capsys.readouterr().out
    assert "fixed L2; the original is" in printed and "+    model.save_pretrained(" in printed


def tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def test_peft_does_what_the_rules_say_of_it(tmp_path: Path) -> None:
    """Guards against rules on what PEFT no longer does: each of these freezes, misses or loses the adapter."""
    config, adapter, dropped = LoraConfig(r=2, target_modules=["q_proj"]), str(tmp_path / "a"), str(tmp_path / "d")
    get_peft_model(tiny_model(), config).save_pretrained(adapter)
    native, base = tiny_model(), tiny_model()
    native.load_adapter(adapter)
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad])
    peft_model, inner = get_peft_model(base, config), get_peft_model(tiny_model(), config)
    inner.get_base_model().requires_grad_(False)
    for_inference = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], inference_mode=True))
    frozen = {
        "L9 loaded": PeftModel.from_pretrained(tiny_model(), adapter),
        "L9 by transformers": native,
        "L9 inference_mode": for_inference,
        "L10 base": inner,
        "L10 kbit": prepare_model_for_kbit_training(get_peft_model(tiny_model(), config)),
    }
    assert [name for name, model in frozen.items() if any(p.requires_grad for p in model.parameters())] == []
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not optimized & {id(parameter) for name, parameter in peft_model.named_parameters() if "lora_" in name}
    peft_model.merge_and_unload()
    peft_model.save_pretrained(dropped)
    assert load_file(f"{dropped}/adapter_model.safetensors") == {}

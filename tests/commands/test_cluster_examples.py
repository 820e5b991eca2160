"""The recipes for clusters: shell and YAML parse, options and flags exist, the Slurm script requeues when it should."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from speechtune.cli import build_parser
from speechtune.config import RunConfig, option_names

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"
DOCUMENT = Path(__file__).parents[2] / "docs" / "distributed.md"
SLURM = CLUSTER / "slurm.sbatch"
FLAG = re.compile(r"--[\w-]+")


def sky() -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())


def commands(path: Path) -> str:
    """The text of a file with continued lines joined and lines of comment left out."""
    lines = [line for line in path.read_text().splitlines() if not re.match(r"\s*#", line)]
    return re.sub(r"\\\n\s*", " ", "\n".join(lines))


def scripts() -> dict[str, str]:
    task = sky()
    blocks = re.findall(r"```\n(.*?)```", (CLUSTER / "README.md").read_text(), re.DOTALL)
    return {"slurm": SLURM.read_text(), "setup": task["setup"], "run": task["run"], "readme": "\n".join(blocks)}


@pytest.mark.parametrize("name", ["slurm", "setup", "run", "readme"])
def test_bash_accepts_it(name: str) -> None:
    check = subprocess.run(["bash", "-n"], input=scripts()[name], text=True, capture_output=True, check=False)
    assert scripts()[name].strip() and check.returncode == 0 and not check.stderr, check.stderr


def test_the_task_of_skypilot_recovers_and_keeps_its_outputs() -> None:
    task = sky()
    assert task["resources"]["use_spot"] and task["num_nodes"] > 1
    (mount,) = task["file_mounts"]
    assert f"output_dir={mount}/" in task["run"] and "checkpoint.resume=auto" in task["run"]


FILES = [SLURM, CLUSTER / "skypilot.yaml", CLUSTER / "README.md", DOCUMENT]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_named_exists(path: Path) -> None:
    """Options of speechtune, its verbs, and the flags of torchrun."""
    text = commands(path)
    options = set(re.findall(r"\b((?:[a-z]+\.)?[a-z_]+)=", text)) - {"output_dir"}
    dotted = {name for name in options if "." in name}
    assert "checkpoint.resume" in dotted and dotted <= set(option_names(RunConfig)), dotted - set(
        option_names(RunConfig)
    )
    verbs = set(re.findall(r"-m speechtune ([a-z]+)", text))
    known = next(action.choices for action in build_parser()._actions if action.metavar == "VERB")
    assert "train" in verbs and known is not None and verbs <= set(known)
    flags = {
        flag for line in re.findall(r"torchrun (.*?)-m speechtune", text) for flag in re.findall(r"--[\w-]+", line)
    }
    torchrun = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    assert flags and flags <= torchrun, flags - torchrun


# -- the Slurm script, with stand-ins for Slurm's commands ------------------------------------------------------------

SRUN = """#!/bin/bash
echo "$@" > "$SAID/srun.told"
trap 'echo > "$SAID/terminated"; exit 1' TERM
[[ $1 == --kill-on-bad-exit=1 ]] || exit 99
case $DOES in
    finish) echo '{}' > "$OUTPUT/summary.json"; exit 0 ;;
    lose) sleep 0.05; mkdir -p "$OUTPUT/checkpoint-5"; echo > "$OUTPUT/checkpoint-5/MANIFEST.json"; exit 1 ;;
    fail) exit 1 ;;
    train) echo $$ > "$SAID/pid"; while :; do sleep 0.05; done ;;
esac
"""
SCANCEL = '#!/bin/bash\necho "$@" > "$SAID/scancel.told"\nkill -TERM "$(cat "$SAID/pid")"\n'
SCONTROL = '#!/bin/bash\nif [[ $1 == show ]]; then echo node-a; echo node-b; else echo "$@" > "$SAID/requeue"; fi\n'


@pytest.fixture
def slurm(tmp_path: Path) -> Any:
    """Start the script where the run `does` something; returns the process. Stand-ins write what they are told."""
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "output").mkdir()
    job = {
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_ID": "7",
    }
    places = {"SAID": str(tmp_path), "OUTPUT": str(tmp_path / "output"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def start(does: str) -> subprocess.Popen[str]:
        arguments = ["bash", str(SLURM), "my.yaml", str(tmp_path / "output"), "train.epochs=1"]
        return subprocess.Popen(arguments, env={**os.environ, **job, **places, "DOES": does}, text=True)

    return start


def test_slurm_finishes(slurm: Any, tmp_path: Path) -> None:
    assert slurm("finish").wait(20) == 0 and not (tmp_path / "requeue").exists()
    told = (tmp_path / "srun.told").read_text()
    assert "--nnodes=2 --nproc-per-node=8" in told and "--rdzv-endpoint=node-a:29500" in told
    assert told.rstrip().endswith(f"train my.yaml output_dir={tmp_path}/output checkpoint.resume=auto train.epochs=1")


def test_slurm_requeues_after_a_loss_but_not_after_a_mistake(slurm: Any, tmp_path: Path) -> None:
    assert slurm("fail").wait(20) == 1 and not (tmp_path / "requeue").exists()
    assert slurm("lose").wait(20) == 1 and (tmp_path / "requeue").read_text() == "requeue 7\n"


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_lets_the_run_save(number: signal.Signals, requeued: bool, slurm: Any, tmp_path: Path) -> None:
    """Out of time: the ranks are told and the job goes back into the queue; cancelled: they are told, and it ends."""
    script = slurm("train")
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)  # until the script has set its traps
    script.send_signal(number)
    assert script.wait(20) == 1 and (tmp_path / "terminated").exists()
    assert (tmp_path / "scancel.told").read_text() == "--signal=TERM 7.0\n"
    assert (tmp_path / "requeue").exists() is requeued

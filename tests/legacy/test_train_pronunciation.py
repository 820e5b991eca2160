"""The pronunciation pipeline's command line: every flag lands, none is swallowed, and a real run leaves an adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from assessment_helpers import write_folder
from speechtune.config import RunConfig, shipped_recipes
from speechtune.families import load_config
from speechtune.families.phi4_multimodal import tiny as tiny_phi4
from speechtune.legacy import train_pronunciation as phi4_original
from speechtune.legacy.train_pronunciation import CONFIGS, FLAGS, VISIBLE, build_parser, configure, main
from speechtune.storage.verified_folder import verify_folder

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "src/train_single_config_remote.py"
DOCUMENTED = (
    "--config --train-data --epochs --batch-size --gradient-accumulation --learning-rate --gpus --fp16 "
    "--deepspeed --fsdp"
)
AT_IMPORT_OF_TORCH = """
import importlib.abc, os, runpy, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print("torch" in sys.modules, os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
            os._exit(7)
sys.meta_path.insert(0, Watch())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Replaced(Exception):
    """Stands for the moment when torchrun takes the place of this process."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three utterances of two speakers for training, in the official layout."""
    return write_folder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base with a speech LoRA of rank 4."""
    folder = tmp_path_factory.mktemp("tiny-phi4") / "base"
    tiny_phi4.make_model(folder, ["HI LISA"], speech_lora_rank=4)
    return folder


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`main` sets the variable; each test begins without it and without torchrun's."""
    monkeypatch.setenv(VISIBLE, "")
    for name in (VISIBLE, "RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations that would have been trained."""
    configs: list[RunConfig] = []

    def train(config: RunConfig, *, resume: str) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr("speechtune.commands.train.train", train)
    return configs


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have taken the place of this process."""
    commands: list[list[str]] = []

    def replace(_: str, command: list[str]) -> None:
        commands.append(command)
        raise Replaced

    monkeypatch.setattr("speechtune.legacy.train_pronunciation.os.execv", replace)
    return commands


def machine(monkeypatch: pytest.MonkeyPatch, usable: int, *, nvidia: bool) -> None:
    monkeypatch.setattr(phi4_original, "usable_gpus", lambda: usable)
    monkeypatch.setattr(phi4_original, "has_nvidia_device", lambda: nvidia)


def resolve(*flags: str, config: str = "paper_r64") -> RunConfig:
    return configure(build_parser().parse_args(["--config", config, *flags]))


def value_of(config: RunConfig, option: str) -> Any:
    value: Any = config
    for part in option.split("."):
        value = getattr(value, part)
    return value


def script(*flags: str | Path, code: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in (VISIBLE, "RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, *(["-c", code] if code else []), str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


def test_every_flag_of_the_original_is_taken() -> None:
    known = {name for action in build_parser()._actions for name in action.option_strings}
    assert set(DOCUMENTED.split()) <= known


@pytest.mark.parametrize("config", CONFIGS)
def test_the_defaults_shown_are_what_the_recipe_says(config: str) -> None:
    """A flag that is not given leaves the recipe's value; the help must not promise another."""
    recipe = load_config(shipped_recipes()[config])
    assert resolve(config=config) == recipe
    assert recipe.output_dir == Path("output", config)
    for flag in FLAGS:
        if flag.default is not None:
            assert value_of(recipe, flag.option) == (
                Path(flag.default) if flag.option == "data.train" else flag.default
            )
    assert recipe.train.precision == "auto" and recipe.checkpoint.resume is None


def test_the_two_recipes_differ_in_the_adapter_only() -> None:
    paper, pretrained = (load_config(shipped_recipes()[name]) for name in ("paper_r64", "pretrained_r320"))
    assert (paper.lora.rank, paper.lora.alpha, paper.lora.dropout, paper.model.speech_lora) == (64, 128, 0.05, "merge")
    own = (pretrained.lora.rank, pretrained.lora.alpha, pretrained.lora.dropout, pretrained.model.speech_lora)
    assert own == (320, 640, 0.01, "continue")
    assert (paper.train, paper.data, paper.evaluate) == (pretrained.train, pretrained.data, pretrained.evaluate)
    assert paper.train.gradient_checkpointing and paper.data.validation_split == 0.1


GIVEN = {
    "--train-data": ("folder: a/#1", Path("folder: a/#1")),
    "--epochs": ("0.5", 0.5),
    "--batch-size": ("2", 2),
    "--gradient-accumulation": ("3", 3),
    "--learning-rate": ("1e-5", 1e-5),
    "--seed": ("7", 7),
    "--eval-data": ("held_out.jsonl", Path("held_out.jsonl")),
    "--output": ("1e5", Path("1e5")),
    "--model": ("null", "null"),
    "--speech-lora-path": ("väljund", Path("väljund")),
    "--resume": ("output/paper_r64/checkpoint-70", "output/paper_r64/checkpoint-70"),
}
OPTIONS = {flag.name: flag.option for flag in FLAGS} | {"--resume": "checkpoint.resume"}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_flag_replaces_the_value_of_the_recipe_and_no_other(name: str) -> None:
    """Texts reach their option as they are, also those that YAML reads as something else."""
    text, expected = GIVEN[name]
    changed, recipe = resolve(name, text).model_dump(), resolve().model_dump()
    assert value_of(resolve(name, text), OPTIONS[name]) == expected
    along = {"--eval-data": ["data.validation_split"], "--model": ["model.revision"]}.get(name, [])
    for option in [OPTIONS[name], *along]:
        *sections, key = option.split(".")
        for values in (changed, recipe):
            del (values[sections[0]] if sections else values)[key]
    assert changed == recipe


def test_what_comes_along_with_a_flag() -> None:
    """A revision belongs to one repository, and two evaluation sets contradict each other."""
    native = resolve().model.revision
    assert native == "refs/pr/70"
    assert resolve("--model", "folder").model.revision is None
    assert resolve("--model", resolve().model.path).model.revision == native
    assert resolve("--model", "own/copy", "--set", "model.revision=v1").model.revision == "v1"
    assert resolve("--eval-data", "e.jsonl").data.validation_split == 0
    assert resolve("--fp16").train.precision == "fp16"
    assert resolve("--resume").checkpoint.resume == "auto"
    assert resolve("--seed", "1", "--set", "train.seed=2", "--set", "lora.rank=8").train.seed == 2


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--config", "paper_r32"], ["paper_r64"]),
        (["--train-data", "x"], ["--config"]),
        (["--config", "paper_r64", "--learning-rat", "1"], ["--learning-rat"]),
        (["--config", "paper_r64", "--learn", "1"], ["--learn"]),
        (["--config", "paper_r64", "--epochs", "many"], ["many"]),
        (["--config", "paper_r64", "--gpus", "0,zero"], ["0,zero", "GPU numbers"]),
        (["--config", "paper_r64", "--gpus", "0,0"], ["0,0"]),
        (["--config", "paper_r64", "--trust-remote-code"], ["--trust-remote-code"]),
    ],
)
def test_flags_that_cannot_be_read_are_refused(
    flags: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--deepspeed"], ["--deepspeed", "--gpus 0,1", "gradient checkpointing"]),
        (["--deepspeed", "zero2.json"], ["--deepspeed", "DDP"]),
        (["--fsdp"], ["--fsdp", "DDP"]),
        (["--train-data", "nowhere/train.jsonl"], ["--train-data nowhere/train.jsonl: no such file"]),
        (["--train-data", ".", "--eval-data", "nowhere/test"], ["--eval-data nowhere/test: no such file"]),
        (["--epochs", "-1"], ["--epochs: Input should be"]),
        (["--set", "lora.rnk=8"], ["lora.rank"]),
        (["--eval-data", "e.jsonl", "--set", "data.validation_split=0.1"], ["remove one"]),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_message(
    flags: list[str], parts: list[str], trained: list[RunConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", "paper_r64", *flags]) == 2
    message = capsys.readouterr().err
    assert trained == [] and all(part in message for part in parts), message


def test_data_of_every_kind_passes_the_first_look(corpus: Path, trained: list[RunConfig], tmp_path: Path) -> None:
    """`DIR/train` may be a split of DIR without being a folder, as in the hub's copy."""
    jsonl = tmp_path / "tasks.jsonl"
    jsonl.touch()
    for data in (corpus, corpus / "train", tmp_path / "train", jsonl):
        assert main(["--config", "paper_r64", "--train-data", str(data)]) == 0
    assert len(trained) == 4


@pytest.mark.parametrize(("flags", "expected"), [([], "0"), (["--gpus", "3"], "3"), (["--gpus", "1,2"], "1,2")])
def test_gpus_are_chosen_before_torch_is_imported(flags: list[str], expected: str, corpus: Path) -> None:
    """CUDA reads the variable once; set after the import it may do nothing."""
    result = script("--config", "paper_r64", "--train-data", corpus, *flags, code=AT_IMPORT_OF_TORCH)
    assert (result.stdout.split(), result.returncode) == (["False", expected], 7), result.stderr


def test_help_needs_no_torch() -> None:
    result = script("--help", code=AT_IMPORT_OF_TORCH)
    assert result.returncode == 0 and "--gradient-accumulation" in result.stdout


def test_the_variable_wins_where_no_gpus_are_named(
    corpus: Path, trained: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler hands out GPUs by the variable; a default must not take another job's."""
    monkeypatch.setenv(VISIBLE, "3")
    assert main(["--config", "paper_r64", "--train-data", str(corpus)]) == 0
    assert os.environ[VISIBLE] == "3"


def test_several_gpus_start_torchrun_with_the_same_flags(
    corpus: Path, launched: list[list[str]], trained: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 2, nvidia=True)
    flags = ["--config", "paper_r64", "--train-data", str(corpus), "--gpus", "0,1", "--set", "train.seed=1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    with pytest.raises(Replaced):
        main()
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert launched == [[*start, str(SCRIPT), *flags]]
    assert (trained, os.environ[VISIBLE]) == ([], "0,1")

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert main() == 0
    assert len(launched) == 1 and len(trained) == 1


def test_torchrun_by_hand_keeps_its_gpus(
    corpus: Path, trained: list[RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a default of "0" every process but the first would find no GPU."""
    machine(monkeypatch, 2, nvidia=True)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    flags = ["--config", "paper_r64", "--train-data", str(corpus)]
    assert main(flags) == 0 and VISIBLE not in os.environ
    assert main([*flags, "--gpus", "0"]) == 2
    assert "2 processes for 1 GPU" in capsys.readouterr().err


def test_one_gpu_needs_no_torchrun(
    corpus: Path, launched: list[list[str]], trained: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, 1, nvidia=True)
    assert main(["--config", "paper_r64", "--train-data", str(corpus), "--gpus", "1"]) == 0
    assert (launched, len(trained)) == ([], 1)


def test_gpus_on_a_machine_without_any(
    corpus: Path,
    launched: list[list[str]],
    trained: list[RunConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The flag is noted, not obeyed and not swallowed."""
    machine(monkeypatch, 0, nvidia=False)
    assert main(["--config", "paper_r64", "--train-data", str(corpus), "--gpus", "0,1"]) == 0
    assert "--gpus 0,1: this machine has no GPU; training on the CPU" in capsys.readouterr().err
    assert (launched, len(trained)) == ([], 1)


@pytest.mark.parametrize(("gpus", "usable"), [("0,1", 1), ("5", 0), ("0,1,2", 0)])
def test_gpus_that_are_not_there(
    gpus: str, usable: int, corpus: Path, trained: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA drops unknown numbers without a word: the run would take days on the CPU, or fewer GPUs than named."""
    machine(monkeypatch, usable, nvidia=True)
    assert main(["--config", "paper_r64", "--train-data", str(corpus), "--gpus", gpus]) == 2
    assert trained == []


def test_the_cpu_can_be_asked_for(corpus: Path, trained: list[RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, 0, nvidia=True)
    assert main(["--config", "paper_r64", "--train-data", str(corpus), "--gpus", ""]) == 0
    assert os.environ[VISIBLE] == "" and len(trained) == 1


def test_half_precision_is_refused_on_a_cpu(tiny: Path, corpus: Path, tmp_path: Path) -> None:
    flags = ["--config", "paper_r64", "--fp16", "--gpus", "", "--set", "lora.rank=4", "--set", "tracking.trackers=[]"]
    result = script(*flags, "--train-data", corpus, "--model", tiny, "--output", tmp_path / "output")
    assert result.returncode == 2 and "train.precision=fp16 is for GPUs" in result.stderr, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("config", "mode"), [("paper_r64", "merge"), ("pretrained_r320", "continue")])
def test_a_whole_run(config: str, mode: str, tiny: Path, corpus: Path, tmp_path: Path) -> None:
    """Both recipes train for real: two steps, an evaluation on a held-out speaker, and a proven adapter."""
    output = tmp_path / "run"
    flags = ["--config", config, "--epochs", "3", "--batch-size", "2", "--gradient-accumulation", "1", "--gpus", "0"]
    small = ["train.max_steps=2", "lora.rank=4", "lora.alpha=8", "data.validation_split=0.5", "tracking.trackers=[]"]
    settings = [part for setting in small for part in ("--set", setting)]
    result = script(*flags, *settings, "--train-data", corpus, "--model", tiny, "--output", output)
    assert result.returncode == 0, result.stderr[-3000:]
    adapter = output / "lora_adapters"
    assert verify_folder(adapter) == []
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
    assert json.loads((adapter / "base_recipe.json").read_text())["prepared"]["speech_lora"]["mode"] == mode
    summary = json.loads((output / "summary.json").read_text())
    assert (
        summary["proof"]["base_unchanged"] and summary["proof"]["lora_b_moved"] == summary["proof"]["lora_b_total"] > 0
    )
    assert set(summary["last_losses"]) == {"APA", "MDD"}
    resolved = yaml.safe_load((output / "config.yaml").read_text())
    assert (resolved["train"]["batch_size"], resolved["lora"]["rank"], resolved["model"]["revision"]) == (2, 4, None)

    again = script(*flags, *settings, "--train-data", corpus, "--model", tiny, "--output", output)
    assert again.returncode == 2 and "checkpoints of an earlier run" in again.stderr, again.stderr

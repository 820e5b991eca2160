"""save_lora_adapters: the trained adapter is found behind every wrapper, written and compared; the rest is refused."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from speechtune.errors import AdapterError, CheckpointError, SpeechtuneError
from speechtune.lora.apply import load_adapter
from speechtune.lora.files import read_adapter
from speechtune.lora.save import save_lora_adapters
from speechtune.storage.verified_folder import verify_folder

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
from lora_saving_example import SENTENCES, collate, make_base  # noqa: E402  # pyright: ignore[reportMissingImports]

SUCCESS = "LoRA adapters saved and verified"
FILES = ["MANIFEST.json", "README.md", "adapter_config.json", "adapter_model.safetensors"]


def settings() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])


def trained(base: nn.Module | None = None, name: str = "default") -> PeftModel:
    """An adapter as after a training: every tensor random."""
    base = make_base() if base is None else base
    model = get_peft_model(base, settings(), adapter_name=name)  # pyright: ignore[reportArgumentType]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()  # pyright: ignore[reportReturnType]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**collate(list(SENTENCES))).logits


@pytest.fixture
def lines() -> Iterator[list[str]]:
    """Lines of the speechtune logger, level first, from DEBUG up."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            trace = " + traceback" if record.exc_info else ""
            said.append(f"{record.levelname} {record.getMessage()}{trace}")

    log, handler = logging.getLogger("speechtune"), Keep()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    yield said
    log.setLevel(level)
    log.removeHandler(handler)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Wrapper(nn.Module):
    """As people write them: the model is an attribute, and there is no save_pretrained."""

    def __init__(self, model: nn.Module, registered: bool = True) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)
        if registered:
            self.model = model
        else:
            self.__dict__["model"] = model  # as accelerate keeps `_orig_mod`; modules() does not see it


def prepared(model: nn.Module) -> nn.Module:
    from accelerate import Accelerator

    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "own module": Wrapper,
    "own module, plain attribute": lambda model: Wrapper(model, registered=False),
    "DDP": DistributedDataParallel,
    "torch.compile": torch.compile,  # pyright: ignore[reportAssignmentType]
    "accelerate": prepared,
    "compiled DDP around an own module": lambda model: torch.compile(DistributedDataParallel(Wrapper(model))),  # pyright: ignore
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_adapter_is_found_behind_every_wrapper(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if "DDP" in name:
        request.getfixturevalue("process_group")
    model = trained()
    expected, wanted = get_peft_model_state_dict(model), logits(model)

    folder = save_lora_adapters(WRAPPERS[name](model), tmp_path / "out" / "lora_adapters")

    assert folder == tmp_path / "out" / "lora_adapters" and sorted(path.name for path in folder.iterdir()) == FILES
    assert verify_folder(folder) == []
    stored = load_file(folder / "adapter_model.safetensors")
    assert stored.keys() == expected.keys() and all(torch.equal(stored[key], expected[key]) for key in stored)
    assert torch.equal(logits(PeftModel.from_pretrained(make_base(), str(folder))), wanted)
    assert torch.equal(logits(load_adapter(make_base(), read_adapter(folder))), wanted)
    assert os.listdir(tmp_path / "out") == ["lora_adapters"]


def compiled_before_lora() -> PeftModel:
    return trained(torch.compile(make_base()))  # pyright: ignore[reportArgumentType]


def compiled_by_layer() -> PeftModel:
    """As accelerate's regional compilation leaves a model."""
    model = trained()
    for name in ("0", "1"):
        layers = model.get_submodule("base_model.model.model.layers")
        setattr(layers, name, torch.compile(layers.get_submodule(name)))
    return model


@pytest.mark.parametrize("make", [compiled_before_lora, compiled_by_layer])
def test_compiled_parts_are_saved_under_names_a_plain_base_has(make: Callable[[], PeftModel], tmp_path: Path) -> None:
    model = make()
    assert all("_orig_mod" in key for key in get_peft_model_state_dict(model))
    folder = save_lora_adapters(model, tmp_path / "lora_adapters")
    assert torch.equal(logits(PeftModel.from_pretrained(make_base(), str(folder))), logits(trained()))


def test_an_adapter_with_a_name_of_its_own_lies_where_peft_looks(tmp_path: Path) -> None:
    folder = save_lora_adapters(trained(name="voice"), tmp_path / "lora_adapters")
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert torch.equal(logits(PeftModel.from_pretrained(make_base(), str(folder))), logits(trained()))


def test_of_two_adapters_the_trained_one_is_saved(tmp_path: Path) -> None:
    model = trained()
    model.add_adapter("speech", settings())
    model.set_adapter("speech")
    with pytest.raises(AdapterError, match="never trained"):
        save_lora_adapters(model, tmp_path / "lora_adapters")
    model.set_adapter("default")
    model.requires_grad_(False)  # as after loading for inference: then the active one
    save_lora_adapters(model, tmp_path / "lora_adapters")
    model.base_model.set_adapter(["default", "speech"])  # pyright: ignore[reportCallIssue]
    with pytest.raises(AdapterError, match="set_adapter"):
        save_lora_adapters(model, tmp_path / "lora_adapters")


@pytest.mark.parametrize(("option", "saved"), [("auto", True), (True, True), (False, False)])
def test_embeddings_of_a_resized_vocabulary(option: bool | str, saved: bool, tmp_path: Path) -> None:
    make_base().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(130)
    folder = save_lora_adapters(trained(base), tmp_path / "lora_adapters", save_embedding_layers=option)  # pyright: ignore[reportArgumentType]
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert any("embed_tokens" in name for name in names) == saved and verify_folder(folder) == []


# -- what is refused ---------------------------------------------------------------------------------------------


def injected() -> nn.Module:
    base = make_base()
    base.add_adapter(settings())
    return base


def with_values(mark: str, value: float) -> PeftModel:
    model = trained()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if mark in name:
                parameter.fill_(value)
    return model


def prompt_tuned() -> nn.Module:
    return get_peft_model(make_base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))  # pyright: ignore


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no LoRA": (make_base, "got LlamaForCausalLM.*get_peft_model was never applied"),
    "no LoRA in a wrapper": (lambda: Wrapper(make_base()), "got Wrapper.*get_peft_model was never applied"),
    "merged": (lambda: trained().merge_and_unload(), "got LlamaForCausalLM"),  # pyright: ignore[reportCallIssue]
    "injected": (injected, "has LoRA layers but is no PeftModel"),
    "two models": (lambda: nn.ModuleList([trained(), trained()]), "holds 2 PeftModels"),
    "applied twice": (lambda: trained(trained()), "applied twice"),
    "never trained": (lambda: with_values("lora_B", 0.0), "all 4 lora_B are exactly zero"),
    "NaN": (lambda: with_values("layers.1.self_attn.q_proj.lora_A", float("nan")), "1 of 8 .*layers.1.*q_proj.lora_A"),
    "infinity": (lambda: with_values("lora_B", float("inf")), "4 of 8 .*NaN or infinity"),
    "another method": (prompt_tuned, "no LoRA adapter"),
    "not in memory": (lambda: trained().to("meta"), "sharded or not in memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_trained_adapter_is_refused(name: str, tmp_path: Path, lines: list[str]) -> None:
    make, message = REFUSED[name]
    with pytest.raises(AdapterError, match=message):
        save_lora_adapters(make(), tmp_path / "out" / "lora_adapters")
    assert os.listdir(tmp_path) == []
    assert not any(SUCCESS in line for line in lines)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("version", [1, 2])
def test_sharded_models_are_refused(version: int, tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    if version == 1:
        model = FullyShardedDataParallel(trained(), device_id=torch.device("cpu"), use_orig_params=True)
    else:
        model = trained()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(AdapterError, match="sharded"):
        save_lora_adapters(model, tmp_path / "out" / "lora_adapters")
    assert not (tmp_path / "out").exists()


def test_an_untrained_adapter_is_saved_when_asked_for(tmp_path: Path) -> None:
    folder = save_lora_adapters(with_values("lora_B", 0.0), tmp_path / "a", allow_untrained=True)
    assert verify_folder(folder) == []


def test_other_processes_leave_the_saving_to_the_main_one(tmp_path: Path, lines: list[str]) -> None:
    save_lora_adapters(trained(), tmp_path / "lora_adapters", is_main_process=False)
    assert os.listdir(tmp_path) == [] and lines == []


# -- places -------------------------------------------------------------------------------------------------------


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that refuses writes also to root: a read-only file system where we may mount one."""
    place = tmp_path / "read-only"
    place.mkdir()
    if os.geteuid():
        place.chmod(0o555)
        yield place
        return
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(place)], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no right to mount a file system here: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_read_only_place_is_named_with_its_cure(read_only: Path, lines: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"read-only.*write to|no permission.*write elsewhere"):
        save_lora_adapters(trained(), read_only / "lora_adapters")
    assert_failed(lines, "CheckpointError", str(read_only))


def assert_failed(lines: list[str], *parts: str) -> None:
    """The failure is logged with type, place and cure, its traceback follows, and no success is claimed after it."""
    error = next(index for index, line in enumerate(lines) if line.startswith("ERROR"))
    assert all(part in lines[error] for part in parts), lines[error]
    assert lines[error + 1 :] == ["DEBUG where it failed: + traceback"]
    assert not any(SUCCESS in line for line in lines)


def test_too_little_space_is_noticed_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(PeftModel, "save_pretrained", lambda *_, **__: pytest.fail("written all the same"))
    with pytest.raises(CheckpointError, match="free space or write"):
        save_lora_adapters(trained(), tmp_path / "out" / "lora_adapters")
    assert_failed(lines, "CheckpointError", "GB free")


def test_only_an_older_adapter_is_replaced(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folder = save_lora_adapters(with_values("lora_A", 1.0), run / "lora_adapters")
    with pytest.raises(CheckpointError, match="exists already"):
        save_lora_adapters(trained(), folder, replace=False)
    save_lora_adapters(trained(), folder, model_card="# new")
    assert (folder / "README.md").read_text() == "# new" and verify_folder(folder) == []

    with pytest.raises(CheckpointError, match=r"more than an adapter.*lora_adapters"):
        save_lora_adapters(trained(), run)  # the whole run would go
    assert verify_folder(folder) == []
    (tmp_path / "file").write_text("precious")
    with pytest.raises(CheckpointError, match="a file stands"):
        save_lora_adapters(trained(), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "precious"


# -- lines and failures --------------------------------------------------------------------------------------------


def test_the_steps_are_logged_in_order(tmp_path: Path, lines: list[str]) -> None:
    folder = save_lora_adapters(Wrapper(trained()), tmp_path / "out" / "lora_adapters")
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    expected = [
        "LoRA flag is set, attempting to save LoRA adapters...",
        "Model to save type: PeftModel, found inside Wrapper",
        "Adapter: 8 tensors, 512 parameters, 4 of 4 lora_B trained",
        f"Output directory created: {tmp_path / 'out'}",
        "Write test passed: 2048 bytes needed, ",
        *(f"  {name}  {sizes[name]} bytes" for name in FILES),
        "Verified: 8 tensors read back equal to those in memory, MANIFEST.json written",
        f"{SUCCESS} in {folder}",
    ]
    assert len(lines) == len(expected)
    assert all(line.startswith(f"INFO {start}") for line, start in zip(lines, expected, strict=True)), lines


def raises(*_: object, **__: object) -> None:
    raise RuntimeError("CUDA error: device-side assert")


def writes_nothing(*_: object, **__: object) -> None:
    pass


def writes_an_empty_file(_: object, directory: str, **__: object) -> None:
    (Path(directory) / "adapter_model.safetensors").touch()


def writes_another_model(_: object, directory: str, **__: object) -> None:
    other = get_peft_model_state_dict(with_values("lora_A", 3.0))
    save_file(other, Path(directory) / "adapter_model.safetensors")


def fills_the_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


FAILURES = {
    raises: "PEFT could not write adapter 'default': RuntimeError: CUDA error",
    writes_nothing: "read back 0 tensors of 8",
    writes_an_empty_file: "empty after writing",
    writes_another_model: "reads back different",
    fills_the_disk: "the disk is full: free space",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_save_that_fails_raises_and_leaves_the_older_adapter(
    failure: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    older = save_lora_adapters(with_values("lora_A", 1.0), tmp_path / "lora_adapters")
    lines.clear()
    monkeypatch.setattr(PeftModel, "save_pretrained", failure)
    with pytest.raises(SpeechtuneError, match=FAILURES[failure]):
        save_lora_adapters(trained(), tmp_path / "lora_adapters")
    assert verify_folder(older) == [] and os.listdir(tmp_path) == ["lora_adapters"]
    assert_failed(lines, "CheckpointError", "lora_adapters")


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = trained().train()
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.peft_config["default"])
    flags = [parameter.requires_grad for parameter in model.parameters()]
    save_lora_adapters(model, tmp_path / "lora_adapters")
    assert model.training and [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.peft_config["default"].inference_mode == config.inference_mode


# -- the tools ------------------------------------------------------------------------------------------------------


def run_tool(*arguments: str | Path, folder: Path, speechtune: bool = False) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent / "src") if speechtune else ""}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


ALONE = """
import sys
sys.modules["speechtune"] = None  # an import of it would fail
sys.path.insert(0, sys.argv[1])
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from patched import save_lora_adapters

def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 4))

def refused(model, folder, kind):
    try:
        save_lora_adapters(model, folder)
    except kind as error:
        print("refused:", error)

model = get_peft_model(base(), LoraConfig(target_modules=["0"], r=2))
refused(base(), "a", TypeError)
refused(model, "a", ValueError)
weights = {name: p for name, p in model.named_parameters() if "lora_B" in name}
with torch.no_grad():
    for p in weights.values():
        p.normal_()
save_lora_adapters(torch.compile(torch.nn.ModuleDict({"inner": model})), "out/lora_adapters")
refused(model, "out/lora_adapters", FileExistsError)
loaded = PeftModel.from_pretrained(base(), "out/lora_adapters")
x = torch.ones(1, 4)
assert torch.equal(loaded(x), model.eval()(x))
import patched
patched.load_file = lambda path: {name: tensor + 1 for name, tensor in model.state_dict().items()}
refused(model, "b", OSError)
with torch.no_grad():
    next(iter(weights.values()))[0, 0] = float("nan")
refused(model, "c", ValueError)
"""


def test_the_standalone_function_does_the_same_without_speechtune(tmp_path: Path) -> None:
    printed = run_tool(TOOLS / "lora_saving_patch.py", folder=tmp_path)
    assert printed.returncode == 0 and printed.stdout == (TOOLS / "standalone_lora_saving.py").read_text()
    (tmp_path / "patched.py").write_text(printed.stdout)

    done = run_tool("-c", ALONE, tmp_path, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    reasons = ["was get_peft_model applied", "never trained", "saved, read back", "exists", "different", "NaN"]
    said = done.stdout.splitlines()
    assert len(said) == len(reasons) and all(reason in line for reason, line in zip(reasons, said, strict=True)), said
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] != "_") == ["out", "patched.py"]
    assert os.listdir(tmp_path / "out") == ["lora_adapters"]


def test_the_example_saves_and_loads(tmp_path: Path) -> None:
    done = run_tool(TOOLS / "lora_saving_example.py", "--steps", "4", folder=tmp_path, speechtune=True)
    assert done.returncode == 0, done.stderr
    folders = ["checkpoint-2/lora_adapters", "checkpoint-4/lora_adapters", "lora_adapters"]
    said = [line for line in done.stdout.splitlines() if "lora" in line or "PEFT" in line]
    for folder, line in zip(folders, said, strict=False):
        assert line == f"lora-saving-example/{folder}: every byte is as it was written"
        assert verify_folder(tmp_path / "lora-saving-example" / folder) == []
    assert said[-1].endswith("greatest difference of logits 0") and done.stderr.count(SUCCESS) == 3


def test_training_scripts_are_listed_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import transformers as t, peft\nclass My(t.Seq2SeqTrainer):\n    pass\n"
        "open('ran', 'w')\nm = peft.get_peft_model(b, peft.LoraConfig(r=8))\nMy(model=m).train()\nt.Trainer(m)\n"
    )
    (tmp_path / "infer.py").write_text("from transformers import Trainer\nprint('Trainer(')\n")
    (tmp_path / "python2.py").write_text("print 'Trainer()'\n")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "lib.py").write_text("Trainer()")
    done = run_tool(TOOLS / "lora_saving_patch.py", "--list", ".", folder=tmp_path)
    assert done.returncode == 0 and not (tmp_path / "ran").exists()
    said = done.stdout.splitlines()
    assert said[0].startswith("python2.py: not readable as Python")
    assert said[1:] == [
        "train.py:2: class My(Seq2SeqTrainer)",
        "train.py:5: LoraConfig(...)",
        "train.py:5: get_peft_model(...)",
        "train.py:7: Trainer(...)",
    ]
    (tmp_path / "train.py").unlink()
    (tmp_path / "python2.py").unlink()
    assert run_tool(TOOLS / "lora_saving_patch.py", "--list", ".", folder=tmp_path).returncode == 1
    assert run_tool(TOOLS / "lora_saving_patch.py", "--list", "absent", folder=tmp_path).returncode == 2


@pytest.mark.parametrize("where", ["the project", "another folder"])
def test_the_projects_own_trainers_are_listed(where: str, tmp_path: Path) -> None:
    """Guards against a list without the very scripts that the original's named."""
    root = TOOLS.parent
    done = run_tool(
        TOOLS / "lora_saving_patch.py", "--list-scripts", folder=root if where == "the project" else tmp_path
    )
    assert done.returncode == 0
    said = {line.split(":")[0].removeprefix(f"{root}/") for line in done.stdout.splitlines() if "by itself" in line}
    assert {"trainer/train_v2.py", "trainer/train_v2_ddp.py", "src/train_single_config_remote.py"} <= said
    assert "tests/" not in done.stdout

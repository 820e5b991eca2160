"""`lora.initial`: a run begins with another adapter's weights, and what it learns is measured against them."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from adapter_helpers import as_boson, copy_adapter, edit_config, read_weights, write_weights
from helpers import DemoClip
from phi4_cases import FP32, run_config
from speechtune.config import RunConfig
from speechtune.errors import AdapterError, ConfigError, TrainingError
from speechtune.families import build_config, create_family
from speechtune.inference.load import load_model, model_config, open_adapter
from speechtune.lora.apply import apply_lora, lora_b, open_initial, trainable
from speechtune.tensors import checksums
from speechtune.training.distributed import start_accelerator
from speechtune.training.job import Job
from speechtune.training.prepare import prepare
from speechtune.training.run import prove, run_training

SHORT = {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 0}
LORA = {"rank": 4, "alpha": 8, "targets": "language", "dropout": 0.0}


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory, phi4_base: Path, phi4_rows: Path) -> Path:
    """The folder of a finished run: checkpoint-2, checkpoint-4, lora_adapters."""
    folder = tmp_path_factory.mktemp("first")
    run_training(run_config(folder, phi4_base, phi4_rows, lora=LORA, train=SHORT, checkpoint={"every_steps": 2}))
    return folder / "run"


@pytest.fixture
def configure(tmp_path: Path, phi4_base: Path, phi4_rows: Path, first_run: Path) -> Callable[..., RunConfig]:
    """A recipe that starts from the first run's adapter; keyword arguments are sections merged over it."""

    def build(initial: Path | None = None, **sections: Any) -> RunConfig:
        lora = {**LORA, "initial": initial or first_run, **sections.pop("lora", {})}
        return run_config(tmp_path, phi4_base, phi4_rows, lora=lora, **{"train": SHORT, **sections})

    return build


def prepared(config: RunConfig) -> Job:
    return prepare(config, start_accelerator(config))


def first_logits(config: RunConfig) -> torch.Tensor:
    """What a run answers before its first step."""
    job = prepared(config)
    return job.family.probe(job.model.eval())[0]


def logits_of(adapter: Path, base: str | None = None, options: Mapping[str, str] | None = None) -> torch.Tensor:
    """What an adapter answers when it is used."""
    stored = open_adapter(adapter)
    family, model = load_model(model_config(base, options, stored), stored, FP32)
    return family.probe(model)[0]


@pytest.mark.parametrize("place", ["checkpoint-2", "lora_adapters", "."])
def test_the_first_answers_are_those_of_the_initial_adapter(
    place: str, configure: Callable[..., RunConfig], first_run: Path
) -> None:
    wanted = logits_of(first_run / place)
    assert torch.equal(first_logits(configure(first_run / place)), wanted)
    other = logits_of(first_run / ("checkpoint-4" if place == "checkpoint-2" else "checkpoint-2"))
    assert float((wanted - other).abs().max()) > 1e-3


@pytest.mark.parametrize(
    "more",
    [{"dora": True}, {"rslora": True}, {"trainable_tokens": ["<|APA|>"]}, {"modules_to_save": ["audio_embed"]}],
    ids=str,
)
def test_all_that_an_adapter_holds_is_taken_over(
    more: dict[str, Any], configure: Callable[..., RunConfig], phi4_base: Path, phi4_rows: Path, tmp_path: Path
) -> None:
    earlier = run_config(tmp_path / "earlier", phi4_base, phi4_rows, lora=LORA | more, train=SHORT | {"max_steps": 2})
    run_training(earlier)
    wanted = logits_of(earlier.output_dir)
    found = first_logits(configure(earlier.output_dir, lora=more))
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-6


def test_an_adapter_of_the_original_pipeline_starts_a_run(
    adapter_run: Path,
    make_config: Callable[..., RunConfig],
    write_chatml: Any,
    demo_clips: list[DemoClip],
    tmp_path: Path,
) -> None:
    """Its names have the original package's layout, and there is no recipe file beside it."""
    boson = as_boson(adapter_run / "lora_adapters", tmp_path / "boson")
    data = {"train": write_chatml(tmp_path / "rows.json", demo_clips[:2])}
    config = make_config(data=data, lora={"rank": 4, "alpha": 8, "targets": "all", "dropout": 0.0, "initial": boson})
    assert torch.equal(first_logits(config), logits_of(adapter_run))


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 8}, r"has \{'rank': 4\}, this run's lora section says \{'rank': 8\}"),
    "alpha": ({"alpha": 16}, r"has \{'alpha': 8.*\}, this run's lora section says \{'alpha': 16"),
    "rslora": ({"rslora": True}, "rslora"),
    "targets": ({"targets": "language+audio"}, "other tensors than this run's.*set lora.targets"),
    "a module in full": ({"modules_to_save": ["audio_embed"]}, "other tensors than this run's.*lora.modules_to_save"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused_in_one_sentence_before_anything_is_encoded(
    case: str, configure: Callable[..., RunConfig], first_run: Path, tmp_path: Path
) -> None:
    lora, message = MISFITS[case]
    with pytest.raises(AdapterError, match=message) as caught:
        prepared(configure(lora=lora))
    assert str(first_run / "lora_adapters") in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"alpha_pattern": {"qkv_proj": 32}},
        {"init_lora_weights": "pissa"},
        {"fan_in_fan_out": True},
    ],
    ids=str,
)
def test_what_only_the_configuration_shows_is_compared_too(
    change: dict[str, Any], configure: Callable[..., RunConfig], first_run: Path, tmp_path: Path
) -> None:
    """The tensors are the same, the answers would not be: guards against a warm start that begins somewhere else."""
    changed = shutil.copytree(first_run / "lora_adapters", tmp_path / "changed")
    edit_config(changed, **change)
    with pytest.raises(AdapterError, match=next(iter(change))):
        prepared(configure(changed))


def test_an_adapter_of_another_base_or_of_one_prepared_otherwise_is_refused(
    configure: Callable[..., RunConfig], phi4_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="trained on a base prepared as"):
        prepared(configure(model={"speech_lora": "drop"}))
    base = shutil.copytree(phi4_base, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    write = {name: tensor * 1.2 if "down_proj" in name else tensor for name, tensor in tensors.items()}
    from safetensors.torch import save_file

    save_file(write, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="answers a fixed input otherwise"):
        prepared(configure(model={"path": str(base)}))


def test_damaged_missing_and_untrained_ones_are_refused(
    configure: Callable[..., RunConfig], first_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        prepared(configure(tmp_path / "nowhere"))
    untrained = copy_adapter(first_run / "lora_adapters", tmp_path / "untrained")
    write_weights(untrained, {k: v * 0 if "lora_B" in k else v for k, v in read_weights(untrained).items()})
    with pytest.raises(AdapterError, match="never trained"):
        prepared(configure(untrained))
    with pytest.raises(ConfigError, match=r"lora.initial is for an adapter, and lora.enabled is false"):
        configure(lora={"enabled": False})


def test_a_foreign_adapter_is_asked_about_as_everywhere(
    configure: Callable[..., RunConfig], phi4_base: Path, tmp_path: Path
) -> None:
    """Without a recipe nothing tells whether it is the speech LoRA: a run would have started with that added twice."""
    speech = copy_adapter(phi4_base / "speech-lora", tmp_path / "foreign")
    with pytest.raises(ConfigError, match=r"it looks like that one, trained further. Say it .* model.speech_lora"):
        prepared(configure(speech))
    found = first_logits(configure(speech, model={"speech_lora": "continue"}))
    assert torch.equal(found, logits_of(speech, str(phi4_base), {"speech_lora": "continue"}))


def test_where_the_run_began_is_recorded(configure: Callable[..., RunConfig], first_run: Path) -> None:
    import hashlib

    outcome = run_training(configure(first_run / "checkpoint-2"))
    folder = outcome.job.config.output_dir
    sha256 = hashlib.sha256((first_run / "checkpoint-2" / "adapter_model.safetensors").read_bytes()).hexdigest()
    wanted = {"path": str(first_run / "checkpoint-2"), "sha256": sha256}
    for file, key in (
        ("run_info.json", "initial_adapter"),
        ("trainer_state.json", "initial"),
        ("checkpoint-4/trainer_state.json", "initial"),
    ):
        found = json.loads((folder / file).read_text())[key]
        assert {name: found[name] for name in wanted} == wanted
    for place in ("lora_adapters", "checkpoint-4"):
        card = (folder / place / "README.md").read_text()
        assert f"started from the weights of the adapter `run/checkpoint-2` (SHA-256 {sha256})" in card
        assert str(first_run) not in card
    assert outcome.proof.lora_b_moved == outcome.proof.lora_b_total == 8
    moved = float((logits_of(folder) - logits_of(first_run / "checkpoint-2")).abs().max())
    assert moved > 1e-3


def test_an_afresh_run_records_that_it_had_none(first_run: Path) -> None:
    assert json.loads((first_run / "run_info.json").read_text())["initial_adapter"] is None
    assert "started from" not in (first_run / "lora_adapters" / "README.md").read_text()


def test_weights_that_equal_the_initial_ones_count_as_untrained(configure: Callable[..., RunConfig]) -> None:
    """Guards against a proof by lora_B that are not zero: these were not zero to begin with."""
    job = prepared(configure())
    with pytest.raises(TrainingError, match=r"training changed none of the \d+ lora_B"):
        prove(job.model, checksums(trainable(job.model)), True, job.initial)
    fresh = create_family(job.config)
    model = apply_lora(fresh.load(FP32), fresh, job.config.lora.model_copy(update={"initial": None}), 42)
    with pytest.raises(TrainingError, match=r"training changed none of the \d+ lora_B"):
        prove(job.model, checksums(trainable(model)), True, job.initial)  # as after a resume, from a fresh adapter
    with torch.no_grad():
        next(iter(lora_b(job.model).values())).add_(1e-3)
    assert prove(job.model, checksums(trainable(model)), True, job.initial).lora_b_moved


def test_a_run_that_does_not_move_stops(configure: Callable[..., RunConfig]) -> None:
    with pytest.raises(TrainingError, match="changed none of the"):
        run_training(configure(train=SHORT | {"learning_rate": 1e-30}))


def test_a_resumed_run_never_reads_the_initial_adapter_again(
    configure: Callable[..., RunConfig], first_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Interrupted and resumed without it, the run ends with the same bits as one that was not interrupted."""
    initial = shutil.copytree(first_run / "checkpoint-2", tmp_path / "initial")
    save = {"checkpoint": {"every_steps": 2}, "output_dir": tmp_path / "uninterrupted"}
    run_training(configure(initial, **save))
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "uninterrupted" / "checkpoint-2", resumed / "checkpoint-2")
    shutil.rmtree(initial)
    go_on = {"checkpoint": {"every_steps": 2, "resume": "auto"}, "output_dir": resumed}
    outcome = run_training(configure(initial, **go_on))
    files = [folder / "lora_adapters" / "adapter_model.safetensors" for folder in (tmp_path / "uninterrupted", resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert outcome.job.initial and outcome.job.initial["path"] == str(initial)
    assert "started from the weights of the adapter" in (resumed / "lora_adapters" / "README.md").read_text()
    assert json.loads((resumed / "run_info.json").read_text())["initial_adapter"]["path"] == str(initial)
    assert "is not used" not in capfd.readouterr().err
    run_training(configure(tmp_path / "another", **go_on))
    said = capfd.readouterr().err
    assert f"lora.initial={tmp_path / 'another'} is not used" in said and f"began from {initial}" in said


def test_a_dry_run_says_what_does_not_fit(configure: Callable[..., RunConfig]) -> None:
    from speechtune.commands.train import show_plan

    assert show_plan(configure()) == 0
    with pytest.raises(AdapterError, match=r"has \{'rank': 4\}"):
        show_plan(configure(lora={"rank": 8}))


def test_plain_peft_continues_from_the_same_logits(
    configure: Callable[..., RunConfig], first_run: Path, phi4_base: Path
) -> None:
    """Independent of our loading: PEFT's own is_trainable way, on the base with its speech LoRA merged by PEFT."""
    from transformers import Phi4MultimodalForCausalLM

    base = Phi4MultimodalForCausalLM.from_pretrained(phi4_base)
    base = PeftModel.from_pretrained(base, str(phi4_base / "speech-lora")).merge_and_unload()
    plain = PeftModel.from_pretrained(base, str(first_run / "lora_adapters"), is_trainable=True).eval()
    job = prepared(configure())
    wanted, _ = job.family.probe(plain)
    assert float((job.family.probe(job.model.eval())[0] - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_the_options_of_two_configurations_are_told_apart(first_run: Path, phi4_base: Path) -> None:
    """A path that is given is the only option that resuming does not compare."""
    from speechtune.lora.apply import interchangeable

    values = {"family": "phi4_multimodal", "model": {"path": str(phi4_base)}, "lora": copy.copy(LORA)}
    first, second = (build_config(values | {"lora": LORA | {"initial": p}}, "test") for p in (None, first_run))
    family = create_family(first)
    assert interchangeable(family, first.lora) == interchangeable(family, second.lora)
    assert open_initial(family, first.lora) is None and open_initial(family, second.lora) is not None


def test_training_the_speech_lora_further_without_one_is_refused_before_encoding(
    configure: Callable[..., RunConfig], phi4_base: Path, tmp_path: Path, first_run: Path
) -> None:
    """An adapter that is used needs no speech LoRA beside the base to go on from; a run that starts from it does."""
    base = shutil.copytree(phi4_base, tmp_path / "base", ignore=shutil.ignore_patterns("speech-lora"))
    config = configure(first_run, model={"path": str(base), "speech_lora": "continue"})
    afresh = config.model_copy(update={"lora": config.lora.model_copy(update={"initial": None})})
    with pytest.raises(ConfigError, match="cannot process audio without its speech LoRA"):
        prepared(afresh)
    assert not (tmp_path / "cache").exists()

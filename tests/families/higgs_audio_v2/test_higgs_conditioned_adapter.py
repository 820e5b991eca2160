"""A conditioned adapter on disk: loaded, merged, converted, verified, and refused where a part of it is missing."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import HiggsAudioV2ForConditionalGeneration

from helpers import DemoClip, merged
from speechtune.cli import main
from speechtune.config import RunConfig
from speechtune.errors import AdapterError, ConfigError
from speechtune.export.convert import convert
from speechtune.export.merge import merge
from speechtune.export.verify import verify_adapter
from speechtune.families import build_config
from speechtune.families.higgs_audio_v2 import tiny
from speechtune.families.higgs_audio_v2.conditioning import FILE_NAME
from speechtune.inference.adapter_set import AdapterSet
from speechtune.inference.answer_file import model_identity
from speechtune.inference.load import load_model, model_config, open_adapter
from speechtune.storage.verified_folder import verify_folder
from speechtune.training.run import Outcome, run_training
from speechtune.types import GenerationOptions, Sample

OFF = {"reference_conditioning": None, "whisper_path": None, "reference_positions": None}


@dataclass(frozen=True)
class Trained:
    """A finished run, its adapter, its Whisper, and the trained model's logits for the family's probe."""

    config: RunConfig
    outcome: Outcome
    adapter: Path
    whisper: Path
    logits: torch.Tensor
    rows: np.ndarray


def config_for(folder: Path, base: Path, data: Path, cache: Path, **more: Any) -> RunConfig:
    values = {
        "family": "higgs_audio_v2",
        "output_dir": folder,
        "model": {
            "path": str(base / "model"),
            "codec_path": str(base / "codec"),
            "reference_conditioning": "whisper",
            "whisper_path": str(data.parent / "whisper"),
            "reference_positions": 6,
        },
        "data": {"train": data, "cache_dir": cache},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "train": {"max_steps": 4, "batch_size": 2, "learning_rate": 3e-2, "warmup_steps": 1},
        "evaluate": {"prompts": 0},
        "tracking": {"trackers": ()},
    }
    return build_config(merged(values, more), "test")


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_base: Path,
    cache_dir: Path,
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
) -> Trained:
    """Four steps on two clips."""
    folder = tmp_path_factory.mktemp("conditioned")
    tiny.make_whisper(folder / "whisper")
    data = write_chatml(folder / "train.json", sorted(demo_clips, key=lambda clip: clip.duration_seconds)[:2])
    config = config_for(folder / "run", tiny_base, data, cache_dir)
    outcome = run_training(config)
    logits, rows = outcome.job.family.probe(outcome.job.model.eval(), 8)
    return Trained(config, outcome, folder / "run" / "lora_adapters", folder / "whisper", logits, rows)


def probe(config: RunConfig, adapter: Path | None) -> tuple[torch.Tensor, np.ndarray]:
    family, model = load_model(config, open_adapter(adapter) if adapter else None)
    return family.probe(model, 8)


def used(adapter: Path, **options: Any) -> RunConfig:
    """The configuration with which an adapter is used: what it was trained on, but for some options."""
    return model_config(None, options, open_adapter(adapter))


def test_saved_is_reloaded_is_merged(trained: Trained, tmp_path: Path) -> None:
    """To 1e-5, and to the same greedy rows; the merged folder is used with its Whisper named."""
    logits, rows = probe(used(trained.adapter), trained.adapter)
    assert float((logits - trained.logits).abs().max()) <= 1e-6 and np.array_equal(rows, trained.rows)
    merge(used(trained.adapter), open_adapter(trained.adapter), tmp_path / "merged")
    assert verify_folder(tmp_path / "merged") == []
    projector = load_file(trained.adapter / FILE_NAME)
    kept = load_file(tmp_path / "merged" / FILE_NAME)
    assert projector.keys() == kept.keys() and all(torch.equal(kept[name], projector[name]) for name in kept)
    info = json.loads((tmp_path / "merged" / "merge_info.json").read_text())
    assert info["whisper_path"] == str(trained.whisper) and info["base_prepared"]["reference_positions"] == 6
    options = {"reference_conditioning": "whisper", "whisper_path": str(trained.whisper), "reference_positions": 6}
    logits, rows = probe(model_config(str(tmp_path / "merged"), options), None)  # type: ignore[arg-type]
    assert float((logits - trained.logits).abs().max()) <= 1e-5 and np.array_equal(rows, trained.rows)
    served = AdapterSet(str(tmp_path / "merged"), options)  # type: ignore[arg-type]
    assert torch.equal(served.family.probe(served.model)[0], logits)
    with pytest.raises(AdapterError, match=f"{FILE_NAME} was trained beside it"):
        served.add(open_adapter(trained.adapter))
    plain, found = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        tmp_path / "merged", output_loading_info=True, use_text_head=True
    )
    assert plain is not None and not found["unexpected_keys"] and not found["missing_keys"]


def test_without_what_was_heard_the_answers_are_others(trained: Trained) -> None:
    """The trained gate is open: taking the projector away moves the logits of the same adapter."""
    family, model = load_model(used(trained.adapter), open_adapter(trained.adapter))
    with torch.no_grad():
        model.get_base_model().reference_projector.gate.zero_()  # type: ignore[operator, union-attr]
    assert float((family.probe(model)[0] - trained.logits).abs().max()) > 1e-3


def test_plain_peft_loads_the_lora_part(trained: Trained, tiny_base: Path) -> None:
    base = HiggsAudioV2ForConditionalGeneration.from_pretrained(tiny_base / "model")
    with warnings.catch_warnings(record=True) as caught:
        loaded = PeftModel.from_pretrained(base, str(trained.adapter)).state_dict()
    assert not [str(one.message) for one in caught if "keys" in str(one.message)]
    ours = trained.outcome.job.model.state_dict()
    lora = [name for name in ours if "lora_" in name]
    assert lora and all(torch.equal(loaded[name], ours[name]) for name in lora)


def without_projector(trained: Trained, folder: Path) -> Path:
    shutil.copytree(trained.adapter, folder)
    (folder / FILE_NAME).unlink()
    return folder


def test_a_lost_projector_is_missed_by_all(trained: Trained, tmp_path: Path) -> None:
    folder = without_projector(trained, tmp_path / "lost")
    report = verify_adapter(folder)
    assert not report.valid and any(f"{FILE_NAME} is missing" in issue for issue in report.issues)
    for use in (
        lambda: load_model(used(folder), open_adapter(folder)),
        lambda: merge(used(folder), open_adapter(folder), tmp_path / "merged"),
    ):
        with pytest.raises(AdapterError, match=f"{FILE_NAME} is missing: the adapter was trained with"):
            use()


def changed(
    trained: Trained, folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> Path:
    """The adapter with other tensors in its projector, under a MANIFEST.json that does not know of it."""
    shutil.copytree(trained.adapter, folder)
    (folder / "MANIFEST.json").unlink()
    save_file(change(load_file(folder / FILE_NAME)), folder / FILE_NAME)
    return folder


def test_a_damaged_projector_is_refused(trained: Trained, tmp_path: Path) -> None:
    """Tampered, of another shape, not finite, cut off; `adapters verify` sees it by the manifest or on the base."""
    folder = tmp_path / "tampered"
    shutil.copytree(trained.adapter, folder)
    content = bytearray((folder / FILE_NAME).read_bytes())
    content[-1] ^= 1
    (folder / FILE_NAME).write_bytes(content)
    assert any(FILE_NAME in issue for issue in verify_adapter(folder, look_up_base=False).issues)
    with pytest.raises(AdapterError, match=rf"{FILE_NAME}: changed since it was written"):
        open_adapter(folder)
    gate = "reference_projector.gate"
    cases = {
        "narrow": (lambda tensors: tensors | {gate: tensors[gate][:5].clone()}, "made for another Whisper or another"),
        "lost": (lambda tensors: {name: t for name, t in tensors.items() if name != gate}, "made for another Whisper"),
        "nan": (lambda tensors: tensors | {gate: tensors[gate] * float("nan")}, "NaN or infinity in gate"),
    }
    for name, (change, reason) in cases.items():
        folder = changed(trained, tmp_path / name, change)
        with pytest.raises(AdapterError, match=reason):
            load_model(used(folder), open_adapter(folder))
        report = verify_adapter(folder, str(trained.config.model.path))
        assert not report.valid and any("effect" in issue for issue in report.issues)
    (folder / FILE_NAME).write_bytes((folder / FILE_NAME).read_bytes()[:100])
    with pytest.raises(AdapterError, match="truncated or not a weights file"):
        load_model(used(folder), open_adapter(folder))


def test_conditioning_is_neither_left_out_nor_made_up(
    trained: Trained, adapter_run: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """With the reason and the cure, for adapters with a recipe and without, and for merged folders."""
    with pytest.raises(AdapterError, match=r"base prepared as .*reference_conditioning.* here it is \{\}"):
        load_model(used(trained.adapter, **OFF), open_adapter(trained.adapter))
    foreign = tmp_path / "foreign"
    shutil.copytree(trained.adapter, foreign)
    (foreign / "base_recipe.json").unlink()
    with pytest.raises(AdapterError, match=r"trained with reference conditioning .*--whisper-path"):
        load_model(used(foreign), open_adapter(foreign))
    with pytest.raises(AdapterError, match=r"model\.reference_positions=6, here it is None.*--reference-positions"):
        load_model(
            used(foreign, reference_conditioning="whisper", whisper_path=str(trained.whisper)), open_adapter(foreign)
        )
    plain = adapter_run / "lora_adapters"
    on = {"reference_conditioning": "whisper", "whisper_path": str(trained.whisper)}
    with pytest.raises(AdapterError, match=r"base prepared as \{\}, here it is .*whisper"):
        load_model(used(plain, **on), open_adapter(plain))
    with pytest.raises(AdapterError, match=r"trained without reference conditioning.*leave .*--whisper-path, out"):
        load_model(model_config(str(tiny_base / "model"), on), None)
    merge(used(trained.adapter), open_adapter(trained.adapter), tmp_path / "merged")
    with pytest.raises(AdapterError, match=r"merged: trained with reference conditioning .*--whisper-path"):
        load_model(model_config(str(tmp_path / "merged"), None), None)


def test_another_whisper_is_refused(trained: Trained, tmp_path: Path) -> None:
    """By content, not by path: a copy will do."""
    shutil.copytree(trained.whisper, tmp_path / "copy")
    logits, _ = probe(used(trained.adapter, whisper_path=str(tmp_path / "copy")), trained.adapter)
    assert float((logits - trained.logits).abs().max()) <= 1e-6
    tiny.make_whisper(tmp_path / "other", seed=1)
    with pytest.raises(AdapterError, match="trained on a base prepared as"):
        load_model(used(trained.adapter, whisper_path=str(tmp_path / "other")), open_adapter(trained.adapter))


def test_half_precision(trained: Trained, tmp_path: Path) -> None:
    """A bfloat16 base and Whisper; the projector stays float32, and is the same again where it is loaded."""
    more = {"output_dir": tmp_path / "half", "train": {"precision": "bf16"}}
    outcome = run_training(build_config(merged(trained.config.model_dump(), more), "test"))
    adapter = tmp_path / "half" / "lora_adapters"
    stored = load_file(adapter / FILE_NAME)
    assert all(tensor.dtype == torch.float32 for tensor in stored.values()) and stored["reference_projector.gate"].any()
    plan = outcome.job.precision
    assert plan.base_dtype == torch.bfloat16
    family, model = load_model(used(adapter), open_adapter(adapter), plan)
    assert torch.equal(family.probe(model)[0], outcome.job.family.probe(outcome.job.model.eval())[0])


def test_half_an_adapter_is_refused(trained: Trained) -> None:
    """Of the projector there is no half that would be nearer to the base."""
    with pytest.raises(AdapterError, match=f"no strength but 1: .*{FILE_NAME}"):
        load_model(used(trained.adapter), open_adapter(trained.adapter, 0.5))


def test_answers_are_those_of_this_projector(trained: Trained, tmp_path: Path) -> None:
    """Answers on disk are not taken over from an adapter with another projector."""
    folder = changed(trained, tmp_path / "other", lambda tensors: {name: 2 * t for name, t in tensors.items()})
    one, other = (open_adapter(path) for path in (trained.adapter, folder))
    family = trained.outcome.job.family
    assert model_identity(trained.config, family, one) != model_identity(trained.config, family, other)
    assert one.sha256["weights"] == other.sha256["weights"]


def test_a_converted_adapter_keeps_its_projector(trained: Trained, tmp_path: Path) -> None:
    convert(trained.adapter, tmp_path / "boson", "boson")
    convert(tmp_path / "boson", tmp_path / "native", "native")
    assert (tmp_path / "native" / FILE_NAME).read_bytes() == (trained.adapter / FILE_NAME).read_bytes()
    assert verify_folder(tmp_path / "native") == []


def test_training_goes_on_from_a_projector(trained: Trained, tmp_path: Path) -> None:
    """From an adapter's; frozen it stays, and is saved all the same; a fresh one cannot be frozen."""
    start = {"lora": {"initial": trained.adapter}}
    frozen = {"model": {"freeze_reference_projector": True}}
    one_step: dict[str, Any] = {"output_dir": tmp_path / "frozen", "train": {"max_steps": 1}}
    values = trained.config.model_dump()
    outcome = run_training(build_config(merged(merged(merged(values, start), frozen), one_step), "test"))
    base = cast(Any, outcome.job.model).get_base_model()
    assert not any(parameter.requires_grad for parameter in base.reference_projector.parameters())
    before, after = (
        load_file(folder / FILE_NAME) for folder in (trained.adapter, tmp_path / "frozen" / "lora_adapters")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)
    one_step["output_dir"] = tmp_path / "on"
    run_training(build_config(merged(merged(values, start), one_step), "test"))
    after = load_file(tmp_path / "on" / "lora_adapters" / FILE_NAME)
    gate = "reference_projector.gate"
    assert 0 < float((after[gate] - before[gate]).abs().max()) <= 0.031  # one step of Adam from where it was
    one_step["output_dir"] = tmp_path / "fresh"
    with pytest.raises(ConfigError, match=r"freeze_reference_projector: there is no trained projector"):
        run_training(build_config(merged(merged(values, frozen), one_step), "test"))


def test_generate_and_evaluate_load_it(
    trained: Trained, demo_clips: list[DemoClip], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line: with what the adapter says, with the Whisper elsewhere, and refused without its projector."""
    clip = demo_clips[0]
    asked = ["--text", "One two.", "--reference", str(clip.path), "--reference-text", clip.text, "--temperature", "0"]
    asked += ["--max-new-tokens", "12", "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "a.wav")]
    assert main(["generate", *asked, "--adapter", str(trained.adapter)]) == 0
    shutil.copytree(trained.whisper, tmp_path / "moved")
    moved = ["--whisper-path", str(tmp_path / "moved")]
    assert main(["generate", *asked, "--adapter", str(trained.adapter), *moved]) == 0
    lost = without_projector(trained, tmp_path / "lost")
    assert main(["generate", *asked, "--adapter", str(lost)]) == 2
    assert f"{FILE_NAME} is missing" in capsys.readouterr().err
    evaluate = ["evaluate", str(trained.config.data.train), "--max-new-tokens", "12", "--temperature", "0"]
    evaluate += ["--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "evaluated")]
    codec = ["--codec", str(trained.config.model.model_dump()["codec_path"])]  # for the base, which speaks too
    assert main([*evaluate, "--adapter", str(trained.adapter), *codec, "--json"]) == 0
    assert main([*evaluate, "--adapter", str(lost)]) == 2
    assert main(["adapters", "verify", str(trained.adapter), "--base", str(trained.config.model.path)]) == 0
    assert main(["adapters", "verify", str(lost)]) == 1


def test_a_question_without_a_reference_is_answered(trained: Trained) -> None:
    """There is nothing to hear then: the same as with the gate closed."""
    family: Any
    family, model = load_model(used(trained.adapter), open_adapter(trained.adapter))
    prompts = [(Sample("a", "One two.", None), [])]
    options = GenerationOptions(temperature=0, max_new_tokens=8)
    rows = family.generate_rows(model, prompts, options)
    with torch.no_grad():
        model.get_base_model().reference_projector.gate.zero_()  # type: ignore[operator, union-attr]
    assert np.array_equal(rows, family.generate_rows(model, prompts, options))

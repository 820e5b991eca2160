"""Adapters on disk: found by content, extracted from full checkpoints, converted between layouts, merged from any."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import HiggsAudioV2ForConditionalGeneration

from adapter_helpers import (
    as_boson,
    copy_adapter,
    edit_config,
    plain_base,
    plain_logits,
    read_weights,
    to_binary,
    write_weights,
)
from speechtune.cli import main
from speechtune.commands.adapters import run_convert, run_extract, run_find, run_merge, run_verify
from speechtune.errors import AdapterError, CheckpointError, ConfigError
from speechtune.export.convert import convert
from speechtune.export.extract import extract, read_lora
from speechtune.export.find import find_adapters
from speechtune.export.merge import merge
from speechtune.export.verify import verify_adapter
from speechtune.families.higgs_audio_v2.boson import BOSON, boson_name, rename_key
from speechtune.family import NATIVE
from speechtune.inference.load import model_config, open_adapter
from speechtune.lora.layouts import in_layout
from speechtune.lora.prompts import PROMPTS_NAME
from speechtune.storage.verified_folder import verify_folder

ROOT = Path(__file__).parents[2]
Prefix = Callable[[str], str]


@pytest.fixture(scope="module")
def run(adapter_run: Path) -> Path:
    return adapter_run


@pytest.fixture(scope="module")
def adapter(run: Path) -> Path:
    return run / "lora_adapters"


@pytest.fixture(scope="module")
def adapted_logits(adapter: Path, tiny_base: Path) -> torch.Tensor:
    """Of base and adapter under plain PEFT."""
    return plain_logits(PeftModel.from_pretrained(plain_base(tiny_base), str(adapter)), tiny_base)


def live_model(base: Path, adapter: Path) -> nn.Module:
    """The trained model as a trainer holds it: adapters under the name `default`, base layers beside them."""
    return PeftModel.from_pretrained(plain_base(base), str(adapter))


# -- find ----------------------------------------------------------------------------------------------------------


def test_adapters_are_found_by_content(run: Path, adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("lora_adapters", "checkpoint-7", "checkpoint-9/lora_adapters", "speech-lora", "mit Leerzeichen"):
        copy_adapter(adapter, root / name)
    to_binary(root / "speech-lora")
    (root / "mit Leerzeichen" / "adapter_model.safetensors").write_bytes(b"")
    shutil.copytree(tiny_base / "model", root / "a-base")
    full = root / "full"
    full.mkdir()
    save_file({f"model.{k}": v for k, v in read_weights(adapter).items()}, full / "model.safetensors")
    torch.save({k: v for k, v in read_weights(adapter).items()}, root / "pytorch_model.bin")
    (root / "speech-lora" / "loop").symlink_to(root)
    (root / "broken-link").symlink_to(root / "nowhere")
    (root / ".writing-lora_adapters-x").mkdir()
    shutil.copyfile(adapter / "adapter_config.json", root / ".writing-lora_adapters-x" / "adapter_config.json")

    folders, checkpoints = find_adapters(root)
    found = [verify_adapter(folder, look_up_base=False) for folder in folders]
    rows = {str(Path(one.path).relative_to(root)): one for one in found}
    assert set(rows) == {
        "lora_adapters", "checkpoint-7", "checkpoint-9/lora_adapters", "speech-lora", "mit Leerzeichen"
    }  # fmt: skip
    assert [name for name, one in rows.items() if not one.valid] == ["mit Leerzeichen"]
    assert {one.base for one in found} == {str(tiny_base / "model")} and {one.rank for one in found} == {4}
    assert rows["checkpoint-7"].step == 7 and rows["checkpoint-9/lora_adapters"].step == 9
    assert rows["speech-lora"].format == "bin" and rows["lora_adapters"].format == "safetensors"
    assert rows["lora_adapters"].bytes == (adapter / "adapter_model.safetensors").stat().st_size
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", rows["lora_adapters"].modified or "")
    assert checkpoints == [root, full]
    steps = {folder.name: verify_adapter(folder, look_up_base=False).step for folder in find_adapters(run)[0]}
    assert steps == {"checkpoint-2": 2, "checkpoint-4": 4, "lora_adapters": 4}


def test_a_linked_folder_is_found_once(adapter: Path, tmp_path: Path) -> None:
    copy_adapter(adapter, tmp_path / "elsewhere" / "one")
    (tmp_path / "root").mkdir()
    for name in ("a", "b"):
        (tmp_path / "root" / name).symlink_to(tmp_path / "elsewhere")
    assert len(find_adapters(tmp_path / "root")[0]) == 1


# -- extract -------------------------------------------------------------------------------------------------------

PREFIXES: dict[str, Prefix] = {
    "as it is": lambda key: key,
    "DDP": lambda key: f"module.{key}",
    "a wrapper": lambda key: f"model.{key}",
    "DDP around a wrapper": lambda key: f"module.model.{key}",
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "torch.compile of the base": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "FSDP": lambda key: f"_fsdp_wrapped_module.{key.replace('layers.0.', 'layers.0._fsdp_wrapped_module.')}",
    "activation checkpointing": lambda key: key.replace("self_attn.", "_checkpoint_wrapped_module.self_attn."),
    "without PEFT's own": lambda key: key.removeprefix("base_model.model."),
    "DDP without PEFT's own": lambda key: "module." + key.removeprefix("base_model.model."),
}


def full_state(base: Path, adapter: Path, prefix: Prefix) -> dict[str, torch.Tensor]:
    return {prefix(key): tensor.clone() for key, tensor in live_model(base, adapter).state_dict().items()}


def write_sharded(folder: Path, state: dict[str, torch.Tensor], suffix: str) -> None:
    """Three shards and their index, as transformers writes them."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}-0000{i + 1}-of-00003.{suffix}" for i in range(3)]
    weight_map = {key: names[i % 3] for i, key in enumerate(state)}
    for name in names:
        part = {key: tensor for key, tensor in state.items() if weight_map[key] == name}
        save_file(part, folder / name) if suffix == "safetensors" else torch.save(part, folder / name)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_full(folder: Path, state: dict[str, torch.Tensor], form: str) -> None:
    folder.mkdir(parents=True)
    if form.startswith("sharded "):
        write_sharded(folder, state, form.removeprefix("sharded "))
    elif form == "safetensors":
        save_file(state, folder / "model.safetensors")
    elif form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        torch.save({"epoch": 3, "model_state_dict": state, "optimizer": {"state": {}}}, folder / "last.pt")


@pytest.mark.parametrize(
    ("prefix", "form"),
    [(prefix, "safetensors") for prefix in PREFIXES]
    + [("a wrapper", form) for form in ("sharded safetensors", "sharded bin", "bin", "training state")],
)
def test_extracted_is_what_was_trained(
    prefix: str, form: str, adapter: Path, tiny_base: Path, adapted_logits: torch.Tensor, tmp_path: Path
) -> None:
    write_full(tmp_path / "full", full_state(tiny_base, adapter, PREFIXES[prefix]), form)
    report = extract(tmp_path / "full", tmp_path / "out", alpha=8, base=str(tiny_base / "model"))
    trained, rescued = read_weights(adapter), read_weights(tmp_path / "out")
    assert rescued.keys() == trained.keys()
    assert all(torch.equal(rescued[key], trained[key]) for key in trained)
    assert report.verification.valid and report.rank == 4 and not verify_folder(tmp_path / "out")
    loaded = PeftModel.from_pretrained(plain_base(tiny_base), str(tmp_path / "out"))
    assert torch.equal(plain_logits(loaded, tiny_base), adapted_logits)


def test_everything_an_adapter_can_hold(tiny_base: Path, tmp_path: Path) -> None:
    """DoRA magnitudes, a module saved in full, several ranks, rsLoRA."""
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], rank_pattern={"layers.1.self_attn.v_proj": 2},
        use_dora=True, use_rslora=True, modules_to_save=["text_lm_head"],
    )  # fmt: skip
    torch.manual_seed(1)
    model = get_peft_model(plain_base(tiny_base), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, 1.0 if "magnitude" in name else 0.0, 0.05)
    model.save_pretrained(str(tmp_path / "saved"))
    save_file({f"model.{k}": v.clone() for k, v in model.state_dict().items()}, tmp_path / "full.safetensors")
    report = extract(
        tmp_path / "full.safetensors", tmp_path / "out", alpha=6, base=str(tiny_base / "model"), rslora=True
    )
    assert (report.rank, report.rank_pattern) == (4, {"model.layers.1.self_attn.v_proj": 2})
    trained, rescued = read_weights(tmp_path / "saved"), read_weights(tmp_path / "out")
    assert any("lora_magnitude_vector" in key for key in trained) and any("text_lm_head" in key for key in trained)
    assert rescued.keys() == trained.keys() and all(torch.equal(rescued[key], trained[key]) for key in trained)
    logits = [
        plain_logits(PeftModel.from_pretrained(plain_base(tiny_base), str(tmp_path / name)), tiny_base)
        for name in ("saved", "out")
    ]
    assert torch.equal(*logits)


def test_alpha_comes_from_files_nearby_or_is_asked_for(
    run: Path, adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    state = full_state(tiny_base, adapter, PREFIXES["DDP"])
    full = tmp_path / "checkpoint-30"
    write_full(full, state, "safetensors")
    (full / "training_args.bin").write_bytes(b"never unpickled")
    with pytest.raises(AdapterError, match="--alpha"):
        extract(full, tmp_path / "out")
    (full / "training_args.json").write_text(json.dumps({"lora": {"lora_alpha": 64, "r": 32}}))
    with pytest.raises(AdapterError, match=r"says rank 32, the weights have rank 4.*--alpha"):
        extract(full, tmp_path / "out")
    shutil.copyfile(run / "config.yaml", tmp_path / "config.yaml")
    report = extract(full, tmp_path / "out")
    assert (report.alpha, report.alpha_from) == (8, str(tmp_path / "config.yaml"))
    assert (report.base, report.base_from) == (str(tiny_base / "model"), str(tmp_path / "config.yaml"))
    (full / "training_args.json").write_text(json.dumps({"lora_alpha": 64, "lora_rank": 4}))
    shutil.copyfile(adapter / "adapter_config.json", full / "adapter_config.json")
    with pytest.raises(AdapterError, match="disagree on lora_alpha"):
        extract(full, tmp_path / "out2")
    given = extract(full, tmp_path / "out2", alpha=16)
    assert given.alpha == 16 and any("16 as given or 8" in reason for reason in given.unknown)


def test_what_cannot_be_extracted_is_refused_with_the_reason(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = str(tiny_base / "model")
    with pytest.raises(AdapterError, match="no lora_A"):
        extract(tiny_base / "model", tmp_path / "out", alpha=8)
    state = full_state(tiny_base, adapter, PREFIXES["a wrapper"])
    write_full(tmp_path / "two", state | {k.replace(".default.", ".other."): v for k, v in state.items()}, "bin")
    with pytest.raises(AdapterError, match=r"several adapters \(default, other\)"):
        extract(tmp_path / "two", tmp_path / "out", alpha=8, base=base)
    assert extract(tmp_path / "two", tmp_path / "out", alpha=8, base=base, adapter_name="other").tensors == 40
    with pytest.raises(CheckpointError, match="exists already"):
        extract(tmp_path / "two", tmp_path / "out", alpha=8, base=base, adapter_name="other")
    write_full(tmp_path / "torn", state, "sharded bin")
    (tmp_path / "torn" / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(AdapterError, match="1 of its 3 files are not there"):
        extract(tmp_path / "torn", tmp_path / "out2", alpha=8, base=base)
    write_full(tmp_path / "half", {k: v for k, v in state.items() if "layers.1" not in k or "lora_B" not in k}, "bin")
    with pytest.raises(AdapterError, match="has no lora_B"):
        extract(tmp_path / "half", tmp_path / "out2", alpha=8, base=base)
    assert not (tmp_path / "out2").exists() and not list(tmp_path.glob(".writing-*"))


def test_a_wrapper_of_the_original_package(adapter: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    """Its full checkpoints have keys like model.base_model.model.layers: the result says which command comes next."""
    state = full_state(tiny_base, adapter, lambda key: "model." + key.replace("model.model.layers", "model.layers"))
    write_full(tmp_path / "full", {key: tensor for key, tensor in state.items() if "lora_" in key}, "bin")
    assert run_extract(tmp_path / "full", tmp_path / "out", alpha=8, base=str(tiny_base / "model")) == 0
    assert "--to native" in capsys.readouterr().out
    assert open_adapter(tmp_path / "out").layout == "boson"
    convert(tmp_path / "out", tmp_path / "native", "native")
    trained, rescued = read_weights(adapter), read_weights(tmp_path / "native")
    assert rescued.keys() == trained.keys() and all(torch.equal(rescued[key], trained[key]) for key in trained)


def test_read_lora_keeps_nothing_of_the_base(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    write_full(tmp_path / "full", full_state(tiny_base, adapter, PREFIXES["FSDP"]), "training state")
    assert read_lora(tmp_path / "full").tensors.keys() == read_weights(adapter).keys()


# -- convert -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def logits_by_hand(base: Path, boson: Path, scale: float) -> torch.Tensor:
    """Plain transformers with scale * B @ A added to each weight that a boson adapter names; no PEFT, no speechtune."""
    model, tensors = plain_base(base), read_weights(boson)
    for key, lora_a in tensors.items():
        if "lora_A" in key:
            place = key.replace("base_model.model.", "model.").replace(".lora_A", "")
            model.get_parameter(place).add_(scale * tensors[key.replace("lora_A", "lora_B")] @ lora_a)
    return plain_logits(model, base)


@pytest.mark.parametrize("binary", [False, True])
def test_boson_to_native_and_back(
    binary: bool, adapter: Path, tiny_base: Path, adapted_logits: torch.Tensor, tmp_path: Path
) -> None:
    boson = as_boson(adapter, tmp_path / "boson")
    by_hand = logits_by_hand(tiny_base, boson, 2.0)
    if binary:
        to_binary(boson)
    report = convert(boson, tmp_path / "native", "native")
    assert report.logit_difference is not None and report.logit_difference < 1e-5
    assert report.adapter_effect is not None and report.adapter_effect > 0.1
    native = PeftModel.from_pretrained(plain_base(tiny_base), str(tmp_path / "native"))
    assert torch.equal(plain_logits(native, tiny_base), adapted_logits)
    assert float((adapted_logits - by_hand).abs().max()) < 1e-5
    values = json.loads((tmp_path / "native" / "adapter_config.json").read_text())
    assert values["auto_mapping"] is None and not verify_folder(tmp_path / "native")
    back = convert(tmp_path / "native", tmp_path / "back", "boson")
    assert back.logit_difference is not None and back.logit_difference < 1e-5
    assert (
        as_boson(adapter, tmp_path / "again")
        and read_weights(tmp_path / "again").keys() == read_weights(tmp_path / "back").keys()
    )
    convert(tmp_path / "back", tmp_path / "native2", "native")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert filecmp.cmp(tmp_path / "native" / name, tmp_path / "native2" / name, shallow=False)


TARGETS: dict[str, dict[str, Any]] = {
    "suffixes": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "regex that fits both": {"target_modules": r".*\.(q|k|v|o|gate|up|down)_proj"},
    "regex of one layout": {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp|audio_mlp)\..*_proj"},
    "alpha by module": {
        "target_modules": r".*\.(q|k|v|o|gate|up|down)_proj",
        "alpha_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 20, "model.layers.1.mlp.up_proj": 3},
    },
}


@pytest.mark.parametrize("name", TARGETS)
def test_targets_keep_their_meaning(name: str, adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    source = copy_adapter(adapter, tmp_path / "source")
    edit_config(source, **TARGETS[name])
    before = plain_logits(PeftModel.from_pretrained(plain_base(tiny_base), str(source)), tiny_base)
    convert(source, tmp_path / "boson", "boson")
    report = convert(tmp_path / "boson", tmp_path / "native", "native")
    assert report.adapter_effect is not None and verify_adapter(tmp_path / "native", str(tiny_base / "model")).valid
    after = plain_logits(PeftModel.from_pretrained(plain_base(tiny_base), str(tmp_path / "native")), tiny_base)
    assert torch.equal(after, before)


def test_names_go_both_ways(tiny_base: Path) -> None:
    names = list(plain_base(tiny_base).state_dict())
    assert [rename_key(boson_name(name)) for name in names] == names
    assert not {boson_name(name) for name in names} & set(names)


def test_what_cannot_be_converted(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    strange = copy_adapter(adapter, tmp_path / "strange")
    write_weights(strange, {k.replace("model.layers", "transformer.h"): v for k, v in read_weights(adapter).items()})
    with pytest.raises(AdapterError, match="neither the native nor the boson layout"):
        convert(strange, tmp_path / "out", "native")
    other = as_boson(adapter, tmp_path / "other")
    write_weights(other, {k.replace("layers.1.", "layers.5."): v for k, v in read_weights(other).items()})
    with pytest.raises(AdapterError, match="cannot be converted to native"):
        convert(other, tmp_path / "out", "native")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no such layout; there are: native, boson"):
        convert(adapter, tmp_path / "out", "original")
    same = convert(adapter, tmp_path / "same", "native")
    assert same.renamed == 0 and same.not_compared == "nothing was renamed"
    with pytest.raises(CheckpointError, match="exists already"):
        convert(adapter, tmp_path / "same", "boson")


def test_names_alone_do_not_make_another_layout(adapter: Path, tmp_path: Path) -> None:
    """Guards against a family whose own modules are called `layers`: its adapters must not count as Higgs Audio's."""
    stored = open_adapter(as_boson(adapter, tmp_path / "boson"))
    assert stored.layout == "boson"
    assert in_layout(stored, NATIVE, {}) is stored
    assert in_layout(stored, NATIVE, {"boson": BOSON}).tensors.keys() == read_weights(adapter).keys()


# -- merge ---------------------------------------------------------------------------------------------------------


def placed(kind: str, run: Path, folder: Path) -> Path:
    """The same trained adapter in one of its possible places and layouts."""
    if kind == "checkpoint-4":
        return run / "checkpoint-4"
    if kind == "a run's folder":
        return run
    if kind == "checkpoint-4/lora_adapters":
        return copy_adapter(run / "checkpoint-4", folder / "checkpoint-4" / "lora_adapters")
    if kind == "checkpoint-4 with lora_adapters in it":
        return copy_adapter(run / "checkpoint-4", folder / "checkpoint-4" / "lora_adapters").parent
    if kind == ".bin":
        to_binary(copy_adapter(run / "checkpoint-4", folder / "binary"))
        return folder / "binary"
    return as_boson(run / "checkpoint-4", folder / "boson", binary=kind == "boson .bin")


KINDS = (
    "checkpoint-4", "a run's folder", "checkpoint-4/lora_adapters", "checkpoint-4 with lora_adapters in it", ".bin",
    "boson", "boson .bin",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_merge_from_any_layout(
    kind: str, run: Path, tiny_base: Path, adapted_logits: torch.Tensor, tmp_path: Path
) -> None:
    source = placed(kind, run, tmp_path)
    assert run_merge(source, tmp_path / "merged") == 0
    assert kind not in KINDS[:2] or (tmp_path / "merged" / PROMPTS_NAME).is_file(), "how the merged model was trained"
    merged = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path / "merged", use_text_head=True).eval()
    assert float((plain_logits(merged, tiny_base) - adapted_logits).abs().max()) < 1e-5
    adapted = live_model(tiny_base, run / "checkpoint-4")
    tokens = torch.arange(20, 60)[None]
    options = {"max_new_tokens": 16, "do_sample": False, "ras_win_len": None, "ras_win_max_num_repeat": None}
    rows = [model.generate(input_ids=tokens, attention_mask=tokens != -1, **options) for model in (merged, adapted)]
    assert rows[0].shape[1] > 8 and torch.equal(*rows)


def test_what_a_merged_folder_keeps(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base / "model", base)
    (base / "processor_config.json").write_text('{"audio_tokenizer": {"audio_tokenizer_name_or_path": "my/codec"}}')
    config = model_config(str(base), {"codec_path": str(tiny_base / "codec")})
    stored = open_adapter(run / "checkpoint-4")
    report = merge(config, stored, tmp_path / "merged", compare_on="Any text.", max_shard_size="200KB")
    assert filecmp.cmp(base / "processor_config.json", tmp_path / "merged" / "processor_config.json", shallow=False)
    generation = [json.loads((folder / "generation_config.json").read_text()) for folder in (base, tmp_path / "merged")]
    assert generation[0]["ras_win_len"] == 7 and generation[0] == generation[1]
    shards = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "merged" / "model.safetensors.index.json").is_file()
    info = json.loads((tmp_path / "merged" / "merge_info.json").read_text())
    assert re.fullmatch("[0-9a-f]{64}", info["base_sha256"]) and info["codec_path"] == str(tiny_base / "codec")
    assert info["lora_step"] == 4 and set(info["versions"]) == {"speechtune", "transformers", "peft", "torch"}
    found = report.comparison
    assert found is not None and found.test_input == "Any text." and info["comparison"]["positions"] == found.positions
    assert found.adapter_effect > 0.1 and found.merged_difference < 1e-5 and found.changed_positions > 0
    assert not verify_folder(tmp_path / "merged")
    with pytest.raises(CheckpointError, match="exists already"):
        merge(config, stored, tmp_path / "merged")
    merge(config, stored, tmp_path / "bare", save_tokenizer=False, dtype="bfloat16")
    halved = load_file(tmp_path / "bare" / "model.safetensors")
    assert {tensor.dtype for tensor in halved.values()} == {torch.bfloat16}
    assert not list((tmp_path / "bare").glob("tokenizer*"))


def test_a_step_that_changes_nothing_is_no_merge(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    useless = copy_adapter(adapter, tmp_path / "useless")
    edit_config(useless, lora_alpha=0)
    with pytest.raises(AdapterError, match="changes no logit"):
        run_merge(useless, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_old_task_type_loads(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    boson = as_boson(adapter, tmp_path / "boson")
    edit_config(boson, task_type="CAUSAL_LM")
    convert(boson, tmp_path / "native", "native")
    assert verify_adapter(tmp_path / "native", str(tiny_base / "model")).valid


# -- command lines -------------------------------------------------------------------------------------------------


def launch(script: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_verify_launcher(run: Path, adapter: Path, tmp_path: Path) -> None:
    script = "tools/verify_lora_adapters.py"
    copy_adapter(adapter, tmp_path / "bad").joinpath("adapter_model.safetensors").write_bytes(b"")
    good = launch(script, "--path", run, "--find-all", "--verbose")
    assert good.returncode == 0 and good.stdout.count("valid: base") == 3 and "norm" in good.stdout, good.stderr
    bad = launch(script, "--path", tmp_path / "bad")
    assert bad.returncode == 1 and "0 bytes" in bad.stdout
    missing = launch(script, "--path", tmp_path / "gone")
    assert missing.returncode == 2 and "no such folder" in missing.stderr and "Traceback" not in missing.stderr


@pytest.mark.slow
def test_other_launchers(run: Path, adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    found = launch("trainer/find_lora_adapters.py", "--path", run, "--json")
    assert found.returncode == 0 and len(json.loads(found.stdout)["adapters"]) == 3, found.stderr
    write_full(tmp_path / "full", full_state(tiny_base, adapter, PREFIXES["DDP"]), "bin")
    fix = ["tools/fix_lora_saving.py", "--checkpoint", tmp_path / "full", "--output", tmp_path / "fixed"]
    asked = launch(*fix)
    assert asked.returncode == 2 and "--alpha" in asked.stderr
    fixed = launch(*fix, "--alpha", 8, "--base", tiny_base / "model")
    assert fixed.returncode == 0 and "40 tensors of 20 modules" in fixed.stdout, fixed.stderr
    flags = ["--lora_adapter_path", tmp_path / "fixed", "--output_path", tmp_path / "merged", "--no_save_tokenizer"]
    merged = launch("trainer/merger.py", *flags, "--compare_models", "--test_input", "Hello there.")
    assert merged.returncode == 0 and "on 'Hello there.': adapter on and off differ by" in merged.stdout, merged.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    again = launch("trainer/merger.py", *flags)
    assert again.returncode == 3 and "exists already" in again.stderr


def test_json_of_each_command(run: Path, adapter: Path, tiny_base: Path, tmp_path: Path, capsys: Any) -> None:
    boson = as_boson(adapter, tmp_path / "boson")
    assert run_verify(boson, as_json=True) == 1
    assert not json.loads(capsys.readouterr().out)["valid"]
    assert run_verify(run, find_all=True, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["valid"]
    assert run_find(tmp_path, as_json=True) == 0 and run_find(tiny_base, as_json=True) == 1
    capsys.readouterr()
    assert run_convert(boson, tmp_path / "native", "native", as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["source_layout"] == "boson"
    assert run_extract(tmp_path / "native", tmp_path / "out", as_json=True) == 0  # an adapter is a checkpoint too
    assert json.loads(capsys.readouterr().out)["alpha"] == 8
    assert run_merge(tmp_path / "out", tmp_path / "merged", compare_models=True, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["comparison"]["positions"] > 5


def test_the_verbs_hand_on_their_arguments(adapter: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Guards against a flag whose name on the command line is not the function's: a TypeError instead of a verb."""
    boson, native, merged = tmp_path / "boson", tmp_path / "native", tmp_path / "merged"
    base = str(tiny_base / "model")
    assert main(["adapters", "convert", str(adapter), str(boson), "--to", "boson", "--base", base]) == 0
    assert main(["adapters", "convert", str(boson), str(native), "--to", "native", "--base", base]) == 0
    assert main(["adapters", "verify", str(native), "--base", base, "--verbose"]) == 0
    assert main(["adapters", "find", str(tmp_path), "--verbose", "--json"]) == 0
    assert main(["merge", str(native), str(merged), "--model", base, "--compare-models", "--dtype", "float32"]) == 0
    full = tmp_path / "full"
    full.mkdir()
    save_file(
        {f"module.{name}": tensor.clone() for name, tensor in live_model(tiny_base, adapter).state_dict().items()},
        full / "model.safetensors",
    )
    rescued = tmp_path / "rescued"
    assert main(["adapters", "extract", str(full), str(rescued), "--alpha", "32", "--base", base]) == 0
    assert main(["adapters", "verify", str(rescued)]) == 0

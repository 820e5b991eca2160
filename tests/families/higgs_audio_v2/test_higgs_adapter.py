"""The adapter: what is trained is what is saved, what plain PEFT loads, and what is merged."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, HiggsAudioV2ForConditionalGeneration

from helpers import native_batch
from higgs_cases import FP32, Case, tensors, train
from speechtune.config import LoraSettings, RunConfig
from speechtune.errors import AdapterError
from speechtune.export.merge import merge
from speechtune.families.higgs_audio_v2.family import HiggsAudioV2Family
from speechtune.inference.load import open_adapter
from speechtune.lora.apply import apply_lora, load_adapter, model_tensors
from speechtune.storage.verified_folder import write_verified
from speechtune.training.checkpoint import save_weights
from speechtune.types import GenerationOptions

SETTINGS = LoraSettings(rank=4, alpha=16, dropout=0.1)
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Trained:
    """A trained adapter: its folder, the model in memory, its logits, and the base's tensors before training."""

    folder: Path
    model: PeftModel
    logits: torch.Tensor
    before: dict[str, torch.Tensor]


@torch.no_grad()
def plain_logits(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The native forward pass."""
    return model(**batch).logits


def native_inputs(family: HiggsAudioV2Family, cases: Sequence[Case]) -> dict[str, torch.Tensor]:
    """What plain transformers wants for some cases."""
    return native_batch(family.tokenizer, [case.utterance for case in cases])


def save_adapter(model: PeftModel, folder: Path) -> Path:
    """Save as a run does."""
    return write_verified(folder, lambda aside: save_weights(model, aside, {"README.md": "card"}), model_tensors(model))


@pytest.fixture(scope="module")
def trained(tiny_family: HiggsAudioV2Family, cases: list[Case], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A few steps of LoRA on the tiny base."""
    base = tiny_family.load(FP32)
    before = tensors(base)
    model = train(tiny_family, cases, steps=12, model=apply_lora(base, tiny_family, SETTINGS, seed=1))
    folder = save_adapter(model, tmp_path_factory.mktemp("adapter") / "lora_adapters")
    return Trained(folder, model, plain_logits(model, native_inputs(tiny_family, cases)), before)


@pytest.fixture
def plain_base(tiny_base: Path) -> Any:
    """The base as transformers alone loads it."""
    return HiggsAudioV2ForConditionalGeneration.from_pretrained(tiny_base / "model").eval()


def test_base_is_bit_identical_after_training(trained: Trained, tiny_base: Path) -> None:
    """The adapter must fit the base as it was released; only lora_A and lora_B may have moved."""
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
        for name, parameter in trained.model.named_parameters()
        if "lora_" not in name
    }
    on_disk = load_file(tiny_base / "model" / "model.safetensors")
    assert set(after) == set(trained.before) == set(on_disk)
    for name, parameter in after.items():
        assert torch.equal(parameter, trained.before[name]) and torch.equal(parameter, on_disk[name]), name
    moved = [name for name, p in trained.model.named_parameters() if p.requires_grad]
    assert moved and all("lora_" in name for name in moved)


def test_plain_peft_loads_the_adapter(
    trained: Trained, plain_base: Any, tiny_family: HiggsAudioV2Family, cases: list[Case]
) -> None:
    """Without speechtune: native base, plain `PeftModel.from_pretrained`, and the trained model's logits."""
    batch = native_inputs(tiny_family, cases)
    untouched = plain_logits(plain_base, batch)
    with warnings.catch_warnings(record=True) as caught:
        loaded = PeftModel.from_pretrained(plain_base, str(trained.folder)).eval()
    assert not [str(one.message) for one in caught if "keys" in str(one.message)]
    logits = plain_logits(loaded, batch)
    assert float((logits - untouched).abs().max()) > 0.05
    assert float((logits - trained.logits).abs().max()) <= 1e-6


def test_our_loader_gives_the_same_logits(trained: Trained, tiny_family: HiggsAudioV2Family, cases: list[Case]) -> None:
    """`load_adapter` is stricter than PEFT, and no different where it accepts."""
    model = load_adapter(tiny_family.load(FP32), open_adapter(trained.folder)).eval()
    assert float((plain_logits(model, native_inputs(tiny_family, cases)) - trained.logits).abs().max()) <= 1e-6


def test_fresh_adapter_changes_nothing_and_is_refused(
    tiny_family: HiggsAudioV2Family, plain_base: Any, cases: list[Case], tmp_path: Path
) -> None:
    """Issue: an all-zero adapter passed verification. lora_B starts at zero, so it says "never trained"."""
    fresh = apply_lora(tiny_family.load(FP32), tiny_family, SETTINGS, seed=1).eval()
    batch = native_inputs(tiny_family, cases)
    assert torch.equal(plain_logits(fresh, batch), plain_logits(plain_base, batch))
    folder = save_adapter(fresh, tmp_path / "zero")
    with pytest.raises(AdapterError, match="every lora_B is zero"):
        load_adapter(tiny_family.load(FP32), open_adapter(folder))


def changed_copy(trained: Trained, folder: Path, rename: Callable[[str], str | None]) -> Path:
    """The adapter with other keys (None drops one), as another program would have left it: no MANIFEST.json."""
    shutil.copytree(trained.folder, folder)
    (folder / "MANIFEST.json").unlink(missing_ok=True)
    stored = load_file(folder / WEIGHTS)
    kept = {new: tensor for name, tensor in stored.items() if (new := rename(name)) is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def test_adapter_of_the_original_package_is_refused(
    trained: Trained, tiny_family: HiggsAudioV2Family, plain_base: Any, cases: list[Case], tmp_path: Path
) -> None:
    """Issue: keys of the original package load with a mere warning, and the adapter stays zero in silence."""
    folder = changed_copy(
        trained, tmp_path / "boson", lambda name: name.replace("base_model.model.model.", "base_model.model.")
    )
    batch = native_inputs(tiny_family, cases)
    untouched = plain_logits(plain_base, batch)
    with pytest.warns(UserWarning, match="missing adapter keys"):
        deaf = PeftModel.from_pretrained(plain_base, str(folder)).eval()
    assert torch.equal(plain_logits(deaf, batch), untouched)
    with pytest.raises(AdapterError, match="layout"):
        load_adapter(tiny_family.load(FP32), open_adapter(folder))


@pytest.mark.parametrize(
    ("rename", "reason"),
    [
        (lambda name: None if "layers.1.self_attn.q_proj.lora_B" in name else name, "1 tensors missing"),
        (lambda name: name.replace("audio_mlp", "mlp"), "tensors missing.*left over"),
    ],
    ids=["missing", "elsewhere"],
)
def test_adapter_of_another_base_is_refused(
    trained: Trained,
    tiny_family: HiggsAudioV2Family,
    tmp_path: Path,
    rename: Callable[[str], str | None],
    reason: str,
) -> None:
    """PEFT leaves what is missing at its random start, and what is left over out."""
    folder = changed_copy(trained, tmp_path / "other", rename)
    with warnings.catch_warnings(), pytest.raises(AdapterError, match=reason):
        warnings.simplefilter("ignore")
        load_adapter(tiny_family.load(FP32), open_adapter(folder))


def test_targets_match_nothing(tiny_family: HiggsAudioV2Family) -> None:
    """A regex that matches no layer is an issue, and the message shows real names."""
    with pytest.raises(AdapterError, match=r"matches none of .*model\.layers\.0\."):
        apply_lora(tiny_family.load(FP32), tiny_family, LoraSettings(targets="q_proj"), seed=0)


def test_merged_folder_is_a_plain_model(
    trained: Trained,
    make_config: Callable[..., RunConfig],
    tiny_family: HiggsAudioV2Family,
    cases: list[Case],
    tmp_path: Path,
) -> None:
    """Merged, saved, loaded by transformers alone: the trained model's logits and its greedy rows."""
    report = merge(make_config(), open_adapter(trained.folder), tmp_path / "merged")
    plain = HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    logits = plain_logits(plain, native_inputs(tiny_family, cases))
    assert float((logits - trained.logits).abs().max()) <= 1e-5
    assert report.adapter_effect > 0.05 and report.merged_difference <= 1e-5 and report.greedy_equal
    options = GenerationOptions(temperature=0, max_new_tokens=30)
    for case in cases:
        asked = [(replace(case.sample, audio=None), case.features[:-1])]
        expected = tiny_family.generate_rows(trained.model, asked, options)
        batch = native_batch(tokenizer, [case.utterance], with_target=False)
        rows = plain.generate(**batch, do_sample=False, ras_win_len=None, max_new_tokens=30)
        np.testing.assert_array_equal(rows[:, -30:].numpy(), expected)
    assert "text_lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")
    assert json.loads((tmp_path / "merged" / "merge_info.json").read_text())["merged_dtype"] == "float32"


def test_merge_keeps_the_dtype_of_the_base(
    trained: Trained, make_config: Callable[..., RunConfig], tiny_base: Path, tmp_path: Path
) -> None:
    """A bfloat16 base stays one: stored as float32 the released model would take 23 GB instead of 11.5."""
    half = HiggsAudioV2ForConditionalGeneration.from_pretrained(
        tiny_base / "model", use_text_head=True, dtype=torch.bfloat16
    )
    shutil.copytree(tiny_base / "model", tmp_path / "half")
    half.save_pretrained(tmp_path / "half")
    merge(make_config(model={"path": str(tmp_path / "half")}), open_adapter(trained.folder), tmp_path / "merged")
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "merged" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}

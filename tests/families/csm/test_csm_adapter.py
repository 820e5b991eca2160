"""The adapter: what is trained is what is saved, loaded and merged; and adapters that plain PEFT has made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase as Tokenizer

from csm_cases import FP32, Case, native_example, native_output, plain_model, run_config
from speechtune.cli import main
from speechtune.errors import AdapterError
from speechtune.export.merge import merge
from speechtune.export.verify import verify_adapter
from speechtune.families.csm import tiny
from speechtune.families.csm.family import CsmFamily
from speechtune.inference.load import load_model, model_config, open_adapter
from speechtune.lora.apply import load_adapter
from speechtune.training.run import Outcome, run_training

LIST_OF_NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""As a widely used notebook has them; four of them are names of layers of the codec, too."""
OURS = CsmFamily.lora_presets["default"]


def plain_base(base: Path) -> Any:
    return plain_model(base).eval()


@torch.no_grad()
def logits(model: Any, tokenizer: Tokenizer, cases: Sequence[Case]) -> torch.Tensor:
    """Of both decoders, by the native class."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    out = native_output(plain, tokenizer, cases)
    return torch.cat([out.logits.flatten(0, 1), out.depth_decoder_logits.flatten(0, 1)])


@pytest.fixture(scope="module")
def trained(base: Path, manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Four steps of LoRA in a run of its own."""
    return run_training(run_config(tmp_path_factory.mktemp("csm-run"), base, manifest))


@pytest.fixture(scope="module")
def adapter(trained: Outcome) -> Path:
    return trained.job.config.output_dir / "lora_adapters"


def test_the_run_is_proven(trained: Outcome, base: Path, adapter: Path) -> None:
    """Both decoders' lora_B moved, the base is what it was, and the files hold nothing but the adapter."""
    assert trained.proof.lora_b_moved == trained.proof.lora_b_total == 2 * 7 * 2
    assert trained.proof.base_unchanged
    plain = {name: p for name, p in trained.job.model.named_parameters() if "lora_" not in name}
    after = {name.removeprefix("base_model.model.").replace(".base_layer.", "."): p for name, p in plain.items()}
    before = dict(plain_base(base).named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    names = load_file(adapter / "adapter_model.safetensors")
    assert all("lora_" in name for name in names) and not any("codec" in name for name in names)
    assert any("depth_decoder" in name for name in names) and any("backbone_model" in name for name in names)


def test_saved_is_reloaded_is_merged(
    trained: Outcome, adapter: Path, base: Path, tokenizer: Tokenizer, cases: list[Case], tmp_path: Path
) -> None:
    """Plain PEFT on the plain base, our loader, and the merged folder in plain transformers: the trained logits."""
    expected = logits(trained.job.model.eval(), tokenizer, cases)
    untouched = logits(plain_base(base), tokenizer, cases)
    assert float((expected - untouched).abs().max()) > 0.05
    peft = PeftModel.from_pretrained(plain_base(base), str(adapter)).eval()
    assert float((logits(peft, tokenizer, cases) - expected).abs().max()) <= 1e-6
    stored = open_adapter(adapter)
    _, ours = load_model(model_config(None, None, stored), stored)
    assert float((logits(ours, tokenizer, cases) - expected).abs().max()) <= 1e-6
    report = merge(model_config(None, None, stored), stored, tmp_path / "merged")
    assert report.greedy_equal and report.adapter_effect > 0.05
    plain = plain_base(tmp_path / "merged")
    assert float((logits(plain, tokenizer, cases) - expected).abs().max()) <= 1e-5
    info = json.loads((tmp_path / "merged" / "merge_info.json").read_text())
    assert info["merged_dtype"] == "float32"
    embeds, _ = native_example(plain, tokenizer, [*cases[0].turns[:-1], (cases[0].sample.text, None)])
    greedy = {"do_sample": False, "depth_decoder_do_sample": False, "max_new_tokens": 10}
    rows = [one.generate(inputs_embeds=embeds, **greedy) for one in (plain, peft)]
    np.testing.assert_array_equal(*rows)
    table = plain.backbone_model.embed_tokens.embed_audio_tokens.weight
    assert table is plain.depth_decoder.model.embed_tokens.weight
    settings = [plain_base(folder).depth_decoder.generation_config.to_dict() for folder in (base, tmp_path / "merged")]
    assert settings[0] == settings[1] and settings[1]["do_sample"] is True


def test_depth_alone_is_seen_to_have_an_effect(
    base: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that changes codebooks 1 and up alone has an effect, and survives merging."""
    targets = r"depth_decoder\.model\.layers\.\d+\.self_attn\.(q|v)_proj"
    run_training(run_config(tmp_path, base, manifest, lora={"targets": targets}))
    adapter = str(tmp_path / "run" / "lora_adapters")
    assert main(["adapters", "verify", adapter, "--base", str(base)]) == 0
    assert main(["merge", adapter, str(tmp_path / "merged")]) == 0
    capsys.readouterr()


# -- of plain PEFT -------------------------------------------------------------------------------------------------


def train_plain(base: Path, tokenizer: Tokenizer, cases: Sequence[Case], folder: Path, **options: Any) -> Any:
    """Three steps with plain PEFT on the native class and its loss, saved as PEFT does."""
    torch.manual_seed(0)
    model = get_peft_model(plain_base(base), LoraConfig(r=4, lora_alpha=8, **options)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        native_output(model.get_base_model(), tokenizer, cases).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return model.eval()


@pytest.mark.parametrize("targets", [OURS, LIST_OF_NAMES], ids=["ours", "names"])
def test_adapters_of_plain_peft_are_accepted(
    targets: Any, base: Path, tokenizer: Tokenizer, cases: list[Case], tmp_path: Path
) -> None:
    """Verified and merged; on layers of the codec, which no gradient reached, with a warning that says so."""
    model = train_plain(base, tokenizer, cases, tmp_path / "adapter", target_modules=targets)
    verified = verify_adapter(tmp_path / "adapter", str(base))
    assert verified.valid, verified.issues
    warnings = [check.detail for check in verified.checks if check.status == "warning"]
    if targets == OURS:
        assert not warnings
    else:
        said = "8 of its modules adapt the codec (Mimi, first base_model.model.codec_model."
        assert any(detail.startswith(said) and "which no gradient reached" in detail for detail in warnings)
    stored = open_adapter(tmp_path / "adapter")
    merge(model_config(str(base), None, stored), stored, tmp_path / "merged")
    difference = logits(plain_base(tmp_path / "merged"), tokenizer, cases) - logits(model, tokenizer, cases)
    assert float(difference.abs().max()) <= 1e-5


def refuse(base: Path, folder: Path, reason: str) -> None:
    """`verify` names it, and it is neither loaded nor merged."""
    verified = verify_adapter(folder, str(base))
    assert not verified.valid and any(reason in issue for issue in verified.issues), verified.issues
    stored = open_adapter(folder)
    with pytest.raises(AdapterError, match=reason):
        merge(model_config(str(base), None, stored), stored, folder / "merged")
    assert not (folder / "merged").exists()


def test_an_adapter_trained_on_the_codec_is_named(
    base: Path, tokenizer: Tokenizer, cases: list[Case], tmp_path: Path
) -> None:
    """It fits by names and shapes; but the codes it was trained for are no other base's."""
    config = LoraConfig(r=4, target_modules=LIST_OF_NAMES, init_lora_weights=False)
    get_peft_model(plain_base(base), config).save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    refuse(base, tmp_path / "adapter", "and were trained: codes would no longer mean")


def test_an_adapter_with_untied_embeddings_is_named(
    base: Path, tokenizer: Tokenizer, cases: list[Case], tmp_path: Path
) -> None:
    """A saved model has one table: merged without a word, one of the two that were trained would be lost."""
    options = {"target_modules": OURS, "modules_to_save": ["embed_tokens"]}
    train_plain(base, tokenizer, cases, tmp_path / "copies", **options)
    refuse(base, tmp_path / "copies", "copies of the audio embeddings untie")
    config = LoraConfig(r=4, target_modules=["q_proj", "depth_decoder.model.embed_tokens"], init_lora_weights=False)
    config.exclude_modules = ".*codec_model.*"
    get_peft_model(plain_base(base), config).save_pretrained(str(tmp_path / "adapted"), save_embedding_layers=False)
    refuse(base, tmp_path / "adapted", "it adapts the audio embeddings")


def test_an_adapter_of_another_base_is_refused(adapter: Path, tmp_path: Path, speech: Any) -> None:
    """Of other dimensions, and of the same dimensions with other weights."""
    tiny.make_model(tmp_path / "wider", speech[:1], hidden_size=32)
    tiny.make_model(tmp_path / "other", speech[:1], seed=5)
    stored = open_adapter(adapter)
    for name, reason in (("wider", "shape"), ("other", "otherwise than the base")):
        config = model_config(str(tmp_path / name), None, stored)
        with pytest.raises(AdapterError, match=reason):
            load_adapter(CsmFamily(config).load(FP32), stored) if name == "wider" else load_model(config, stored)

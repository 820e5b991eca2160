"""Several adapters on one base: each answers as it would alone, whatever is added or removed meanwhile."""

from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_helpers import (
    copy_adapter,
    edit_config,
    make_adapter,
    plain_base,
    plain_logits,
    read_weights,
    write_weights,
)
from speechtune.errors import AdapterError
from speechtune.inference.adapter_set import AdapterSet
from speechtune.inference.load import load_model, model_config, open_adapter


def logits_of(base: Path, adapter: Path, strength: float = 1.0) -> torch.Tensor:
    """Logits of an adapter that is alone on its base."""
    stored = open_adapter(adapter, strength)
    return plain_logits(load_model(model_config(str(base / "model"), None, stored), stored)[1], base)


def test_each_answers_as_if_alone(tiny_base: Path, tmp_path: Path) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "a": {},
        "b": {"r": 2, "target_modules": ["k_proj"], "modules_to_save": ["audio_lm_head"]},
        "c": {"use_dora": True},
    }
    folders = {name: make_adapter(tiny_base, tmp_path / name, **kind) for name, kind in kinds.items()}
    base = plain_logits(plain_base(tiny_base), tiny_base)
    served = AdapterSet(str(tiny_base / "model"))
    first = served.add(open_adapter(folders["a"]))
    assert torch.equal(plain_logits(served.model, tiny_base), base), "what is added is not in use yet"
    half = served.add(open_adapter(folders["a"], 0.5))
    others = {name: served.add(open_adapter(folders[name])) for name in ("b", "c")}
    expected = {first.key: logits_of(tiny_base, folders["a"]), half.key: logits_of(tiny_base, folders["a"], 0.5)}
    expected |= {others[name].key: logits_of(tiny_base, folders[name]) for name in others}
    for adapter in (first, half, *others.values(), first):
        served.use(adapter)
        assert torch.equal(plain_logits(served.model, tiny_base), expected[adapter.key])
        assert adapter.effect > 1e-3
    served.use(None)
    assert torch.equal(plain_logits(served.model, tiny_base), base)
    for adapter in (first, others["b"]):  # the one that PEFT was made with among them
        served.remove(adapter)
        assert torch.equal(plain_logits(served.model, tiny_base), base)
    served.use(half)
    assert torch.equal(plain_logits(served.model, tiny_base), expected[half.key])
    served.remove(half)
    served.remove(others["c"])
    assert torch.equal(plain_logits(served.model, tiny_base), base)
    served.use(again := served.add(open_adapter(folders["a"])))
    assert torch.equal(plain_logits(served.model, tiny_base), expected[first.key]) and again.key != first.key


def test_what_is_refused_leaves_no_trace(tiny_base: Path, adapter_run: Path, tmp_path: Path) -> None:
    base = plain_logits(plain_base(tiny_base), tiny_base)
    served = AdapterSet(str(tiny_base / "model"))
    good = adapter_run / "lora_adapters"
    torn = copy_adapter(good, tmp_path / "torn")
    write_weights(torn, dict(list(read_weights(good).items())[2:]))
    useless = copy_adapter(good, tmp_path / "useless")
    edit_config(useless, lora_alpha=0)
    for number in range(2):  # on the base alone, and beside another
        for folder, reason in ((torn, "2 tensors missing"), (useless, "changes no logit")):
            with pytest.raises(AdapterError, match=reason):
                served.add(open_adapter(folder))
            assert torch.equal(plain_logits(served.model, tiny_base), base), (number, folder)
        served.use(served.add(open_adapter(good)))
        assert torch.equal(plain_logits(served.model, tiny_base), logits_of(tiny_base, good))
        served.use(None)


def test_an_adapter_of_another_base_is_refused(tiny_base: Path, adapter_run: Path, tmp_path: Path) -> None:
    """By what the base answers: names and shapes are the same."""
    other = plain_base(tiny_base)
    other.model.norm.weight.data.mul_(3)
    other.save_pretrained(tmp_path / "other")
    for file in (tiny_base / "model").glob("token*"):
        (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
    served = AdapterSet(str(tmp_path / "other"))
    with pytest.raises(AdapterError, match="answers a fixed input otherwise"):
        served.add(open_adapter(adapter_run / "lora_adapters"))

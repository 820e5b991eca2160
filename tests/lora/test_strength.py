"""How much of an adapter counts: against the formulas, plain PEFT, the base and the adapter itself."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import soundfile
import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from safetensors.torch import load_file

from adapter_helpers import make_adapter, plain_base, plain_logits
from helpers import DemoClip, merged
from speechtune.audio import read_provenance
from speechtune.cli import main
from speechtune.errors import AdapterError
from speechtune.inference.load import load_model, model_config, open_adapter

KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA with patterns": {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "rank_pattern": {"v_proj": 2}},
    "DoRA": {"use_dora": True},
    "a module in full": {"modules_to_save": ["audio_lm_head"]},
    "trained tokens": {"trainable_token_indices": {"embed_tokens": [70, 71]}},
    "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "an embedding by DoRA": {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
}


def loaded(base: Path, adapter: Path, strength: float) -> PeftModel:
    stored = open_adapter(adapter, strength)
    return cast(PeftModel, load_model(model_config(str(base / "model"), None, stored), stored)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_are_the_base_and_the_adapter(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", **KINDS[kind])
    base = plain_logits(plain_base(tiny_base), tiny_base)
    trained = plain_logits(PeftModel.from_pretrained(plain_base(tiny_base), str(adapter)).eval(), tiny_base)
    assert float((trained - base).abs().max()) > 1e-2
    assert torch.equal(plain_logits(loaded(tiny_base, adapter, 0), tiny_base), base)
    assert torch.equal(plain_logits(loaded(tiny_base, adapter, 1), tiny_base), trained)
    between = plain_logits(loaded(tiny_base, adapter, 0.5), tiny_base)
    assert min(float((between - end).abs().max()) for end in (base, trained)) > 1e-3


@pytest.mark.parametrize("strength", [0.3, 1.5])
@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA with patterns", "an embedding"])
def test_lora_is_scaled_as_peft_scales_it(kind: str, strength: float, tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", **KINDS[kind])
    plain = PeftModel.from_pretrained(plain_base(tiny_base), str(adapter)).eval()
    with rescale_adapter_scale(plain, strength):
        expected = plain_logits(plain, tiny_base)
    torch.testing.assert_close(plain_logits(loaded(tiny_base, adapter, strength), tiny_base), expected)


@pytest.mark.parametrize("strength", [0.25, 1.5])
def test_weights_of_a_merged_model_follow_the_formulas(strength: float, tiny_base: Path, tmp_path: Path) -> None:
    kinds = [KINDS[kind] for kind in ("DoRA", "a module in full", "trained tokens")]
    adapter = make_adapter(tiny_base, tmp_path / "adapter", **merged(merged(kinds[0], kinds[1]), kinds[2]))
    words = ["merge", adapter, tmp_path / "merged", "--model", tiny_base / "model", "--strength", strength]
    assert main([str(word) for word in words]) == 0
    assert json.loads((tmp_path / "merged" / "merge_info.json").read_text())["lora_strength"] == strength
    base, new = (load_file(folder / "model.safetensors") for folder in (tiny_base / "model", tmp_path / "merged"))
    stored = load_file(adapter / "adapter_model.safetensors")

    def part(name: str) -> torch.Tensor:
        return stored[f"base_model.model.{name}"]

    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.q_proj"
        weight = base[f"{name}.weight"]
        direction = weight + strength * 6 / 4 * part(f"{name}.lora_B.weight") @ part(f"{name}.lora_A.weight")
        magnitude = (1 - strength) * weight.norm(dim=1) + strength * part(f"{name}.lora_magnitude_vector")
        torch.testing.assert_close(
            new[f"{name}.weight"], (magnitude / direction.norm(dim=1))[:, None] * direction, atol=1e-5, rtol=1e-4
        )
    name = "audio_lm_head.weight"
    torch.testing.assert_close(new[name], (1 - strength) * base[name] + strength * part(name))
    name, rows = "model.embed_tokens.weight", part("model.embed_tokens.token_adapter.trainable_tokens_delta")
    torch.testing.assert_close(new[name][70:72], (1 - strength) * base[name][70:72] + strength * rows)
    assert torch.equal(new[name][:70], base[name][:70])


def test_an_adapter_that_changed_its_base_has_no_other_strength(tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_base, tmp_path / "adapter", init_lora_weights="pissa")
    with pytest.raises(AdapterError, match="no strength but 1: pissa changed the base's weights"):
        loaded(tiny_base, adapter, 0.5)
    loaded(tiny_base, adapter, 1.0)


def test_generate_says_the_strength_in_the_wav(tiny_base: Path, adapter_run: Path, tmp_path: Path) -> None:
    def spoken(name: str, *more: object) -> bytes:
        words = [
            "generate",
            "--text",
            "Hi.",
            "--out",
            tmp_path / name,
            "--cache-dir",
            tmp_path,
            "--system",
            "Speak.",
            *more,
        ]
        words += ["--model", tiny_base / "model", "--codec", tiny_base / "codec", "--max-new-tokens", 24, *more]
        assert main([str(word) for word in words]) == 0
        return soundfile.read(tmp_path / name)[0].tobytes()

    with_adapter = ("--adapter", adapter_run)
    assert spoken("zero.wav", *with_adapter, "--strength", 0) == spoken("base.wav")
    full = spoken("full.wav", *with_adapter)
    assert spoken("half.wav", *with_adapter, "--strength", 0.5) not in (full, spoken("base.wav"))
    origins = {name: read_provenance(tmp_path / f"{name}.wav") for name in ("zero", "half", "full", "base")}
    assert {name: origin and origin["adapter_strength"] for name, origin in origins.items()} == {
        "zero": 0, "half": 0.5, "full": 1, "base": None,
    }  # fmt: skip


def test_evaluate_sweeps(
    tiny_base: Path,
    adapter_run: Path,
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts = write_chatml(tmp_path / "prompts.json", demo_clips[:2])
    words = ["evaluate", prompts, "--adapter", adapter_run, "--strength", "0,0.5", "--out", tmp_path / "out"]
    words += ["--model", tiny_base / "model", "--codec", tiny_base / "codec", "--cache-dir", tmp_path / "cache"]
    words = [str(word) for word in [*words, "--max-new-tokens", 24]]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    name = "/".join(adapter_run.resolve().parts[-2:])
    assert list(found["systems"]) == ["base", f"{name}@0", f"{name}@0.5"]
    assert found["strengths"] == {f"{name}@0": 0.0, f"{name}@0.5": 0.5}
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == found
    rows = [json.loads(line) for line in (tmp_path / "out" / "utterances.jsonl").read_text().splitlines()]
    sounds = {(row["system"], row["id"]): soundfile.read(row["audio"])[0].tobytes() for row in rows}
    for sample in {row["id"] for row in rows}:
        assert sounds["base", sample] == sounds[f"{name}@0", sample] != sounds[f"{name}@0.5", sample]
    assert main(words) == 0 and "@0.5" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["generate --text Hi. --out x.wav", "evaluate x.json --out out"])
def test_strength_without_an_adapter_is_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words.split(), "--strength", "0.5"]) == 2
    assert "--strength says how much of an adapter counts: name one with --adapter" in capsys.readouterr().err

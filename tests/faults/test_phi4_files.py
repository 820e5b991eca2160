"""Damaged files and audio of Phi-4-multimodal: each is named with its issue before anything is trained on it.

Where there is a command line, it is called as a user would: exit code 2, one message, no traceback.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import Phi4MultimodalForCausalLM

from speechtune.cache.encode import encode_samples
from speechtune.cli import main as command_line
from speechtune.config import RunConfig
from speechtune.errors import ConfigError, ManifestError, TrainingError
from speechtune.families.phi4_multimodal.family import Phi4MultimodalFamily
from speechtune.families.phi4_multimodal.prompts import RUBRICS
from speechtune.families.phi4_multimodal.tiny import make_tokenizer
from speechtune.precision import PrecisionPlan
from speechtune.storage.model_folder import inspect_folder
from speechtune.training.run import run_training
from speechtune.types import AudioRef, Encoded, Pronunciation, Sample

FP32 = PrecisionPlan("fp32", torch.device("cpu"), torch.float32, None, False, "test")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 15524095\n"
WEB_PAGE = "\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
WEIGHT = "model.layers.1.mlp.down_proj.weight"
LORA_WEIGHTS = "speech-lora/adapter_model.safetensors"
SCORES = {"accuracy": 7, "fluency": 3, "prosodic": 5, "total": 6}

Configure = Callable[..., RunConfig]


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu() -> Any:
    """Also where there is a GPU: the plan would be another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


def train(config: RunConfig, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """`speechtune train` on the recipe: exit code, and what it says of its failure."""
    recipe = config.output_dir.parent / "recipe.yaml"
    recipe.write_text(config.to_yaml(), encoding="utf-8")
    code = command_line(["train", str(recipe)])
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert not list(config.output_dir.glob("checkpoint-*")) and not (config.output_dir / "lora_adapters").exists()
    return code, shown.err


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def put(path: Path, value: float, name: str = WEIGHT) -> None:
    """Write a value into one element of a tensor (of the first, without a name)."""
    change_tensors(path, lambda tensors: tensors[name or min(tensors)].view(-1)[0].fill_(value))


def write_rows(path: Path, audios: list[Path]) -> Path:
    rows = [{"id": audio.stem, "audio": str(audio), "text": "one", "task": "APA", "target": SCORES} for audio in audios]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_sound(path: Path, samples: np.ndarray) -> Path:
    soundfile.write(path, samples.astype(np.float32), 16_000, subtype="FLOAT")
    return path


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.1, round(16_000 * seconds))


# -- tokenizer -----------------------------------------------------------------------------------------------------

TOKENIZER_ISSUES = {
    "LFS pointer": (lambda text: POINTER, "a Git LFS pointer, not the file itself"),
    "web page": (lambda text: WEB_PAGE, "a web page, not the file itself"),
    "truncated": (lambda text: text[: len(text) // 2], "not valid JSON"),
    "0 bytes": (lambda text: "", "empty (0 bytes)"),
    "null": (lambda text: "null", "holds no JSON object but NoneType"),
    "other JSON": (lambda text: '{"error": "Invalid credentials"}', "not a tokenizer"),
}


@pytest.mark.parametrize("issue", TOKENIZER_ISSUES)
def test_a_damaged_tokenizer_is_named(
    issue: str, phi4_copy: Path, phi4_config: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    """tokenizers itself says `expected value at line 1 column 1` of the first four, without the file's name."""
    damage, reason = TOKENIZER_ISSUES[issue]
    file = phi4_copy / "tokenizer.json"
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8")
    code, message = train(phi4_config(model={"path": str(phi4_copy)}), capsys)
    assert code == 2
    assert f"model.path={phi4_copy}: tokenizer.json: {reason}" in message
    assert [issue.source for issue in inspect_folder(phi4_copy)] == ["tokenizer.json"]


@pytest.mark.parametrize("token", ["<|end|>", "<|user|>", "<|assistant|>"])
def test_a_special_token_that_is_several_ids_is_refused(
    token: str, phi4_copy: Path, phi4_config: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    """An answer would never end, or no turn ever begin."""
    file = phi4_copy / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["added_tokens"] = [entry for entry in values["added_tokens"] if entry["content"] != token]
    values["model"]["vocab"].pop(token, None)
    file.write_text(json.dumps(values), encoding="utf-8")
    code, message = train(phi4_config(model={"path": str(phi4_copy)}), capsys)
    assert code == 2 and re.search(rf"reads {re.escape(token)} as the ids \[\d+, .*does not belong", message), message


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(
    phi4_copy: Path, phi4_config: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids beyond the embedding end in an IndexError on a CPU, and on a GPU in an assertion of the device."""
    file = phi4_copy / "config.json"
    rows = json.loads(file.read_text())["vocab_size"]
    texts = [f"{number}{number * 7} " for number in range(5000)]
    larger = make_tokenizer(texts, vocab_size=3000)
    assert len(larger) > rows
    larger.save_pretrained(phi4_copy)
    code, message = train(phi4_config(model={"path": str(phi4_copy)}), capsys)
    assert code == 2 and "it does not belong to the model" in message and f"of {rows}" in message


def test_a_tokenizer_of_a_smaller_vocabulary_is_refused(
    phi4_copy: Path, phi4_config: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    """All its ids exist, but mean something else; the end of an answer gives it away."""
    make_tokenizer(vocab_size=400).save_pretrained(phi4_copy)
    code, message = train(phi4_config(model={"path": str(phi4_copy)}), capsys)
    assert code == 2 and re.search(r"<\|end\|> has the id \d+, the model stops at \[\d+, \d+\]", message), message


# -- remote code ---------------------------------------------------------------------------------------------------


def make_remote_code(folder: Path) -> Path:
    """Turn a folder into the hub's main branch: phi4mm, with code that leaves a file when it is run."""
    witness = folder / "was-run"
    file = folder / "config.json"
    values = json.loads(file.read_text()) | {
        "model_type": "phi4mm",
        "architectures": ["Phi4MMForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_phi4mm.Phi4MMConfig",
            "AutoModelForCausalLM": "modeling_phi4mm.Phi4MMForCausalLM",
            "AutoTokenizer": ["modeling_phi4mm.Phi4MMTokenizer", None],
        },
    }
    file.write_text(json.dumps(values))
    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"auto_map": values["auto_map"]}))
    code = f"open({str(witness)!r}, 'w').close()\nfrom transformers import PretrainedConfig\n"
    for name in ("configuration", "modeling"):
        (folder / f"{name}_phi4mm.py").write_text(f"{code}class Phi4MMConfig(PretrainedConfig):\n    pass\n")
    return witness


def test_remote_code_is_refused_with_the_way_out(
    phi4_copy: Path, phi4_config: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    witness = make_remote_code(phi4_copy)
    code, message = train(phi4_config(model={"path": str(phi4_copy)}), capsys)
    assert code == 2 and "model_type is 'phi4mm'" in message and "never run here" in message
    assert "refs/pr/70" in message and "convert_phi4_multimodal_weights_to_hf.py" in message
    assert "trust_remote_code" not in message and not witness.exists()


@pytest.mark.parametrize("verb", ["train", "doctor"])
def test_remote_code_is_not_even_offered_to_be_run(
    verb: str, phi4_copy: Path, phi4_config: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue: transformers' Auto classes ask at the terminal whether to run the folder's code, and a `y` ran it."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    witness = make_remote_code(phi4_copy)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(phi4_config(model={"path": str(phi4_copy)}).to_yaml(), encoding="utf-8")
    assert command_line([verb, str(recipe)]) == 2
    family = Phi4MultimodalFamily(phi4_config(model={"path": str(phi4_copy)}))
    with pytest.raises(ConfigError, match="phi4mm"):
        _ = family.tokenizer
    assert asked == [] and not witness.exists()


def test_code_beside_native_weights_is_not_run(
    phi4_copy: Path, phi4_config: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder converted in place may keep the old auto_map and its files."""
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    witness = make_remote_code(phi4_copy)
    file = phi4_copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "phi4_multimodal"}))
    family = Phi4MultimodalFamily(phi4_config(model={"path": str(phi4_copy)}))
    assert isinstance(family.load(FP32), Phi4MultimodalForCausalLM)
    assert len(family.tokenizer("<|end|>", add_special_tokens=False)["input_ids"]) == 1
    assert not witness.exists()


# -- configuration and weights -------------------------------------------------------------------------------------


def drop_shard(folder: Path) -> None:
    Phi4MultimodalForCausalLM.from_pretrained(folder).save_pretrained(folder / "sharded", max_shard_size="700KB")
    (folder / "model.safetensors").unlink()
    for path in (folder / "sharded").glob("model*"):
        shutil.move(path, folder)
    sorted(folder.glob("model-0*.safetensors"))[1].unlink()


def set_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


WEIGHT_ISSUES: dict[str, tuple[Callable[[Path], object], str]] = {
    "config is null": (lambda f: (f / "config.json").write_text("null"), r"config\.json: holds no JSON object"),
    "config is gone": (lambda f: (f / "config.json").unlink(), "no model configuration there"),
    "config of another model": (lambda f: set_config(f, model_type="llama"), "model_type is 'llama'"),
    "truncated in the header": (lambda f: cut(f / "model.safetensors", 0.001), r"model\.safetensors: truncated"),
    "truncated at the end": (lambda f: cut(f / "model.safetensors", 0.999), r"model\.safetensors: truncated"),
    "LFS pointer": (lambda f: (f / "model.safetensors").write_text(POINTER), r"model\.safetensors: a Git LFS pointer"),
    "gone": (lambda f: (f / "model.safetensors").unlink(), "the base model does not load"),
    "shard missing": (drop_shard, r"model-00002-of-\d+\.safetensors: missing, model\.safetensors\.index\.json names"),
    "index is a list": (
        lambda f: (f / "model.safetensors.index.json").write_text("[]"),
        r"index\.json: holds no JSON object but list",
    ),
    "index without files": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": null}'),
        r"index\.json: not an index of weights",
    ),
    "tensor missing": (
        lambda f: change_tensors(f / "model.safetensors", lambda t: t.pop(WEIGHT)),
        rf"missing \['{re.escape(WEIGHT)}'\]",
    ),
    "tensor of another shape": (
        lambda f: change_tensors(f / "model.safetensors", lambda t: t.update({WEIGHT: torch.ones(3, 3)})),
        rf"mismatched \[.*{re.escape(WEIGHT)}",
    ),
    "NaN where the speech LoRA is merged": (
        lambda f: put(f / "model.safetensors", float("nan")),
        rf"1 weights of the base are not finite \({re.escape(WEIGHT)} holds NaN\); download it again",
    ),
    "NaN elsewhere": (
        lambda f: put(f / "model.safetensors", float("nan"), "model.norm.weight"),
        r"1 weights of the base are not finite \(model\.norm\.weight holds NaN\)",
    ),
    "infinity in the hearing": (
        lambda f: put(
            f / "model.safetensors",
            float("inf"),
            "model.embed_tokens_extend.audio_embed.up_proj_for_speech.weight",
        ),
        r"up_proj_for_speech\.weight holds infinity\)",
    ),
}


@pytest.mark.parametrize("issue", WEIGHT_ISSUES)
def test_a_damaged_base_is_refused(
    issue: str, phi4_copy: Path, phi4_config: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers fills missing tensors with random numbers, and NaN in a base gives every run a loss of NaN."""
    damage, reason = WEIGHT_ISSUES[issue]
    damage(phi4_copy)
    code, message = train(phi4_config(model={"path": str(phi4_copy)}), capsys)
    assert code == 2 and re.search(reason, message.replace("base_layer.", "")), message
    assert f"model.path={phi4_copy}" in message


def test_a_tensor_too_many_is_named(
    phi4_copy: Path, phi4_config: Configure, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers of converters are harmless, a layer is not: the user is told what is left out."""
    monkeypatch.setattr(logging.getLogger("speechtune"), "propagate", True)
    extra = "model.layers.2.mlp.down_proj.weight"
    change_tensors(phi4_copy / "model.safetensors", lambda tensors: tensors.update({extra: torch.ones(3, 3)}))
    Phi4MultimodalFamily(phi4_config(model={"path": str(phi4_copy)})).load(FP32)
    assert f"{phi4_copy}: 1 tensors the model has no place for: {extra}" in caplog.text


def test_a_base_without_vision_part_in_its_config_is_refused(phi4_copy: Path, phi4_config: Configure) -> None:
    """`vision_config: null` stands for the released tower of 428 million parameters, which the weights lack."""
    set_config(phi4_copy, vision_config=None)
    family = Phi4MultimodalFamily(phi4_config(model={"path": str(phi4_copy)}))
    tower = sum(p.numel() for name, p in family.skeleton().named_parameters() if "image_embed" in name)
    assert tower > 400e6
    with pytest.raises(ConfigError, match="the weights do not fit the model"):
        family.load(FP32)


# -- the speech LoRA -----------------------------------------------------------------------------------------------


def other_width(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "lora_A" in name]:
        tensors[name] = tensors[name][:, : tensors[name].shape[1] // 2]


def other_layers(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors[name.replace(".layers.1.", ".layers.31.")] = tensors.pop(name)


SPEECH_ISSUES: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder gone": (
        lambda f: shutil.rmtree(f / "speech-lora"),
        r"no folder .*speech-lora; the base cannot process audio",
    ),
    "weights gone": (lambda f: (f / LORA_WEIGHTS).unlink(), r"no adapter_model\.safetensors"),
    "config gone": (lambda f: (f / "speech-lora/adapter_config.json").unlink(), r"no adapter_config\.json"),
    "LFS pointer": (lambda f: (f / LORA_WEIGHTS).write_text(POINTER), r"adapter_model\.safetensors: a Git LFS pointer"),
    "web page": (lambda f: (f / LORA_WEIGHTS).write_text(WEB_PAGE), r"adapter_model\.safetensors: a web page"),
    "truncated": (lambda f: cut(f / LORA_WEIGHTS, 0.9), r"adapter_model\.safetensors: truncated"),
    "NaN": (lambda f: put(f / LORA_WEIGHTS, float("nan"), ""), r"speech-lora: NaN or infinity in 1 tensors \(first"),
    "of another width": (
        lambda f: change_tensors(f / LORA_WEIGHTS, other_width),
        "speech-lora: its tensors do not fit",
    ),
    "of a deeper model": (lambda f: change_tensors(f / LORA_WEIGHTS, other_layers), r"has no model\.layers\.31\."),
}


@pytest.mark.parametrize("issue", SPEECH_ISSUES)
@pytest.mark.parametrize("mode", ["merge", "continue"])
def test_a_damaged_speech_lora_is_refused(
    mode: str, issue: str, phi4_copy: Path, phi4_config: Configure, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained without it, the adapter would belong to a base that cannot process audio."""
    damage, reason = SPEECH_ISSUES[issue]
    damage(phi4_copy)
    code, message = train(phi4_config(model={"path": str(phi4_copy), "speech_lora": mode}), capsys)
    assert code == 2 and str(phi4_copy / "speech-lora") in message, message
    if mode == "merge":  # when continued, differences of shape are told by the adapter's own loader
        assert re.search(reason, message), message


# -- audio ---------------------------------------------------------------------------------------------------------


def test_nan_in_training_audio_is_named(
    phi4_config: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The native extractor hands NaN on as features, and the loss is NaN."""
    broken = noise(1.5)
    broken[7000] = np.nan
    rows = [write_sound(tmp_path / "sound.wav", noise(1.2)), write_sound(tmp_path / "broken.wav", broken)]
    data = {"train": write_rows(tmp_path / "rows.jsonl", rows)}
    code, message = train(phi4_config(data=data), capsys)
    assert code == 2 and "broken.wav" in message and "holds NaN or infinite samples" in message
    assert "sound.wav" not in message
    assert command_line(["validate", str(data["train"]), "--json"]) != 0
    (issue,) = json.loads(capsys.readouterr().out)["issues"]
    assert issue["sample_id"] == "broken" and issue["code"] == "not_finite"


def test_nan_in_features_is_named(phi4_config: Configure, tmp_path: Path) -> None:
    """Whatever an extractor makes of sound samples, NaN does not get into the cache."""

    class Broken(Phi4MultimodalFamily):
        encode_key = "broken"

        def encode_audio(self, audios: Any) -> list[np.ndarray]:
            found = super().encode_audio(audios)
            found[0][3, 5] = np.nan
            return found

    sample = Sample("one", "one", AudioRef(path=str(write_sound(tmp_path / "one.wav", noise(1.0)))))
    with pytest.raises(ManifestError, match=r"one\.wav.*encodes to NaN or infinity"):
        encode_samples(Broken(phi4_config()), [sample], tmp_path / "cache")


def test_a_clip_shorter_than_a_window_is_refused(
    phi4_config: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Natively it takes no position in a batch: its placeholders would be filled from its neighbour's sound."""
    clips = [write_sound(tmp_path / "sound.wav", noise(1.2)), write_sound(tmp_path / "click.wav", noise(399 / 16_000))]
    rows = write_rows(tmp_path / "rows.jsonl", clips)
    code, message = train(phi4_config(data={"train": rows}), capsys)
    assert code == 2 and "click.wav" in message and "shorter than data.min_seconds" in message
    code, message = train(phi4_config(data={"train": rows, "min_seconds": 0.01}), capsys)
    assert code == 2 and "click.wav" in message and "399 samples: shorter than one window of 400" in message


def test_a_clip_of_41_seconds_is_refused(
    phi4_config: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = [write_sound(tmp_path / "sound.wav", noise(1.2)), write_sound(tmp_path / "speech41.wav", noise(41.0))]
    rows = write_rows(tmp_path / "rows.jsonl", clips)
    code, message = train(phi4_config(data={"train": rows}), capsys)
    assert code == 2 and "speech41.wav" in message and re.search(r"41\.0 s is longer than .*40 s", message), message
    assert command_line(["validate", str(rows), "--json"]) != 0
    (issue,) = json.loads(capsys.readouterr().out)["issues"]
    assert issue["sample_id"] == "speech41" and "41.0 s is longer than" in issue["message"]


# -- targets -------------------------------------------------------------------------------------------------------


def test_masked_labels_give_nan_natively_and_are_refused_here(phi4_base: Path, phi4_config: Configure) -> None:
    """All labels -100 are 0/0 in transformers: a loss of NaN, which the Trainer shows as 0.0."""
    model: Any = Phi4MultimodalForCausalLM.from_pretrained(phi4_base)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert bool(model(input_ids=ids, labels=torch.full_like(ids, -100)).loss.isnan())
        assert bool(model(input_ids=ids, labels=ids).loss.isfinite())

    class WithoutTargets(Phi4MultimodalFamily):
        def encode(self, sample: Sample, features: Any) -> Encoded:
            item = super().encode(sample, features)
            arrays = dict(item.arrays)
            arrays.update({name: array[:0] for name, array in arrays.items() if "_positions" in name})
            arrays.update({name: array[:0] for name, array in arrays.items() if "_targets" in name})
            return Encoded(item.sample_id, arrays, item.num_tokens, item.audio_seconds)

    config = phi4_config()
    with pytest.raises(TrainingError, match=r"step 1: no target for APA.*clip-\d#"):
        run_training(config, WithoutTargets(config))
    assert not list(config.output_dir.glob("checkpoint-*"))


@pytest.mark.parametrize("target", [{}, "", None, {"accuracy": 7}])
def test_an_empty_target_is_refused_with_its_row(
    target: Any, phi4_config: Configure, phi4_rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in phi4_rows.read_text().splitlines()]
    rows[2]["target"] = target
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, message = train(phi4_config(data={"train": path}), capsys)
    assert code == 2 and "rows.jsonl:3" in message and "target" in message, message


def test_the_rubric_is_no_target(phi4_config: Configure) -> None:
    """Loss on the prompt would teach the rubric: its tokens are in the input and never among the targets."""
    family = Phi4MultimodalFamily(phi4_config())
    sample = Sample("one", "one", None, pronunciation=Pronunciation("APA", SCORES))
    item = family.encode(sample, [np.zeros((80, 80), np.float32)])
    targets = family.tokenizer.decode(item.arrays["APA_targets"])
    assert targets.endswith("<|end|>") and RUBRICS["APA"][:20] not in str(targets)

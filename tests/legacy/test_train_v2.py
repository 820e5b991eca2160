"""The original pipeline's command lines, on real speech and on a base folder that speechtune did not make."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, HiggsAudioV2Config, HiggsAudioV2ForConditionalGeneration

from helpers import DemoClip
from speechtune.errors import ConfigError
from speechtune.families.higgs_audio_v2 import tiny
from speechtune.legacy import in_flags
from speechtune.legacy.train_v2 import FLAGS, main, parse
from speechtune.storage.verified_folder import find_checkpoints, verify_folder

ROOT = Path(__file__).parents[2]
CORPUS = ROOT.parent / "shared/data/speechocean762-mini"
REQUIRED = ["--model_path", "m", "--audio_tokenizer_path", "c", "--train_data_file", "t.json"]
DOCUMENTED = (
    "model_path audio_tokenizer_path train_data_file eval_data_file validation_split output_dir num_train_epochs "
    "per_device_train_batch_size per_device_eval_batch_size learning_rate warmup_steps logging_steps save_steps "
    "eval_steps use_lora lora_rank lora_alpha lora_dropout seed bf16 report_to logging_dir disable_eval freeze_llm "
    "enable_strategic_logging strategic_logging_steps"
)


def corpus_rows(number: int) -> list[dict[str, object]]:
    """ChatML rows of real recordings: the reference is the speaker's next utterance."""

    def table(name: str) -> dict[str, str]:
        lines = (CORPUS / "train" / name).read_text(encoding="utf-8").splitlines()
        return dict(line.split("\t", 1) for line in lines)

    texts, files, speakers = table("text"), table("wav.scp"), table("utt2spk")
    ids = list(texts)[:number]

    def part(utterance: str) -> dict[str, str]:
        return {"type": "audio", "audio_url": str((CORPUS / files[utterance]).resolve())}

    rows = []
    for utterance in ids:
        own = [other for other in ids if speakers[other] == speakers[utterance]]
        reference = own[(own.index(utterance) + 1) % len(own)]
        instruction = f"Please generate speech for given text in reference audio's voice: {texts[utterance]}"
        user = [{"type": "text", "text": texts[reference]}, part(reference), {"type": "text", "text": instruction}]
        answer = [{"type": "text", "text": texts[utterance]}, part(utterance)]
        messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "speaker": speakers[utterance], "start_index": 1})
    return rows


def demo_rows(clips: list[DemoClip]) -> list[dict[str, object]]:
    """The same from the shipped clips, in the plain layout of alternating turns."""
    rows = []
    for target, reference in ((clips[0], clips[1]), (clips[1], clips[0]), (clips[2], clips[3]), (clips[3], clips[2])):
        messages = []
        for clip in (reference, target):
            messages.append({"role": "user", "content": clip.text})
            audio = {"type": "audio", "audio_url": str(clip.path)}
            messages.append({"role": "assistant", "content": [audio]})
        rows.append({"messages": messages, "speaker": clip.speaker})
    return rows


@pytest.fixture(scope="module")
def foreign_base(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A base saved by transformers alone, loaded the default way: without its text head."""
    folder = tmp_path_factory.mktemp("foreign") / "base"
    config = HiggsAudioV2Config.from_pretrained(tiny_base / "model")
    torch.manual_seed(1)
    HiggsAudioV2ForConditionalGeneration(config).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def run(command: list[str], folder: Path, base: Path, tiny_base: Path, rows: list, *flags: str) -> str:
    (folder / "train.json").write_text(json.dumps(rows))
    arguments = ["--model_path", base, "--audio_tokenizer_path", tiny_base / "codec"]
    arguments += ["--train_data_file", folder / "train.json", "--output_dir", folder / "output"]
    arguments += ["--logging_dir", folder / "logs", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


def rows_to_train(clips: list[DemoClip]) -> list[dict[str, object]]:
    return corpus_rows(12) if CORPUS.is_dir() else demo_rows(clips)


def test_train_v2_with_lora(tmp_path: Path, foreign_base: Path, tiny_base: Path, demo_clips: list[DemoClip]) -> None:
    """Guards against adapters never attached, full models in LoRA checkpoints, and bases only we can have made."""
    log = run(
        [sys.executable, "trainer/train_v2.py"],
        tmp_path,
        foreign_base,
        tiny_base,
        rows_to_train(demo_clips),
        *[
            "--use_lora",
            "--num_train_epochs",
            "2",
            "--save_steps",
            "3",
            "--bf16",
            "--validation_split",
            "0.1",
            "--eval_steps",
            "2",
        ],
        *["--freeze_audio_tower", "--freeze_audio_encoder_proj", "--report_to", "tensorboard"],
    )
    assert log.count("no Whisper encoder") == 1
    assert "has no text head" in log
    output = tmp_path / "output"
    adapters = output / "lora_adapters"
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {p.name for p in adapters.iterdir()}
    assert verify_folder(adapters) == []
    assert (output / "trainer_state.json").is_file()
    assert not list(output.rglob("model*.safetensors")), "with LoRA no full model is written"
    assert list((tmp_path / "logs").rglob("events.out.tfevents*"))
    base = HiggsAudioV2ForConditionalGeneration.from_pretrained(foreign_base)
    state = PeftModel.from_pretrained(base, str(adapters)).state_dict()
    assert all(state[name].any() for name in state if "lora_B" in name)


def test_train_v2_ddp_in_full(tmp_path: Path, tiny_base: Path, demo_clips: list[DemoClip]) -> None:
    """Guards against DDP that accelerate quietly runs as separate single processes."""
    log = run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "trainer/train_v2_ddp.py"],
        tmp_path,
        tiny_base / "model",
        tiny_base,
        rows_to_train(demo_clips),
        *["--num_train_epochs", "1", "--per_device_train_batch_size", "2", "--disable_eval", "--report_to", "none"],
    )
    assert "100.00%" in log
    ((step, checkpoint),) = find_checkpoints(tmp_path / "output")
    assert step == (3 if CORPUS.is_dir() else 1), "12 samples by 2 ranks of 2 are 3 steps"
    assert verify_folder(checkpoint) == []
    assert (checkpoint / "model.safetensors").is_file()
    output = tmp_path / "output"
    assert (output / "model.safetensors").samefile(checkpoint / "model.safetensors"), "no second copy of the weights"
    assert not (output / "config.json").samefile(checkpoint / "config.json")
    model = HiggsAudioV2ForConditionalGeneration.from_pretrained(output)
    stored = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items() if name in stored)
    assert not [name for name in ("optimizer.pt", "rng_state.pt", "MANIFEST.json") if (output / name).exists()]
    assert AutoTokenizer.from_pretrained(output).vocab_size
    assert not (tmp_path / "output/lora_adapters").exists()


def test_the_table_has_every_documented_flag_and_default() -> None:
    assert set(DOCUMENTED.split()) <= {flag.name.removeprefix("--") for flag in FLAGS}
    config, _ = parse(REQUIRED)
    assert (config.train.epochs, config.train.batch_size, config.evaluate.batch_size) == (3, 4, 1)
    assert (config.train.learning_rate, config.train.warmup_steps, config.train.seed) == (5e-5, 100, 42)
    assert (config.tracking.log_every_steps, config.checkpoint.every_steps) == (10, 500)
    assert (config.evaluate.every_steps, config.checkpoint.keep_last) == (500, 3)
    assert (config.lora.enabled, config.lora.rank, config.lora.alpha, config.lora.dropout) == (False, 16, 32, 0.1)
    assert config.lora.targets == "attention"
    assert (config.data.validation_split, config.data.eval, str(config.output_dir)) == (0, None, "output")
    assert (config.evaluate.enabled, config.train.precision) == (True, "auto")
    assert config.tracking.trackers == ("tensorboard",)


def test_flags_reach_their_options(caplog: pytest.LogCaptureFixture) -> None:
    """Guards against flags that are swallowed."""
    config, _ = parse([*REQUIRED, "--bf16", "--disable_eval", "--freeze_llm", "--report_to", "none"])
    assert (config.train.precision, config.evaluate.enabled) == ("bf16", False)
    assert config.train.freeze
    assert config.tracking.trackers == ()
    detailed, _ = parse([*REQUIRED, "--enable_strategic_logging", "--strategic_logging_steps", "7"])
    assert detailed.tracking.detail_every_steps == 7


def test_whisper_flags(caplog: pytest.LogCaptureFixture) -> None:
    """`--whisper_path` turns conditioning on; the original's two flags say what stays frozen, and warn without it."""
    caplog.set_level("INFO", "speechtune")
    freeze = ["--freeze_audio_tower", "--freeze_audio_encoder_proj"]
    model = parse([*REQUIRED, *freeze])[0].model.model_dump()
    assert (model["reference_conditioning"], model["freeze_reference_projector"]) == (None, False)
    assert caplog.text.count("nothing to freeze without --whisper_path") == 1
    caplog.clear()
    model = parse([*REQUIRED, "--whisper_path", "w", *freeze])[0].model.model_dump()
    assert (model["reference_conditioning"], model["whisper_path"]) == ("whisper", "w")
    assert model["freeze_reference_projector"] and not caplog.text
    model = parse([*REQUIRED, "--whisper_path", "w", "--set", "model.reference_positions=8"])[0].model.model_dump()
    assert (model["freeze_reference_projector"], model["reference_positions"]) == (False, 8)
    with pytest.raises(ConfigError, match="reference_positions is for"):
        parse([*REQUIRED, "--set", "model.reference_positions=8"])


def test_messages_name_the_flags() -> None:
    """Guards against advice about options that this command line does not take."""
    with pytest.raises(ConfigError, match=r"--eval_data_file \(e\.json\) and --validation_split \(0\.1\) are both set"):
        parse([*REQUIRED, "--eval_data_file", "e.json", "--validation_split", "0.1"])
    with pytest.raises(ConfigError) as caught:
        parse([*REQUIRED, "--num_train_epochs", "-1", "--enable_strategic_logging", "--strategic_logging_steps", "0"])
    assert all(
        f"{flag}: Input should be" in str(caught.value) for flag in ("num_train_epochs", "strategic_logging_steps")
    )


def test_flags_for_faulty_rows_resuming_and_looking(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, dry_run = parse([*REQUIRED, "--on_error", "quarantine", "--force_resume", "--dry_run"])
    assert (config.data.on_error, config.checkpoint.force, dry_run) == ("quarantine", True, True)
    config, dry_run = parse([*REQUIRED, "--set", "data.quarantine_limit=0.5", "--set", "lora.targets=default"])
    assert (config.data.on_error, config.data.quarantine_limit, dry_run) == ("fail", 0.5, False)
    assert config.lora.targets == "default" and not config.checkpoint.force
    assert main([*REQUIRED, "--on_error", "skip"]) == 2
    assert "--on_error: Input should be 'fail' or 'quarantine'" in capsys.readouterr().err


def test_a_dry_run_shows_the_recipe_and_writes_nothing(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model_path", str(tiny_base / "model"), "--audio_tokenizer_path", str(tiny_base / "codec")]
    arguments += ["--train_data_file", "none.json", "--output_dir", str(tmp_path / "out"), "--use_lora", "--dry_run"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "family: higgs_audio_v2" in printed and "train: none.json" in printed and "trainable" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("go on with checkpoint.resume=auto, or", "go on with --resume auto, or"),
        ("checkpoint.force=true resumes all the same", "--force_resume resumes all the same"),
        ("or set data.on_error=quarantine", "or set --on_error quarantine"),
        ("output_dir=/tmp/a.b/out holds", "--output_dir /tmp/a.b/out holds"),
        ("set train.precision=bf16 or", "set --bf16 or"),
        ("train.precision=fp16 computes", "--set train.precision=fp16 computes"),
        ("more than data.quarantine_limit (0.05)", "more than --set data.quarantine_limit (0.05)"),
        ("/data.train/data.evals and model.layers.0", "/data.train/data.evals and model.layers.0"),
    ],
)
def test_options_are_named_as_they_can_be_typed(message: str, typed: str) -> None:
    assert in_flags(message, FLAGS) == typed
    assert in_flags(typed, FLAGS) == typed


def test_log_lines_name_the_flags(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against advice in a warning about an option that this command line does not take."""
    (tmp_path / "train.json").write_text("[]")
    arguments = ["--model_path", str(tiny_base / "model"), "--audio_tokenizer_path", str(tiny_base / "codec")]
    arguments += ["--train_data_file", str(tmp_path / "train.json"), "--output_dir", str(tmp_path / "out")]
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"--output_dir {tmp_path / 'out'} holds" in error and "--resume auto" in error
    assert "checkpoint.resume" not in error and "output_dir=" not in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (REQUIRED[:4], "the following arguments are required: --train_data_file"),
        ([*REQUIRED, "--warmup_steps", "-3"], "--warmup_steps: Input should be"),
        ([*REQUIRED, "--output_dir", "/proc/none"], "saving failed"),
    ],
    ids=["usage", "configuration", "run"],
)
def test_two_ranks_say_what_is_wrong_once(flags: list[str], message: str) -> None:
    """Guards against a message for each of eight ranks, and against exit codes that all say 1."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "trainer/train_v2_ddp.py", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.stderr.count(message) == 1, result.stderr
    expected = 3 if message == "saving failed" else 2
    assert re.search(rf"exitcode\s*: {expected} \(", result.stderr), "torchrun names the ranks' own exit code"
    assert result.returncode == 1, "torchrun's own"

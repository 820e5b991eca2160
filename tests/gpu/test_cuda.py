"""On a CUDA device the plan follows the capability, and a small run trains, saves and resumes. `pytest -m gpu`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import DemoClip
from speechtune.config import RunConfig
from speechtune.families import build_config
from speechtune.families.phi4_multimodal import tiny as tiny_phi4
from speechtune.inference.load import load_model, model_config, open_adapter
from speechtune.precision import plan_precision
from speechtune.storage.verified_folder import verify_folder
from speechtune.tasks.pronunciation.targets import SCORE_FIELDS
from speechtune.training.run import run_training

pytestmark = pytest.mark.gpu


@pytest.fixture
def config(
    tmp_path: Path, make_config: Callable[..., RunConfig], write_chatml: Callable, demo_clips: list[DemoClip]
) -> RunConfig:
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device: run these tests on a machine that has one")
    return make_config(
        data={"train": write_chatml(tmp_path / "train.json", demo_clips[:4])},
        train={"max_steps": 6, "batch_size": 2, "learning_rate": 1e-3},
        checkpoint={"every_steps": 3, "resume": "auto"},
    )


def test_a_run_trains_in_the_precision_of_the_device(config: RunConfig) -> None:
    plan = plan_precision()
    assert plan.name == ("bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16")
    outcome = run_training(config)
    assert outcome.job.precision.name == plan.name
    assert outcome.proof.base_unchanged
    assert outcome.proof.lora_b_moved == outcome.proof.lora_b_total > 0
    assert all(
        parameter.dtype == torch.float32 for parameter in outcome.job.model.parameters() if parameter.requires_grad
    )
    assert verify_folder(config.output_dir / "lora_adapters") == []


def test_a_stopped_run_goes_on(config: RunConfig) -> None:
    half = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 3})})
    run_training(half)
    assert run_training(config).result.state.step == 6


def test_pronunciation_trains_and_its_adapter_answers_alike(tmp_path: Path, demo_clips: list[DemoClip]) -> None:
    """Both tasks on the GPU's plan, prompts answered on the way; the reloaded adapter gives the same logits."""
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device: run these tests on a machine that has one")
    tiny_phi4.make_model(tmp_path / "base", output_scale=10.0, speech_lora_rank=4)
    rows = []
    for number, clip in enumerate(demo_clips[:4]):
        row = {"audio": str(clip.path), "text": clip.text}
        heard = {"word_transcript": "a", "phoneme_transcript": "AA B"}
        rows += [row | {"task": "APA", "target": dict.fromkeys(SCORE_FIELDS, number)}]
        rows += [row | {"task": "MDD", "target": heard}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "family": "phi4_multimodal",
        "output_dir": tmp_path / "run",
        "model": {"path": str(tmp_path / "base")},
        "data": {"train": tmp_path / "rows.jsonl", "cache_dir": tmp_path / "cache"},
        "train": {"max_steps": 6, "batch_size": 4, "learning_rate": 1e-3},
        "evaluate": {"every_steps": 3, "prompts": 2},
        "tracking": {"trackers": ()},
    }
    outcome = run_training(build_config(values, "test"))
    assert outcome.proof.base_unchanged and outcome.proof.lora_b_moved == outcome.proof.lora_b_total > 0
    adapter = open_adapter(tmp_path / "run" / "lora_adapters")
    trained, _ = outcome.job.family.probe(outcome.job.model.eval())
    family, loaded = load_model(model_config(None, None, adapter), adapter, outcome.job.precision)
    assert float((family.probe(loaded)[0] - trained).abs().max()) <= 1e-2 * float(trained.abs().max())

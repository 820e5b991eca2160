"""Two tasks in one run, however it is cut: micro-batches of one task, accumulation and ranks change nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import train
from runs import assert_same_to_the_bit, curve, greatest_difference, run_on_two_ranks

from helpers import DemoClip, merged
from speechtune.config import RunConfig
from speechtune.families import build_config
from speechtune.families.phi4_multimodal import tiny as tiny_phi4
from speechtune.tasks.pronunciation.phones import PHONES

STEPS = 4
TOLERANCE = 2e-6


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def configure(tmp_path_factory: pytest.TempPathFactory, demo_clips: list[DemoClip]) -> Callable[..., RunConfig]:
    """Nine clips, six of them scored and nine transcribed; batches of 8 out of the 15 samples."""
    folder = tmp_path_factory.mktemp("phi4-equivalence")
    tiny_phi4.make_model(folder / "base", output_scale=10.0, speech_lora_rank=2)
    rows = []
    for number, clip in enumerate(demo_clips[:9]):
        row = {"audio": str(clip.path), "offset": 0.2, "duration": 0.8 + 0.1 * number, "text": clip.text}
        phones = " ".join(PHONES[number : number + 5])
        rows.append(row | {"task": "MDD", "target": {"word_transcript": "a", "phoneme_transcript": phones}})
        scores = dict.fromkeys(("accuracy", "fluency", "prosodic", "total"), number)
        rows += [row | {"task": "APA", "target": scores}] if number < 6 else []
    manifest = folder / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    held_out = shutil.copy(manifest, folder / "eval.jsonl")
    defaults = {
        "family": "phi4_multimodal",
        "model": {"path": str(folder / "base")},
        "data": {"train": manifest, "eval": held_out, "cache_dir": folder / "cache"},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "train": {"max_steps": STEPS, "batch_size": 8, "learning_rate": 5e-3},
        "evaluate": {"every_steps": 4, "batch_size": 3},
        "checkpoint": {"every_steps": 2, "resume": "auto"},
        "tracking": {"trackers": ()},
    }

    def build(output_dir: Path, **more: Any) -> RunConfig:
        return build_config(merged(merged(defaults, {"output_dir": output_dir}), more), "test")

    return build


@pytest.mark.slow
def test_a_cut_by_task_changes_nothing(configure: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Guards against losing a head that the first micro-batch, or a whole rank, does not have."""
    train(configure(tmp_path / "straight"))
    straight = tmp_path / "straight"
    losses = list(curve(straight).values())
    assert losses[-1] < losses[0] - 0.5
    for name, cut in {"2 x 4": (2, 4), "1 x 8": (1, 8)}.items():
        sizes = {"batch_size": cut[0], "accumulation": cut[1]}
        train(configure(tmp_path / name, train=sizes, evaluate={"batch_size": 1}))
        assert greatest_difference(tmp_path / name, straight) < TOLERANCE
        assert curve(tmp_path / name) == pytest.approx(curve(straight), rel=2e-6)
        assert curve(tmp_path / name, "eval_loss") == pytest.approx(curve(straight, "eval_loss"), rel=2e-6)
    train(configure(tmp_path / "resumed"), step=2)
    train(configure(tmp_path / "resumed"))
    assert_same_to_the_bit(tmp_path / "resumed", straight, STEPS)
    ranks = configure(tmp_path / "ranks", train={"batch_size": 1, "accumulation": 4})
    sharded = configure(
        tmp_path / "sharded",
        train={"batch_size": 1, "accumulation": 4},
        evaluate={"prompts": 0},
        speed={"parallel": "fsdp"},
    )
    run_on_two_ranks(tmp_path, {"ranks": (ranks, None), "sharded": (sharded, None)})
    for name in ("ranks", "sharded"):
        assert greatest_difference(tmp_path / name, straight) < TOLERANCE
        assert curve(tmp_path / name) == pytest.approx(curve(straight), rel=2e-6)
    # Without answers nothing is evaluated before the first step.
    sharded_loss, loss = (curve(tmp_path / name, "eval_loss")[STEPS] for name in ("sharded", "straight"))
    assert sharded_loss == pytest.approx(loss, rel=2e-6)

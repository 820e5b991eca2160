"""The benches compare the same work, and their thresholds can be missed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).parents[2] / "bench"
STEPS, SAMPLES = 2, 16


@pytest.fixture(scope="module", autouse=True)
def _bench_on_path() -> Iterator[None]:
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base and data, the latter in the order in which our plan takes them: the peer takes them as they lie."""
    from voices import Size, make_base, make_examples, write_examples

    from speechtune.training.batching import BatchPlan

    folder = tmp_path_factory.mktemp("bench")
    size = Size(hidden_size=32, num_layers=1, codebook_size=34)
    make_base(folder / "base", size)
    durations = [(0.2 + 0.1 * i, 0.4 + 0.3 * (i % 5)) for i in range(SAMPLES)]
    examples = make_examples(durations, size.codebook_size)
    write_examples(examples, folder / "data")
    plan = BatchPlan(np.zeros(SAMPLES), 8)
    order = [i for step in range(STEPS) for i in plan.global_batch(step)]
    write_examples([examples[i] for i in order], folder / "peer-data")
    return folder


def test_both_sides_do_the_same_steps(place: Path) -> None:
    """Equal losses at the second step too: then data, labels, adapter, gradients and optimizer are the same."""
    from meter import quiet
    from ours import train_ours
    from peers.higgs_trainer import Settings

    from training import train_peer

    with quiet():
        our_meter, our_losses = train_ours(place / "base", place / "data", place, STEPS, batch={"tokens": 300})
        meter, losses = train_peer(
            place / "base", place / "peer-data", place, STEPS, Settings(SAMPLES // STEPS, 1, "sequential")
        )
    assert our_losses == pytest.approx(losses, rel=1e-5)
    assert our_losses[0] != pytest.approx(our_losses[1], rel=1e-4)
    assert [tokens for *_, tokens in our_meter.marks] == [tokens for *_, tokens in meter.marks]
    assert meter.rate().wall > 0


def test_a_missed_threshold_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    import run
    from table import Threshold

    measured = {"fast": [1.0, 3.0, 2.0], "slow": [9.0]}
    (tmp_path / "made_up.py").write_text(f"def measure():\n    return {measured}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "made_up", "--json", str(path)])
    for thresholds, code in (
        ({}, 0),
        ({"fast": Threshold(least=2.0), "slow": Threshold(most=9.0)}, 0),
        ({"fast": Threshold(least=2.1)}, 1),
        ({"slow": Threshold(most=8.9)}, 1),
        ({"never measured": Threshold(least=0.0)}, 1),
    ):
        monkeypatch.setitem(run.BENCHES, "made_up", run.Bench("made up", thresholds))
        assert run.main() == code, thresholds
    assert "missed: made up, never measured" in capsys.readouterr().out
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["rows"][0]["median"] == 2.0 and result["rows"][-1]["holds"] is False
    assert result["machine"]["cores"] and result["machine"]["versions"]["torch"]


def test_nan_holds_no_threshold() -> None:
    from table import Threshold

    assert not Threshold(least=0.0).holds([float("nan")])
    assert not Threshold(most=1.0).holds([0.5, float("nan"), 0.6])

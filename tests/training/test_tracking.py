"""What a run writes down: metrics.jsonl holds every step once, also after a kill; lines for people are readable."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from accelerate import Accelerator

from helpers import read_records
from speechtune.training.tracking import (
    EvaluationRecord,
    Record,
    Tracker,
    append_lines,
    duration,
    flatten,
    heads,
    keep_until,
)


class FakeAccelerator:
    """Keeps what accelerate's trackers would get."""

    def __init__(self, main: bool = True) -> None:
        self.is_main_process = main
        self.logged: list[tuple[int, dict[str, Any]]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))


def record(step: int, loss: float = 3.0) -> Record:
    return Record(step, step / 4, loss, {"audio": loss - 1, "text": 1.0}, 1e-4, 0.5, 100.0, 2000.0, 0.01, 75.4)


def tracker(output_dir: Path, accelerator: FakeAccelerator, resume_step: int = 0, every: int = 10) -> Tracker:
    return Tracker(cast(Accelerator, accelerator), output_dir, every, resume_step)


def lines(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    writer = tracker(tmp_path, FakeAccelerator())
    writer.write(record(1), 2)
    writer.write(EvaluationRecord(1, 2.5, {"audio": 2.0, "text": 0.5}, {"sim": 0.5}, 0.1, 0.2), 2)
    first, second = read_records(tmp_path)
    assert first["step"] == 1 and first["loss"] == 3.0 and first["losses"] == {"audio": 2.0, "text": 1.0}
    assert first["learning_rate"] == 1e-4 and first["eta_seconds"] == 75.4
    assert second == {"step": 1, "eval_loss": 2.5, "eval_losses": {"audio": 2.0, "text": 0.5}} | {
        "scores": {"sim": 0.5},
        "eval_seconds": 0.1,
        "time_share": 0.2,
    }


def test_a_record_is_on_disk_at_once(tmp_path: Path) -> None:
    """A killed run must not lose the steps that would show why."""
    writer = tracker(tmp_path, FakeAccelerator())
    for step in (1, 2, 3):
        writer.write(record(step), 3)
        assert lines(tmp_path / "metrics.jsonl") == list(range(1, step + 1))


@pytest.mark.parametrize("torn", ["", '{"step": 7, "lo', '{"step": 7', "{", "\0\0\0\0", "\udcff\udcfe", '"step"'])
def test_a_resume_drops_later_records_and_a_torn_line(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "loss": 0.5}) + "\n" for step in (1, 2, 3, 4, 4, 5, 6)) + torn,
        errors="surrogateescape",
    )
    keep_until(path, 4)
    assert lines(path) == [1, 2, 3, 4, 4]
    writer = tracker(tmp_path, FakeAccelerator(), resume_step=4)
    writer.write(record(5), 6)
    assert lines(path) == [1, 2, 3, 4, 4, 5]


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    keep_until(path, 3)
    assert not path.exists()
    path.write_text(json.dumps({"step": 1}) + "\n")
    tracker(tmp_path, FakeAccelerator())
    assert path.read_text() == ""


def test_a_folder_deleted_in_mid_run_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody tidied up: hours of training must not end in a traceback for a line of text."""
    monkeypatch.setattr(logging.getLogger("speechtune"), "propagate", True)
    folder = tmp_path / "output"
    folder.mkdir()
    writer = tracker(folder, FakeAccelerator())
    writer.write(record(1), 3)
    shutil.rmtree(folder)
    writer.write(record(2), 3)
    assert lines(folder / "metrics.jsonl") == [2]
    assert f"{folder}: deleted while the run goes on" in caplog.text


def test_a_folder_made_and_deleted_at_the_same_moment_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save made the folder while somebody removed it: `mkdir` met it, and found none a moment later."""
    folder = tmp_path / "output"

    def met_and_gone(path: Path, **options: object) -> None:
        monkeypatch.undo()
        raise FileExistsError(path)

    monkeypatch.setattr(Path, "mkdir", met_and_gone)
    append_lines(folder / "metrics.jsonl", [{"step": 1}])
    assert lines(folder / "metrics.jsonl") == [1]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    """Two ranks that write one file tear each other's lines."""
    accelerator = FakeAccelerator(main=False)
    writer = tracker(tmp_path, accelerator)
    writer.write(record(1), 1)
    assert list(tmp_path.iterdir()) == [] and accelerator.logged == []


def test_trackers_get_groups_and_no_step(tmp_path: Path) -> None:
    accelerator = FakeAccelerator()
    writer = tracker(tmp_path, accelerator)
    writer.write(record(7), 9)
    ((step, values),) = accelerator.logged
    assert step == 7 and "step" not in values
    assert values["losses/audio"] == 2.0 and values["losses/text"] == 1.0 and values["loss"] == 3.0
    assert flatten({"a": 1, "b": {"c": 2}}) == {"a": 1, "b/c": 2}


def test_the_console_gets_the_first_the_last_and_every_tenth(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("speechtune"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("speechtune"), "handlers", [])
    writer = tracker(tmp_path, FakeAccelerator(), every=10)
    with caplog.at_level(logging.INFO, "speechtune"):
        for step in range(1, 26):
            writer.write(record(step), 25)
        writer.write(EvaluationRecord(25, 2.5, {"audio": 2.0}, {}, 0.1, 0.2), 25)
    found = [message.split()[1] for message in caplog.messages]
    assert found == ["1/25", "10/25", "20/25", "25/25", "25"]
    assert "loss 3.0000 (audio 2.0000 text 1.0000)" in caplog.messages[0] and "1:15 left" in caplog.messages[0]
    assert caplog.messages[-1] == (
        "step 25 evaluation:  loss 2.5000 (audio 2.0000)  (0.1 s, 20% of the run's time so far)"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.4, "0:59"), (59.6, "1:00"), (75.4, "1:15"), (3599.7, "1:00:00"), (90_061, "25:01:01")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_heads_in_one_line() -> None:
    assert heads({"audio": 55.51234, "text": 0.1}) == "audio 55.5123 text 0.1000"

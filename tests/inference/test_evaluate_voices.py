"""`speechtune evaluate` for voices: base and adapters on the same prompts, resumable, batched, nothing dropped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import speechtune.families.higgs_audio_v2.layout as layout
from helpers import DemoClip, read_records
from speechtune.audio import read_provenance
from speechtune.cli import main
from speechtune.config import RunConfig
from speechtune.errors import TrainingError
from speechtune.training.run import run_training

CAP = "40"


@pytest.fixture(scope="module")
def prompts(
    tmp_path_factory: pytest.TempPathFactory,
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
) -> Path:
    short = sorted(demo_clips, key=lambda clip: clip.duration_seconds)[:3]
    return write_chatml(tmp_path_factory.mktemp("prompts") / "prompts.json", short)


@pytest.fixture
def evaluate(tmp_path: Path, tiny_base: Path, cache_dir: Path, capsys: pytest.CaptureFixture) -> Callable[..., dict]:
    """Run the verb on the tiny base, greedily; returns what it prints with --json."""

    def run(data: Path, *more: object, out: str = "out") -> dict:
        words = ["evaluate", data, "--model", tiny_base / "model", "--codec", tiny_base / "codec", "--out"]
        words += [
            tmp_path / out,
            "--cache-dir",
            cache_dir,
            "--temperature",
            0,
            "--max-new-tokens",
            CAP,
            "--json",
            *more,
        ]
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_base_and_adapters_side_by_side(
    evaluate: Callable[..., dict], prompts: Path, adapter_run: Path, tmp_path: Path, tiny_base: Path
) -> None:
    adapter = adapter_run / "lora_adapters"
    found = evaluate(prompts, "--adapter", adapter, "--adapter", adapter_run / "checkpoint-2")
    assert list(found["systems"]) == ["base", "run/lora_adapters", "run/checkpoint-2"] and found["baseline"] == "base"
    assert found["prompts"] == 3
    for figures in found["systems"].values():
        assert figures["summary"]["stop_rate"] in (0.0, 1 / 3, 2 / 3, 1.0) and figures["summary"]["duration_ratio"] > 0
    wavs = sorted((tmp_path / "out").rglob("*.wav"))
    assert len(wavs) == 9
    origin = read_provenance(next(path for path in wavs if "lora_adapters" in str(path)))
    assert origin and origin["generated"] is True and origin["model"] == str(tiny_base / "model")
    assert len(origin["adapter_sha256"]) == 64
    rows = [json.loads(line) for line in (tmp_path / "out" / "utterances.jsonl").read_text().splitlines()]
    assert len(rows) == 9 and all(Path(row["audio"]).is_file() for row in rows)


def test_a_killed_evaluation_goes_on_and_ends_alike(
    evaluate: Callable[..., dict], prompts: Path, tmp_path: Path
) -> None:
    complete = evaluate(prompts, out="complete")
    evaluate(prompts, out="torn")
    folder = tmp_path / "torn" / "base"
    lines = (folder / "outputs.jsonl").read_text().splitlines()
    (folder / "outputs.jsonl").write_text("\n".join(lines[:2]) + "\n" + lines[2][:10])
    kept, *others = sorted(folder.glob("*.wav"), key=lambda path: path.stem != json.loads(lines[1])["id"])
    others[0].unlink()
    before = kept.stat().st_mtime_ns
    again = evaluate(prompts, out="torn")
    assert kept.stat().st_mtime_ns == before and others[0].is_file()
    for name in ("stop_rate", "duration_ratio"):
        assert again["systems"]["base"]["summary"][name] == complete["systems"]["base"]["summary"][name]


def test_the_batch_size_changes_nothing(evaluate: Callable[..., dict], prompts: Path, tmp_path: Path) -> None:
    evaluate(prompts, "--batch-size", 1, out="one")
    evaluate(prompts, "--batch-size", 3, out="three")
    for path in (tmp_path / "one" / "base").glob("*.wav"):
        assert path.read_bytes() == (tmp_path / "three" / "base" / path.name).read_bytes()


def test_a_seed_list_is_read_and_a_missing_wav_is_an_error(
    evaluate: Callable[..., dict],
    demo_clips: list[DemoClip],
    tmp_path: Path,
    tiny_base: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    first, second = demo_clips[:2]
    (tmp_path / "meta.lst").write_text(f"a|{first.text}|{first.path}|{second.text}\n")
    assert evaluate(tmp_path / "meta.lst")["prompts"] == 1
    (tmp_path / "meta.lst").write_text(f"a|{first.text}|{first.path}|x\nb|{first.text}|gone.wav|y\n")
    words = ["evaluate", tmp_path / "meta.lst", "--model", tiny_base / "model", "--out", tmp_path / "no"]
    assert main([str(word) for word in words]) == 2
    assert "gone.wav" in capsys.readouterr().err


def test_a_scorer_that_is_not_there_is_named_with_its_install_line(
    prompts: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["evaluate", prompts, "--model", tiny_base / "model", "--out", tmp_path / "out", "--mos", "guess"]
    assert main([str(word) for word in words]) == 2
    assert "distillmos" in capsys.readouterr().err


def test_two_adapters_of_one_name_are_refused(
    prompts: Path, tiny_base: Path, adapter_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["evaluate", prompts, "--model", tiny_base / "model", "--out", tmp_path / "out"]
    words += ["--adapter", adapter_run / "lora_adapters"] * 2
    assert main([str(word) for word in words]) == 2
    assert "name each once" in capsys.readouterr().err


def test_planted_issues_of_a_training_are_seen(
    make_config: Callable[..., RunConfig],
    prompts: Path,
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An end that is never a target, a reference that is one, a learning rate 100 times too high; and a sound run."""
    settings = {
        "data": {"train": prompts, "cache_dir": cache_dir},
        "lora": {"enabled": False},
        "train": {"max_steps": 120, "batch_size": 3, "learning_rate": 2e-3, "warmup_steps": 10},
        "evaluate": {"every_steps": 40, "prompts": 3, "temperature": 0},
        "checkpoint": {"every_steps": 120},
    }
    labels = layout.row_labels

    def without_end(rows_RK: np.ndarray, num_frames: int) -> np.ndarray:
        labels_RK = labels(rows_RK, num_frames)
        return np.where(labels_RK == rows_RK.max(), layout.IGNORE, labels_RK)

    sound_targets = layout.target_arrays

    def with_references(ids_S: np.ndarray, rows_RK: np.ndarray, *rest: int) -> dict[str, np.ndarray]:
        """Every row of every clip becomes a target, as with the native processor's labels."""
        arrays = sound_targets(ids_S, rows_RK, *rest)
        places = np.flatnonzero(
            np.isin(ids_S, ids_S[[arrays["audio_positions"][0], arrays["audio_positions"][-1] + 1]])
        )
        clips = np.split(np.arange(len(places)), np.flatnonzero(np.diff(places) > 1) + 1)
        learnt = np.concatenate([clip[:-1] for clip in clips])
        return arrays | {"audio_positions": places[learnt], "audio_targets": rows_RK[learnt + 1].astype(np.int16)}

    def train(name: str, rate: float) -> dict[int, dict[str, float]]:
        """Scores by step; a run that a guard stops has those before it."""
        values = {**settings, "train": {**settings["train"], "learning_rate": rate}}
        with suppress(TrainingError):
            run_training(make_config(**values, output_dir=tmp_path / name))
        records = read_records(tmp_path / name)
        return {record["step"]: record["scores"] for record in records if "scores" in record}

    def warnings(name: str, since: int = 0) -> list[tuple[str, str]]:
        lines = (tmp_path / name / "warnings.jsonl").read_text().splitlines()
        return [(row["kind"], row["message"]) for row in map(json.loads, lines) if row["step"] >= since]

    good, hot = train("sound", 2e-3), train("hot", 0.2)
    monkeypatch.setattr(layout, "row_labels", without_end)
    endless = train("endless", 2e-3)
    monkeypatch.setattr(layout, "row_labels", labels)
    monkeypatch.setattr(layout, "target_arrays", with_references)
    mixed = train("mixed", 2e-3)
    assert good[120]["stop_rate"] == good[120]["end_accuracy"] == 1.0 and good[120]["codebook_accuracy_0"] > 0.9
    assert not warnings("sound", since=120)
    assert endless[120]["stop_rate"] == 0.0 and endless[120]["duration_ratio"] > 1.2
    assert "end_accuracy" not in endless[120] and endless[120]["codebook_accuracy_0"] > 0.9
    said = [message for kind, message in warnings("endless", since=120) if kind == "evaluation"]
    assert any("no end of speech stands among the targets" in message for message in said)
    assert any("0% of the outputs end by themselves" in message for message in said)
    assert mixed[120]["stop_rate"] == 0.0
    assert any("0% of the outputs end by themselves" in message for _, message in warnings("mixed", since=120))
    assert hot[40]["codebook_accuracy_0"] < 0.5 * good[40]["codebook_accuracy_0"]
    for name in ("hot", "endless", "mixed"):
        assert main(["report", str(tmp_path / name)]) == 0
        page = (tmp_path / name / "report.md").read_text()
        assert warnings(name) and all(" ".join(m.split()[:4]) in page for _, m in warnings(name)[-1:])


def test_an_adapter_is_asked_as_it_was_trained_and_each_id_has_its_wav(
    adapter_run: Path,
    tiny_base: Path,
    demo_clips: list[DemoClip],
    cache_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """Guards against prompts that an adapter was not trained with, and ids that sanitise alike sharing a wav."""
    clip, other = sorted(demo_clips, key=lambda clip: clip.duration_seconds)[:2]
    row = {"text": "Yes.", "reference": str(clip.path), "reference_text": clip.text}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"id": name, **row}) + "\n" for name in ("Yes!", "Yes?")))
    words = ["--adapter", adapter_run, "--codec", tiny_base / "codec", "--cache-dir", cache_dir]
    words += ["--out", tmp_path / "out", "--max-new-tokens", 12]
    assert main([str(word) for word in ("generate", rows, *words)]) == 0
    assert capsys.readouterr().err.count("prompts get the system message and scene of the training") == 1
    assert len(list((tmp_path / "out").glob("Yes_-*.wav"))) == 2
    chat = tmp_path / "chat.jsonl"
    first, last = (
        {"role": "assistant", "content": [{"type": "audio", "audio_url": str(c.path)}]} for c in (clip, other)
    )
    turns = [{"role": "user", "content": clip.text}, first, {"role": "user", "content": other.text}, last]
    chat.write_text("".join(json.dumps({"id": name, "messages": turns}) + "\n" for name in ("s/1", "s 1")))
    assert (
        main([str(word) for word in ("evaluate", chat, *words[:-4], "--out", tmp_path / "measured", *words[-2:])]) == 0
    )
    told = capsys.readouterr().err
    assert told.count("prompts get the system message and scene of the training") == 1, "the base was trained with none"
    lines = [json.loads(line) for line in (tmp_path / "measured" / "utterances.jsonl").read_text().splitlines()]
    assert len({line["audio"] for line in lines}) == len(lines) == 4

"""Systems on the same prompts: intervals against scipy, tests by hand and against scipy, groups, worst, files."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console

from speechtune.config import DataConfig
from speechtune.data.prompts import read_seed_list
from speechtune.errors import ManifestError
from speechtune.family import Scorers
from speechtune.tasks.results import write_results
from speechtune.tasks.statistics import estimate, holm, permutation_test
from speechtune.tasks.voice_cloning.comparison import compare, print_comparison, worst
from voice_cases import row, scorers

pytest.importorskip("whisper_normalizer")  # reports name its version


def rows(errors: list[int | None], sims: list[float | None] | None = None) -> list:
    sims = sims or [0.9] * len(errors)
    return [row(n, e, s) for n, (e, s) in enumerate(zip(errors, sims, strict=True))]


def test_means_groups_and_p_values() -> None:
    base = rows([1] * 20, [0.9] * 20)
    worse = rows([5] * 20, [0.9 - 0.01 * (n % 2) for n in range(20)])
    comparison = compare({"base": base, "tuned": worse}, scorers({}))
    assert comparison.prompts == 20 and list(comparison.systems) == ["base", "tuned"] and comparison.missing == ()
    first, second = comparison.systems["base"].estimates, comparison.systems["tuned"].estimates
    assert first["wer"].value == pytest.approx(0.1) and first["wer"].p_value is None
    assert (second["wer"].value, second["wer"].low, second["wer"].high) == pytest.approx((0.5, 0.5, 0.5))
    assert second["wer"].p_value is not None and second["wer"].p_value < 0.001
    assert second["mos"].p_value == 1.0 and second["duration_ratio"].p_value is None
    assert set(comparison.systems["base"].groups["speaker"]) == {"s0", "s1", "s2"}
    assert comparison.systems["base"].groups["language"]["en"]["wer"] == pytest.approx(0.1)
    assert comparison.systems["base"].warnings == []
    assert "WER rose from 10.0% to 50.0%" in comparison.systems["tuned"].warnings[0]
    assert [r.system for r in comparison.rows] == ["base"] * 20 + ["tuned"] * 20


def test_the_interval_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).normal(3.0, 1.0, 200)
    mine = estimate(values, np.ones(200), False)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=1000, rng=7).confidence_interval
    assert mine.value == pytest.approx(values.mean()) and mine.count == 200
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    assert estimate(values, np.ones(200), False) == mine  # the same seed
    assert estimate(values, np.ones(200), True).value == pytest.approx(np.median(values))


def test_a_rate_is_resampled_as_a_quotient() -> None:
    errors, words = np.array([0.0, 10.0]), np.array([90.0, 10.0])
    figure = estimate(errors, words, False)
    assert (figure.value, figure.low, figure.high) == (0.1, 0.0, 1.0)


@pytest.mark.parametrize("count", [5, 13, 14, 60])
def test_the_permutation_test_is_scipys(count: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    differences = np.random.default_rng(count).normal(0.3, 1.0, count)
    theirs = stats.permutation_test(
        (differences, np.zeros(count)), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=9999, rng=3
    )
    assert permutation_test(differences) == pytest.approx(theirs.pvalue, abs=0.02)


def test_permutation_by_hand() -> None:
    assert permutation_test(np.array([1.0, 1.0, 1.0])) == 2 / 8
    assert permutation_test(np.array([1.0, 0.0, 1.0, 1.0])) == 2 / 8  # a tie says nothing
    assert permutation_test(np.array([0.1, 0.2, -0.3])) == 1.0
    assert permutation_test(np.zeros(4)) == 1.0
    assert permutation_test(np.ones(100)) == 1 / 10_001


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
    assert holm({}) == {}


def test_only_prompts_that_both_measured_are_tested() -> None:
    base, tuned = rows([0, None, 3, 4]), rows([9, 9, None, 4])
    comparison = compare({"base": base, "tuned": tuned}, Scorers())
    assert comparison.systems["tuned"].estimates["wer"].count == 3
    assert comparison.systems["tuned"].estimates["wer"].p_value == 1.0  # one differing prompt has two signs
    assert len(comparison.missing) == 3


def test_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="tuned: other prompts than those of base"):
        compare({"base": rows([0, 0]), "tuned": rows([0])}, Scorers())
    with pytest.raises(ValueError, match="no system"):
        compare({}, Scorers())


def test_the_worst_come_first() -> None:
    bad = [row(0, 1), row(1, 1, defect="silent"), row(2, 9), row(3, 1, 0.2), row(4, None, None, mos=None)]
    assert [r.id for r in worst(bad)] == ["p1", "p2", "p3", "p0", "p4"]
    assert len(worst(rows([1] * 30))) == 10


def test_table_and_files(tmp_path: Path) -> None:
    base = [replace(r, audio=f"base/{r.id}.wav") for r in rows([0, 1, 2])]
    comparison = compare({"base": base, "run[1]": rows([9, 9, 9], [None] * 3)}, Scorers(asr=scorers({}).asr))
    text = io.StringIO()
    print_comparison(comparison, Console(file=text, width=200))
    for expected in ("run[1]", "10.0% [0.0%, 20.0%]", "90.0%", "worst of base: p2 base/p2.wav", "fake asr", "no MOS"):
        assert expected in text.getvalue()
    metrics_file, rows_file = write_results(comparison.to_json(), comparison.rows, tmp_path)
    values = json.loads(metrics_file.read_text())
    assert values["baseline"] == "base" and "Holm" in values["test"] and "rows" not in values
    assert values["systems"]["base"]["worst"][0]["audio"] == "base/p2.wav"
    assert "sim" not in values["systems"]["run[1]"]["estimates"]
    lines = [json.loads(line) for line in rows_file.read_text().splitlines()]
    assert [(line["system"], line["id"]) for line in lines[2:4]] == [("base", "p2"), ("run[1]", "p0")]


def test_one_prompt_alone_and_nothing_measured() -> None:
    comparison = compare({"base": [row(0, None, None, mos=None, duration_ratio=None)]}, Scorers())
    assert set(comparison.systems["base"].estimates) == {"stop_rate"}
    assert not math.isnan(comparison.systems["base"].estimates["stop_rate"].low)
    print_comparison(comparison, Console(file=io.StringIO()))


# -- seed-tts-eval's lists -----------------------------------------------------------------------------------------


@pytest.fixture
def seed_folder(tmp_path: Path) -> Path:
    """A folder as seed-tts-eval's `en`."""
    folder = tmp_path / "en"
    (folder / "wavs").mkdir(parents=True)
    for name in ("a", "b"):
        soundfile.write(folder / "wavs" / f"{name}.wav", np.zeros(1600), 16_000)
    return folder


def test_a_seed_list(seed_folder: Path) -> None:
    path = seed_folder / "meta.lst"
    path.write_text("u1|what a says|wavs/a.wav|to be said\n\nu2|what b says|wavs/b.wav|also| wavs/a.wav\n")
    first, second = read_seed_list(path)
    assert (first.id, first.text, first.audio, first.language) == ("u1", "to be said", None, "en")
    assert first.references[0].text == "what a says"
    assert first.references[0].audio.path == str((seed_folder / "wavs" / "a.wav").resolve())
    assert second.audio is not None and second.audio.path == str((seed_folder / "wavs" / "a.wav").resolve())
    assert second.source == f"{path}:3"
    assert read_seed_list(path, language="de")[0].language == "de"


def test_every_issue_of_a_seed_list_is_listed(seed_folder: Path, tmp_path: Path) -> None:
    path = seed_folder / "meta.lst"
    lines = ["u1|x|wavs/gone.wav|y", "u2|x|wavs/a.wav", "u3||wavs/a.wav|y", "u4|x|wavs/a.wav|y|wavs/lost.wav"]
    lines += ["u5|x|wavs/a.wav|y", "u5|x|wavs/a.wav|y", "u6|x|/etc/hostname|y"]
    path.write_text("\n".join(lines))
    with pytest.raises(ManifestError) as error:
        read_seed_list(path, DataConfig(audio_root=tmp_path))
    codes = [(issue.row, issue.code) for issue in error.value.issues]  # type: ignore[attr-defined]
    assert codes == [
        (1, "missing_file"),
        (2, "bad_row"),
        (3, "empty_text"),
        (4, "missing_file"),
        (6, "duplicate_id"),
        (7, "outside_root"),
    ]
    for name in ("gone.wav", "lost.wav", "meta.lst:6"):
        assert name in str(error.value)


def test_an_empty_or_missing_seed_list(tmp_path: Path) -> None:
    (tmp_path / "meta.lst").write_text("\n")
    with pytest.raises(ManifestError, match="holds no rows"):
        read_seed_list(tmp_path / "meta.lst")
    with pytest.raises(ManifestError, match="cannot be read"):
        read_seed_list(tmp_path / "gone.lst")

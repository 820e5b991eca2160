"""`speechtune encode`: shards of several processes make one set, on Ray too, and what is missing has a name."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from helpers import DemoClip
from speechtune.cli import main


@pytest.fixture
def recipe(tiny_base: Path, demo_clips: list[DemoClip], tmp_path: Path) -> Path:
    """A recipe on eight clips of half a second, with a cache of its own."""
    rows = [
        {
            "audio_file": str(clip.path),
            "transcript": clip.text[:9],
            "offset": 0.3,
            "duration": 0.5,
            "id": f"clip-{number}",
        }
        for number, clip in enumerate(demo_clips[:8])
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "family": "higgs_audio_v2",
        "model": {"path": str(tiny_base / "model"), "codec_path": str(tiny_base / "codec")},
        "data": {"train": str(tmp_path / "train.jsonl"), "cache_dir": str(tmp_path / "cache")},
        "evaluate": {"enabled": False},
        "output_dir": str(tmp_path / "run"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def encode(recipe: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str, str]:
    code = main(["encode", str(recipe), *flags])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_shards_make_one_set_and_a_missing_one_is_named(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Issue: two of three processes ran, and only training found out, clip by clip."""
    left: dict[int, dict[str, int]] = {}
    for index in (0, 2, 1):
        code, out, _ = encode(recipe, capsys, "--shard", f"{index}/3", "--json")
        assert code == 0
        left[index] = json.loads(out)["shards_left"]
    assert [set(left[index]) for index in (0, 2, 1)] == [{"1", "2"}, {"1"}, set()], "choose clips that fill all shards"
    _, out, _ = encode(recipe, capsys, "--json")
    report = json.loads(out)
    assert (report["num_clips"], report["num_encoded"], report["num_reused"]) == (8, 0, 8)
    _, out, _ = encode(recipe, capsys, "--shard", "1/3")
    assert "the set is complete: 8 clips" in out


def test_open_shards_are_listed_with_their_command(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = encode(recipe, capsys, "--shard", "0/2")
    number = re.search(r"shard 1/2 is not done: (\d) clip\(s\) left; run it with --shard 1/2", out)
    assert code == 0 and number and 0 < int(number[1]) < 8
    assert "shard 0/2 is not done" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--shard", "3/3"], "--shard 3/3: expected i/n with i from 0 to n-1"),
        (["--shard", "one/3"], "--shard one/3: expected"),
        (["--shards", "4"], "--shards goes with --engine ray"),
        (["--engine", "ray", "--shard", "0/2"], "leave out --shard"),
    ],
)
def test_flags_that_contradict_each_other(
    recipe: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    code, _, err = encode(recipe, capsys, *flags)
    assert code == 2 and message in err


def test_without_ray_the_command_to_install_it(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = encode(recipe, capsys, "--engine", "ray")
    assert code == 2 and "ray is not installed: pip install 'speechtune[ray]'" in err


@pytest.mark.slow
def test_ray_encodes_and_shows_our_errors(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two tasks make the set; a clip that a task cannot read ends the verb as it does without Ray."""
    pytest.importorskip("ray", reason="the extra ray is not installed")
    code, out, err = encode(recipe, capsys, "--engine", "ray", "--shards", "2", "--json")
    assert code == 0, err
    report = json.loads(out.strip().splitlines()[-1])
    assert (report["num_clips"], report["num_encoded"], report["num_reused"]) == (8, 0, 8)
    assert "2 of 2 shards done" in err
    manifest = recipe.parent / "train.jsonl"
    rows = manifest.read_text().replace('"offset": 0.3', '"offset": 300', 1)
    manifest.write_text(rows)
    code, _, err = encode(recipe, capsys, "--engine", "ray", "--shards", "2")
    assert code == 2 and re.search(r"ManifestError: shard \d/2: .*bad_offset", err, re.DOTALL), err

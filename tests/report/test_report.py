"""Reports on run directories made without training: what is said, what is left out, and that data stays data."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import report_cases
from helpers import DemoClip
from report_cases import HIGGS, PHI4, make_bare_run, make_run, step_record, write_lines
from speechtune.audio import file_name
from speechtune.commands.report import run_report
from speechtune.errors import ConfigError
from speechtune.report.plots import downsample
from speechtune.report.read_run import STOPPED, UNFINISHED, read_run
from speechtune.report.render import markdown, page
from speechtune.report.sound import AudioBudget, encode_sound, png, spread
from speechtune.training.tracking import mel_picture
from speechtune.types import Audio

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> [a](http://x) | `b`"
MAX_PAGE_BYTES = 1_000_000
"""A page without sound stays under this, however long the run."""


def body_of(html: str) -> str:
    return html[html.index("<body>") :]


def plots_of(html: str) -> dict[str, list[Any]]:
    """Lines of each plot by its title; a line is label, colour, points, value of the base, steps without a number."""
    found = [
        json.loads(unescape(data), parse_constant=pytest.fail) for data in re.findall(r'data-plot="([^"]*)"', html)
    ]
    return {title: lines for title, _, _, lines in found}


def test_a_finished_run_in_full(tmp_path: Path, demo_clips: list[DemoClip]) -> None:
    run = make_run(tmp_path / "voice", demo_clips[:2])
    assert run_report([run]) == 0
    html, text = ((run / f"report.{ending}").read_text(encoding="utf-8") for ending in ("html", "md"))
    for wanted in (
        "finished",
        "b" * 64,  # hashes of base and data
        "d" * 64,
        "abc123",  # revision
        "torch 2.13.0",
        "2 x NVIDIA H200",
        "bf16 on cuda",
        "en: 500, ru: 312",
        "43,008",
        "20 of 20",
        "yes, bit for bit",
        "stop_rate fell to 0",
        "checkpoint-60",
        "all bytes compared",
        "forward and backward",
        "train.seed=42",
    ):
        assert wanted in html, wanted
        assert wanted in text or wanted in ("20 of 20", "finished"), wanted
    assert html.count("<audio") == 2 * 5 and html.count("data:audio/") == html.count("data:image/png") == 2 * 5
    assert "audio" not in re.findall(r"<(\w+)", text)
    for title in (
        "loss of the audio head",
        "learning rate",
        "gradient norm",
        "word error rate",
        "accuracy per codebook",
    ):
        assert f"<h3>{title}" in html
    assert plots_of(html)["word error rate"][0][3] == 1.4  # the base's value
    assert len(plots_of(html)["accuracy per codebook"]) == 8
    assert "every file of a run was there" in html


def test_a_pronunciation_run_needs_no_other_code(tmp_path: Path) -> None:
    run = make_run(tmp_path / "phones", kind=PHI4)
    write_lines(run / "samples" / "prompts.jsonl", [{"id": "u1", "text": "hello", "speaker": "s1"}])
    write_lines(
        run / "samples" / "step-60" / "scores.jsonl", [{"id": "u1", "transcript": '{"accuracy": 8}', "per": 0.1}]
    )
    html = page([read_run(run)])
    for wanted in (
        "PCC of accuracy",
        "F1 of mispronunciation",
        "share of answers that parse",
        "PER 0.1",
        "transcript: {",
    ):
        assert wanted in html, wanted
    assert "loss of the text head" in html and "all heads weighted" not in html
    assert "no audio kept" not in html and "<audio" not in html


def test_an_unfinished_run_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_bare_run(tmp_path / "half", steps=30, total=60)
    assert run_report([run]) == 0
    report = read_run(run)
    assert report.state == UNFINISHED and report.last_step == 30 and report.total_steps == 60
    html, text, printed = page([report]), markdown([report]), capsys.readouterr().out
    for name in ("run_info.json", "warnings.jsonl", "samples/prompts.jsonl", "summary.json", "zero-shot base"):
        assert any(name in line for line in report.missing), name
        assert name in html and name in text and name in printed
    assert "No checkpoint in this folder" in html and "recorded no command" in html
    assert f"speechtune train {run}/config.yaml" in html
    assert "No guard fired" not in html  # nothing is known, which is another thing


def test_a_run_stopped_by_a_guard(tmp_path: Path) -> None:
    run = make_bare_run(tmp_path / "stopped")
    write_lines(run / "warnings.jsonl", [{"step": 30, "kind": "guard", "message": "step 31: the audio loss is nan"}])
    report = read_run(run)
    assert report.state == STOPPED
    for shown in (page([report]), markdown([report])):
        assert "stopped by a guard at step 30 of 60: step 31: the audio loss is nan" in shown
    write_lines(run / "metrics.jsonl", (step_record(step, 60, HIGGS["heads"]) for step in range(1, 45)))
    assert read_run(run).state == UNFINISHED  # resumed, and past the place


def test_not_a_number_is_shown_and_breaks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_bare_run(tmp_path / "broken")
    bad = step_record(31, 60, HIGGS["heads"]) | {"loss": math.nan, "grad_norm": math.inf}
    bad["losses"] = {"audio": math.nan, "text": 1.0}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(bad) + '\n{"step": 32, "lo')  # and the line that was being written
    assert run_report([run], as_json=True) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} in strict JSON"))
    (run_facts,) = facts["runs"]
    assert run_facts["non_finite_steps"] == 1 and run_facts["last"]["loss"] is None and run_facts["last_step"] == 31
    assert any("metrics.jsonl: 1 line" in line for line in run_facts["missing"])
    html = Path(facts["html"]).read_text(encoding="utf-8")
    assert "1 step(s) with a loss or norm not finite: 31" in html
    assert plots_of(html)["loss of the audio head"][0][4] == [31]
    assert "1 step(s)" in Path(facts["markdown"]).read_text(encoding="utf-8")


def test_a_run_of_nothing_but_nan(tmp_path: Path) -> None:
    run = make_bare_run(tmp_path / "nan", steps=1)
    write_lines(
        run / "metrics.jsonl", [step_record(1, 60, ("audio",)) | {"loss": math.nan, "losses": {"audio": math.nan}}]
    )
    ((*_, points, base, broken),) = plots_of(page([read_run(run)]))["loss of the audio head"]
    assert (points, base, broken) == ([[1.0, None]], None, [1]) and markdown([read_run(run)])


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "run_info.json", "summary.json", "trainer_state.json", "config.yaml"]
)
@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"\xff\x00{", b'{"step": {}, "losses": 3, "data": 7, "time": []}'])
def test_broken_files_are_named_not_fatal(tmp_path: Path, name: str, content: bytes) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(content)
    report = read_run(run)
    assert page([report]) and markdown([report])
    assert not content.startswith((b"[", b"\xff")) or any(line.startswith(name) for line in report.missing)


def test_texts_from_data_stay_texts(tmp_path: Path, demo_clips: list[DemoClip]) -> None:
    evil = [replace(demo_clips[0], text=EVIL, speaker=EVIL, language="<b>")]
    run = make_run(tmp_path / "<script>alert(3)<", evil)
    write_lines(run / "warnings.jsonl", [{"step": 1, "kind": EVIL, "message": EVIL}])
    write_lines(
        run / "samples" / "step-60" / "scores.jsonl", [{"id": "p0", "transcript": EVIL + "\ud800", "wer": EVIL}]
    )
    info = report_cases.run_info()
    info["hardware"]["name"] = info["data"]["languages"] = info["command"] = EVIL
    info["parameters"] = [{"component": EVIL, "total": EVIL, "trainable": 1}]
    info["versions"] = {EVIL: EVIL}
    report_cases.write_json(run / "run_info.json", info)
    report_cases.write_json(run / "summary.json", report_cases.summary() | {"reproduce": EVIL})
    record = step_record(61, 60, (EVIL,)) | {"losses": {EVIL: 1.0, "$title": 2.0}}
    write_lines(run / "metrics.jsonl", [record, {"step": 61, "eval_loss": 1.0, "scores": {EVIL: 1.0}}])
    for runs in ([run], [run, make_bare_run(tmp_path / "b")]):
        assert run_report(runs, tmp_path / "x.html") == 0
        html = (tmp_path / "x.html").read_text(encoding="utf-8")
        body = body_of(html)
        assert body.count("<script") == 1 and "<img src=x" not in html and "<b>" not in body
        assert "&lt;script&gt;alert(1)" in body
        text = (tmp_path / "x.md").read_text(encoding="utf-8")
        prose = "\n".join(line for line in text.splitlines() if not line.startswith("    "))  # but for the command
        assert "<script" not in prose and "<img" not in prose and "[a](" not in prose


def test_nothing_can_be_loaded_and_no_other_script_can_run(tmp_path: Path, demo_clips: list[DemoClip]) -> None:
    html = page([read_run(make_run(tmp_path / "run", demo_clips[:1]))])
    assert re.search(r"Content-Security-Policy\" content=\"default-src 'none'", html)
    assert re.search(r"script-src 'sha256-[\w+/]+=*'", html)
    assert all(link.startswith(("data:", "#")) for link in re.findall(r'(?:src|href)="([^"]*)"', html))
    assert "url(" not in html and "@import" not in html and "http://" not in html and "https://" not in html


def test_an_id_reaches_no_file_outside_the_samples(tmp_path: Path, demo_clips: list[DemoClip]) -> None:
    run = make_run(tmp_path / "run", demo_clips[:1])
    (tmp_path / "secret.wav").write_bytes((run / "samples" / "reference" / "p0.wav").read_bytes())
    (run / "samples" / "reference" / "link.wav").symlink_to(tmp_path / "secret.wav")
    ids = ["../../../secret", "link", "a\0b", "x" * 5000, str(tmp_path / "secret")]
    write_lines(run / "samples" / "prompts.jsonl", [{"id": name, "text": "t"} for name in ids])
    assert "<audio" not in page([read_run(run)])


def test_a_clip_is_found_under_the_name_that_training_gave_its_file(tmp_path: Path, demo_clips: list[DemoClip]) -> None:
    """Guards against reports without sound where ids hold what cannot stand in a file name."""
    run = make_run(tmp_path / "run", demo_clips[:1])
    write_lines(run / "samples" / "prompts.jsonl", [{"id": "a/b c", "text": "t"}])
    (run / "samples" / "reference" / "p0.wav").rename(run / "samples" / "reference" / f"{file_name('a/b c')}.wav")
    assert page([read_run(run)]).count("<audio") == 1


def test_several_runs_are_laid_side_by_side(tmp_path: Path, demo_clips: list[DemoClip]) -> None:
    first = make_run(tmp_path / "a" / "run", demo_clips[:1])
    second = make_run(tmp_path / "b" / "run", demo_clips[:1], seed=7)
    third = make_bare_run(tmp_path / "c", learning_rate=5e-4)
    assert run_report([first, second, third], tmp_path / "out" / "compared.html") == 0
    html = (tmp_path / "out" / "compared.html").read_text(encoding="utf-8")
    text = (tmp_path / "out" / "compared.md").read_text(encoding="utf-8")
    assert "3 runs compared" in html and "a/run" in html and "b/run" in html
    assert "| train.seed | 42 | 7 | 42 |" in text and "train.learning_rate" in text
    assert "lora.rank" not in text  # the same in all
    assert "1.4 → 0.12" in text
    assert [line[0] for line in plots_of(html)["loss of the audio head"]] == ["a/run", "b/run", "c"]
    assert html.count("<h4>reference</h4>") == 1 and "b/run: step 60 (best)" in html
    assert "compare their losses with care" not in html


def test_runs_on_other_data_are_not_compared_silently(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    report_cases.write_json(second / "run_info.json", {"data": {"fingerprint": "e" * 64}})
    reports = [read_run(first), read_run(second)]
    for shown in (page(reports), markdown(reports)):
        assert re.search(r"differ in hash of the data: compare their losses with care", shown)


def test_runs_of_one_name_get_different_names(tmp_path: Path) -> None:
    runs = [make_bare_run(tmp_path / name / "same") for name in "ab"]
    assert run_report(runs, tmp_path / "r.html") == 0
    assert str(runs[0]) in (tmp_path / "r.md").read_text() and str(runs[1]) in (tmp_path / "r.md").read_text()


def test_damaged_checkpoints_are_found(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "checkpoint-20" / "adapter_model.safetensors").write_bytes(b"other")
    (run / "checkpoint-60" / "MANIFEST.json").unlink()
    report = read_run(run)
    assert all(c.damage for c in report.checkpoints)
    assert page([report]).count("DAMAGED") == 2 and markdown([report]).count("DAMAGED") == 2


def test_a_checkpoint_that_cannot_be_checked_is_not_intact(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    files = {"files": [{"name": "x" * 5000, "bytes": 1, "blake3": ""}]}
    report_cases.write_json(run / "checkpoint-20" / "MANIFEST.json", files)
    first, second = read_run(run).checkpoints
    assert first.damage and "too long" in first.damage and not second.damage


def test_steps_no_plot_can_show_are_left_out(tmp_path: Path) -> None:
    run = make_bare_run(tmp_path / "run", steps=2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(f'{{"step": {step}, "loss": 1.0}}\n' for step in ("1" + "0" * 400, -1, '"7"')))
    report = read_run(run)
    assert report.last_step == 2 and page([report])


def test_the_best_is_named_even_if_it_is_gone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    state = json.loads((run / "trainer_state.json").read_text()) | {"best_step": 40}
    report_cases.write_json(run / "trainer_state.json", state)
    assert "Best: checkpoint-40, evaluation loss 1; it is not in the folder" in page([read_run(run)])
    (run / "trainer_state.json").unlink()
    assert read_run(run).best_step == 60


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        run_report([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="neither config"):
        run_report([tmp_path])
    with pytest.raises(ConfigError, match="name a file that ends"):
        run_report([make_bare_run(tmp_path / "run")], tmp_path / "report.pdf")


def test_the_page_is_written_at_once(tmp_path: Path) -> None:
    run = make_bare_run(tmp_path / "run")
    assert run_report([run], tmp_path / "folder") == 0
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["report.html", "report.md"]


def test_long_runs_stay_small(tmp_path: Path) -> None:
    short = read_run(make_run(tmp_path / "run"))
    records = [step_record(step, 100_000, HIGGS["heads"]) for step in range(1, 100_001)]
    long = [replace(short, name=name, steps=records) for name in ("one", "two", "three")]
    for reports in (long[:1], long):
        assert len(page(reports).encode()) < MAX_PAGE_BYTES


def test_sound_keeps_to_its_limit(tmp_path: Path, demo_clips: list[DemoClip]) -> None:
    report = read_run(make_run(tmp_path / "run", demo_clips[:3]))
    everything = AudioBudget()
    full = page([report], everything)
    assert full.count("<audio") == 15 and not everything.left_out
    budget = AudioBudget(limit=everything.used // 2)
    half = page([report], budget)
    assert budget.used <= budget.limit and budget.left_out
    assert f"{len(budget.left_out)} clip(s) did not fit" in half
    assert half.count("<audio") + len(budget.left_out) == 15 and half.count("not on this page") == len(budget.left_out)
    card = half[half.index('<article class="prompt">') :]
    assert card[: card.index("</article>")].count("<audio") >= 2  # references and base come first


def test_broken_sound_is_named(tmp_path: Path, demo_clips: list[DemoClip]) -> None:
    run = make_run(tmp_path / "run", demo_clips[:1])
    (run / "samples" / "step-60" / "p0.wav").write_bytes(b"RIFFnothing")
    html = page([read_run(run)])
    assert html.count("<audio") == 4 and "step-60/p0.wav: not audio" in html


def test_downsampling_keeps_the_range() -> None:
    curve = [(step, float(step == 777)) for step in range(10_000)]
    points = downsample(curve, 100)
    assert len(points) == 100 and points[7] == (749.5, pytest.approx(0.01), 0.0, 1.0) and points[8] == (849.5, 0.0)
    assert downsample([(1, None), (2, 3.0)]) == [(1.0, None), (2.0, 3.0)]
    assert all(value is None for _, value in downsample([(step, None) for step in range(1000)], 10))


def test_a_mel_picture_shows_the_pitch() -> None:
    seconds = np.arange(24_000) / 24_000
    low, high = (mel_picture(Audio(np.sin(2 * np.pi * f * seconds).astype(np.float32), 24_000)) for f in (200, 4000))
    assert low.shape[0] == 64 and abs(low.shape[1] - 100) <= 2
    assert low[:, 50].argmax() > high[:, 50].argmax() + 20  # the low tone lies further down


def test_the_png_can_be_read_back() -> None:
    levels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    content = png(levels)
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content[16:24] == bytes([0, 0, 0, 4, 0, 0, 0, 3])
    picture = Image.open(io.BytesIO(content))
    assert picture.mode == "P" and (np.asarray(picture) == levels).all()
    palette = picture.getpalette() or []
    assert palette[:3] == [0x44, 0x01, 0x54] and palette[-3:] == [0xFD, 0xE7, 0x25]  # viridis, dark to bright


@pytest.mark.parametrize("sampling_rate", [8_000, 16_000, 24_000, 10_007])
def test_sound_is_encoded_at_any_rate(sampling_rate: int, tmp_path: Path) -> None:
    import soundfile

    tone = np.sin(np.arange(sampling_rate) / 10).astype(np.float32)
    head, _, content = encode_sound(Audio(tone, sampling_rate)).partition(",")
    assert head in {"data:audio/mpeg;base64", "data:audio/wav;base64"}
    (tmp_path / "x").write_bytes(base64.b64decode(content))
    assert soundfile.info(tmp_path / "x").duration == pytest.approx(1.0, abs=0.15)


def test_the_steps_that_earn_a_place() -> None:
    assert spread([0, 10, 20, 30, 40], best=10) == [0, 40, 10, 30, 20]
    assert spread([], None) == [] and spread([5], 5) == [5]

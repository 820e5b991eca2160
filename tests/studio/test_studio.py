"""The parts behind the studio's page: what may be read, the form, data sets, runs as processes, listening, tallies."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import gradio as gr
import numpy as np
import psutil
import pytest
import soundfile
import yaml
from pydantic import BaseModel

from helpers import DemoClip
from speechtune.config import RunConfig, option_names, shipped_recipes
from speechtune.errors import ConfigError, SpeechtuneError
from speechtune.families import build_config, config_class, family_packages, load_config
from speechtune.inference.score import Score
from speechtune.storage.lock import lock_holder, locked
from speechtune.studio import app, assessment, datasets, exports, form, listening, processes, progress, train_tab
from speechtune.studio.listening import Request
from speechtune.studio.reporting import reported
from speechtune.studio.workspace import ASSETS, Workspace, path_options
from speechtune.tasks.pronunciation.alignment import PhonePair, WordScore
from speechtune.tasks.statistics import preference
from speechtune.training.run import run_training

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "studio").mkdir()
    (tmp_path / "given").mkdir()
    return Workspace(tmp_path / "studio", (tmp_path / "given",))


def answers(config: RunConfig, workspace: Workspace, run: str = "first", **changed: object) -> RunConfig:
    """The form for a configuration, filled in with some other answers (`__` for the dot of an option's name)."""
    options = form.options_of(type(config))
    values = dict(zip((option.name for option in options), form.values_of(config, options), strict=True))
    values |= {name.replace("__", "."): value for name, value in changed.items()}
    return form.read_form(config.family, options, list(values.values()), workspace.directory / "runs" / run, workspace)


# What may be read, and where is written


@pytest.mark.parametrize("path", ["../secret.txt", "/etc/passwd", "data/../../secret.txt", "link/secret.txt", "a\0b"])
def test_paths_outside_are_refused(workspace: Workspace, path: str) -> None:
    (workspace.directory.parent / "secret.txt").write_text("secret")
    (workspace.directory / "link").symlink_to(workspace.directory.parent)
    with pytest.raises(ConfigError):
        workspace.readable(path)


def test_paths_inside_are_taken(workspace: Workspace) -> None:
    given = workspace.allowed[0] / "train.jsonl"
    assert workspace.readable("data/voice") == workspace.directory / "data" / "voice"
    assert workspace.readable(given) == given
    assert workspace.readable(ASSETS / "demo-voices") == ASSETS / "demo-voices"


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "", None, "a\nb", ".."])
def test_a_name_is_only_a_name(workspace: Workspace, name: str | None) -> None:
    with pytest.raises(ConfigError):
        workspace.place("runs", name)


PATHS = {
    "data__train": "/etc/hosts",
    "data__eval": "../train.json",
    "data__audio_root": "/",
    "data__cache_dir": "/tmp/cache",
    "model__path": "/etc",
    "model__codec_path": "../codec",
    "lora__initial": "/root",
    "checkpoint__resume": "/root/checkpoint-1",
    "tracking__logging_dir": "../../logs",
    "evaluate__asr": "faster-whisper:/etc",
}


@pytest.mark.parametrize("option", PATHS)
def test_no_option_leads_outside(workspace: Workspace, option: str) -> None:
    start = form.start_from(form.SHIPPED, workspace)
    with pytest.raises(ConfigError, match="outside the studio's folder") as caught:
        answers(start, workspace, **{"data__train": "data/voice", option: PATHS[option]})
    at, others = form.issues_by_option(caught.value, form.options_of(type(start)))
    assert list(at) == [option.replace("__", ".")] and not others


@pytest.mark.parametrize("family", family_packages())
def test_every_option_of_files_is_looked_at(family: str) -> None:
    """A new option that takes a path cannot be forgotten: they are found by their annotations."""

    def names_of(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
        for name, info in section.model_fields.items():
            if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
                yield from names_of(info.annotation, f"{prefix}{name}.")
            elif "Path" in str(info.annotation):
                yield prefix + name

    names = [*names_of(config_class(family)), "model.path", "checkpoint.resume"]
    assert len(names) > 8
    config = build_config({"family": family}, "test", [f"{name}=/outside" for name in names])
    assert {name for name, _ in path_options(config)} == set(names)


def test_clips_that_rows_name_stay_inside(workspace: Workspace, demo_clips: list[DemoClip]) -> None:
    outside = workspace.directory.parent / "outside.flac"
    shutil.copyfile(demo_clips[0].path, outside)
    shutil.copyfile(demo_clips[0].path, workspace.allowed[0] / "given.flac")
    rows = [{"audio": str(outside), "text": "a"}, {"audio": str(workspace.allowed[0] / "given.flac"), "text": "b"}]
    folder = workspace.place("data", "mixed")
    folder.mkdir(parents=True)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = datasets.check(folder, workspace)
    assert [(issue.code, issue.row) for issue in report.issues] == [("outside_root", 1)]
    assert [u.clip and u.clip.name for u in datasets.utterances(folder, report, workspace)] == [None, "given.flac"]
    config = answers(form.start_from(form.SHIPPED, workspace), workspace, data__train=str(folder))
    assert config.data.audio_root == workspace.roots  # so the run's process refuses it too


# The form


@pytest.mark.parametrize("family", family_packages())
def test_the_form_has_every_option_with_its_description(family: str) -> None:
    kind = config_class(family)
    options = form.options_of(kind)
    assert [option.name for option in options] == [name for name in option_names(kind) if name not in form.GIVEN]
    assert all(option.help for option in options)
    assert set(form.BASIC) <= {option.name for option in options}


@pytest.mark.parametrize("recipe", shipped_recipes())
def test_a_form_left_as_it_is_gives_the_recipe(recipe: str, workspace: Workspace) -> None:
    """Every value survives being shown and read again."""
    expected = load_config(shipped_recipes()[recipe]).model_dump(mode="json")
    found = answers(form.start_from(recipe, workspace), workspace).model_dump(mode="json")
    assert found.pop("output_dir") == str(workspace.directory / "runs" / "first")
    assert found["data"].pop("audio_root") == [str(root) for root in workspace.roots]
    expected.pop("output_dir")
    expected["data"].pop("audio_root")
    assert found == expected


def test_choices_are_what_the_option_allows() -> None:
    found = {option.name: option.choices for option in form.options_of(config_class("phi4_multimodal"))}
    assert found["train.schedule"] == ("cosine", "linear", "constant")
    assert found["lora.rslora"] == (True, False)
    assert found["train.gradient_checkpointing"] == (True, False, "auto")
    assert found["model.speech_lora"] == ("merge", "continue", "stack", "drop", None)
    assert found["batch.tokens"] == found["train.max_steps"] == found["lora.targets"] == ()


def test_issues_stand_at_their_fields(workspace: Workspace) -> None:
    start = form.start_from(form.SHIPPED, workspace)
    wrong = {"train__epochs": "-1", "lora__rank": "many", "data__train": "data/x", "data__eval": "data/y"}
    with pytest.raises(ConfigError) as caught:
        answers(start, workspace, **wrong, train__betas="[0.9")
    at, others = form.issues_by_option(caught.value, form.options_of(type(start)))
    assert set(at) == {"train.betas"} and not others
    with pytest.raises(ConfigError) as caught:
        answers(start, workspace, **wrong)
    at, others = form.issues_by_option(caught.value, form.options_of(type(start)))
    assert set(at) == {"train.epochs", "lora.rank"} and "greater than 0" in at["train.epochs"]
    wrong |= {"train__epochs": "1", "lora__rank": "4", "data__validation_split": "0.1"}
    with pytest.raises(ConfigError) as caught:
        answers(start, workspace, **wrong)
    at, others = form.issues_by_option(caught.value, form.options_of(type(start)))
    assert "both set" in " ".join([*at.values(), *others])


# Data sets


def test_dropped_recordings_become_data(workspace: Workspace, demo_clips: list[DemoClip]) -> None:
    folder, chosen = workspace.place("data", "voice"), demo_clips[:2]
    datasets.add_files(folder, [clip.path for clip in chosen])
    report = datasets.check(folder, workspace)
    assert [issue.code for issue in report.issues] == ["empty_text"] * 2
    rows = datasets.utterances(folder, report, workspace)
    assert [row.clip for row in rows] == [folder / clip.path.name for clip in chosen] and all(
        row.issues for row in rows
    )
    texts = {row.number: clip.text for row, clip in zip(rows, chosen, strict=True)}
    datasets.correct(folder, texts, workspace)
    report = datasets.check(folder, workspace)
    assert not report.issues and report.statistics["num_samples"] == 2
    assert [row.text for row in datasets.utterances(folder, None, workspace)] == [clip.text for clip in chosen]
    with pytest.raises(ConfigError, match="already"):
        datasets.add_files(folder, [chosen[0].path])
    datasets.add_recording(folder, demo_clips[2].path, "One more.")
    assert [row.text for row in datasets.utterances(folder, None, workspace)][2:] == ["One more."]


def test_a_file_that_is_no_data_is_named(workspace: Workspace) -> None:
    (workspace.directory / "notes.pdf").write_bytes(b"%PDF")
    with pytest.raises(SpeechtuneError, match="nor any other data file"):
        datasets.add_files(workspace.place("data", "notes"), [workspace.directory / "notes.pdf"])


def test_pairs_are_read_as_they_are_and_can_be_corrected(workspace: Workspace, demo_clips: list[DemoClip]) -> None:
    folder, clip = workspace.place("data", "pairs"), demo_clips[0]
    text = workspace.directory / f"{clip.path.stem}.txt"
    text.write_text(clip.text)
    datasets.add_files(folder, [clip.path, text])
    assert not (folder / datasets.METADATA).exists() and not datasets.check(folder, workspace).issues
    datasets.correct(folder, {1: clip.text, 7: "no such row"}, workspace)
    assert not (folder / datasets.METADATA).exists(), "nothing was changed"
    datasets.correct(folder, {1: "Another text."}, workspace)
    datasets.add_recording(folder, demo_clips[1].path, "One more.")
    assert [row.text for row in datasets.utterances(folder, None, workspace)] == ["Another text.", "One more."]


def test_data_elsewhere_is_taken_without_copying_or_changing_it(
    workspace: Workspace, demo_clips: list[DemoClip]
) -> None:
    given, folder = workspace.allowed[0], workspace.place("data", "taken")
    (given / "wavs").mkdir()
    for clip in demo_clips[:2]:
        shutil.copyfile(clip.path, given / "wavs" / clip.path.name)
    lines = [f"wavs/{clip.path.name}|{clip.text}" for clip in demo_clips[:2]]
    (given / "metadata.csv").write_text("audio_file|text\n" + "\n".join(lines))
    before = {path: path.read_bytes() for path in given.rglob("*") if path.is_file()}
    datasets.import_rows(given, folder)
    with pytest.raises(ConfigError, match="of that name"):
        datasets.import_rows(given, folder)
    assert not datasets.check(folder, workspace).issues
    datasets.correct(folder, {1: "Corrected."}, workspace)
    first, second = datasets.utterances(folder, None, workspace)
    assert (first.text, second.text) == ("Corrected.", demo_clips[1].text)
    assert first.clip == given / "wavs" / demo_clips[0].path.name
    assert before == {path: path.read_bytes() for path in given.rglob("*") if path.is_file()}
    assert [path.name for path in folder.iterdir()] == [datasets.METADATA]


def test_rows_of_chats_are_heard_and_not_rewritten(
    workspace: Workspace, write_chatml: Callable[[Path, Sequence[DemoClip]], Path], demo_clips: list[DemoClip]
) -> None:
    folder = workspace.place("data", "chat")
    folder.mkdir(parents=True)
    write_chatml(folder / "train.json", demo_clips[:2])
    rows = datasets.utterances(folder, None, workspace)  # but they are shown, and can be heard
    assert [(row.text, row.clip) for row in rows] == [(clip.text, clip.path) for clip in demo_clips[:2]]
    with pytest.raises(ConfigError, match="no plain row"):
        datasets.correct(folder, {1: "x"}, workspace)


@pytest.mark.slow
def test_a_long_recording_is_cut_and_judged(workspace: Workspace, demo_clips: list[DemoClip]) -> None:
    """As `speechtune prepare` does it: the pieces get the script's lines, and too little speech is a NO-GO."""
    chosen = [clip for clip in demo_clips if clip.speaker == "allison"][:3]
    silence = np.zeros(8000, np.float32)
    parts = [part for clip in chosen for part in (soundfile.read(clip.path, dtype="float32")[0], silence)]
    soundfile.write(workspace.directory / "long.wav", np.concatenate(parts), soundfile.info(chosen[0].path).samplerate)
    (workspace.directory / "script.txt").write_text("\n".join(clip.text for clip in chosen))
    options = {"asr": "pocketsphinx", "language": "en", "script": workspace.directory / "script.txt"}
    verdict, report = datasets.prepare("cut", [workspace.directory / "long.wav"], "", workspace, **options)
    assert verdict.startswith("**NO-GO**: 0.2 minutes given") and "<html" in report
    rows = datasets.utterances(workspace.place("data", "cut"), None, workspace)
    assert rows and {row.text for row in rows} <= {clip.text for clip in chosen}
    assert all(row.clip and row.clip.is_relative_to(workspace.directory) for row in rows)
    for place, asr in (("/etc", "pocketsphinx"), ("", "pocketsphinx"), ("data/cut", "faster-whisper:/etc")):
        with pytest.raises(ConfigError):
            datasets.prepare("other", [], place, workspace, **options | {"asr": asr})


# Runs


def test_the_holder_of_a_lock_is_found(tmp_path: Path) -> None:
    assert lock_holder(tmp_path) is None
    code = "import sys, time; from pathlib import Path; from speechtune.storage.lock import locked\n"
    code += f"with locked(Path({str(tmp_path)!r})): print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        holder.stdout.readline()
        assert lock_holder(tmp_path) == holder.pid
        with pytest.raises(ConfigError, match=str(holder.pid)), locked(tmp_path):
            pass
        holder.stdin.close()
    assert lock_holder(tmp_path) is None


def test_a_process_of_another_time_is_not_taken_for_a_run(tmp_path: Path) -> None:
    """Process ids are given again: one that began at another time than the run's is somebody else's."""
    mark = {"pid": os.getpid(), "created": psutil.Process().create_time()}
    (tmp_path / processes.PROCESS_NAME).write_text(json.dumps(mark))
    found = processes.find_process(tmp_path)
    assert found is not None and found.pid == os.getpid()
    (tmp_path / processes.PROCESS_NAME).write_text(json.dumps(mark | {"created": mark["created"] - 100}))
    assert processes.find_process(tmp_path) is None
    with pytest.raises(ConfigError, match="no process"):
        processes.stop_run(tmp_path)


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_a_run_outlives_the_studio_and_is_stopped_and_resumed(
    workspace: Workspace,
    make_config: Callable[..., RunConfig],
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
) -> None:
    """Started by a process that is gone; found by its folder; stopped by the signal the loop handles; resumed."""
    chosen = sorted(demo_clips, key=lambda clip: clip.duration_seconds)[:2]
    run = workspace.directory / "runs" / "first"
    config = make_config(
        output_dir=str(run),
        data={"train": str(write_chatml(workspace.directory / "train.json", chosen))},
        lora={"rank": 2, "alpha": 4},
        train={"max_steps": 2000, "batch_size": 1, "learning_rate": 1e-3},
        checkpoint={"every_steps": 1000},
        evaluate={"enabled": False},
    )
    (workspace.directory / "recipe.yaml").write_text(config.to_yaml())
    code = f"""from pathlib import Path
from speechtune.families import load_config
from speechtune.studio.processes import start_run
start_run(load_config(Path("recipe.yaml")), Path({str(workspace.directory)!r}))"""
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    subprocess.run([sys.executable, "-c", code], cwd=workspace.directory, env=environment, check=True, timeout=120)
    process = processes.find_process(run)
    assert process is not None and process.parent().pid != os.getpid()
    assert "nothing is written yet" in progress.read_progress("first", workspace).state
    until(lambda: (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) > 3)
    assert lock_holder(run) == process.pid
    shown = progress.read_progress("first", workspace)
    assert f"process {process.pid} is at work" in shown.state
    recorded = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert shown.losses is not None
    audio = shown.losses[shown.losses["curve"] == "loss of the audio head"]
    assert audio["value"].iloc[0] == pytest.approx(recorded[0]["losses"]["audio"], rel=1e-6)
    with pytest.raises(ConfigError, match="already"):
        processes.start_run(config, workspace.directory, resume=True)
    processes.stop_run(run)
    until(lambda: processes.find_process(run) is None)
    stopped = workspace.report("first").last_step
    assert 3 < stopped < 2000 and (run / f"checkpoint-{stopped}").is_dir()
    recipe = yaml.safe_load((run / processes.RECIPE_NAME).read_text())
    recipe["train"]["max_steps"] = stopped + 2
    (run / processes.RECIPE_NAME).write_text(yaml.safe_dump(recipe))
    processes.start_run(config, workspace.directory, resume=True)
    until(lambda: processes.find_process(run) is None)
    assert workspace.report("first").state == "finished" and workspace.report("first").last_step == stopped + 2


@pytest.mark.slow
def test_doctor_and_fit_before_the_start(
    workspace: Workspace,
    make_config: Callable[..., RunConfig],
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
) -> None:
    data = write_chatml(workspace.directory / "train.json", demo_clips[:2])
    run = workspace.directory / "runs" / "first"
    config = make_config(output_dir=str(run), data={"train": str(data)}, train={"max_steps": 7, "batch_size": 1})
    view = train_tab.FormView(config, workspace)
    line, table = view.doctor(config)
    assert line == "Doctor: every check passed"
    verdicts = {row[0]: row[1] for row in table["value"]}
    assert verdicts["training step"] == verdicts["merge"] == "pass"
    line, _ = view.fit(config)
    assert line.startswith("Estimate on cpu: 7 steps") and not (run / "config.yaml").exists()
    broken = config.model_copy(update={"data": config.data.model_copy(update={"train": data.with_name("none.json")})})
    line, table = view.doctor(broken)
    assert line == "Doctor: **1 check(s) failed**" and "none.json" in str(table["value"])


def test_a_verb_that_fails_says_why(workspace: Workspace) -> None:
    with pytest.raises(SpeechtuneError, match="nowhere: no such folder"):
        processes.run_verb(workspace.directory, "report", "nowhere")


# Listening


@pytest.fixture
def with_run(workspace: Workspace, adapter_run: Path) -> Workspace:
    """A workspace with a finished run, "first"."""
    shutil.copytree(adapter_run, workspace.directory / "runs" / "first")
    return workspace


def test_base_adapter_and_checkpoints_speak(with_run: Workspace) -> None:
    assert listening.voices_of("first", with_run) == ["base", "lora_adapters", "checkpoint-4", "checkpoint-2"]
    request = Request("first", "One two.", seed=1, temperature=0, max_new_tokens=12)

    def say(voice: str, strength: float) -> np.ndarray:
        asked = Request(**{**vars(request), "strength": strength})
        ((name, path),) = listening.speak(asked, [voice], with_run)
        assert name == voice and path.is_relative_to(with_run.directory)
        return soundfile.read(path)[0]

    base, full = say("base", 1.0), say("lora_adapters", 1.0)
    assert np.array_equal(say("lora_adapters", 0.0), base)  # a line from base to adapter: at its beginning the base
    assert not np.array_equal(full, base) and np.array_equal(say("checkpoint-4", 1.0), full)
    assert np.array_equal(say("base", 1.5), base)


def test_a_model_trained_in_full_speaks(
    workspace: Workspace,
    make_config: Callable[..., RunConfig],
    write_chatml: Callable[[Path, Sequence[DemoClip]], Path],
    demo_clips: list[DemoClip],
) -> None:
    chosen = sorted(demo_clips, key=lambda clip: clip.duration_seconds)[:2]
    run_training(
        make_config(
            output_dir=str(workspace.directory / "runs" / "full"),
            data={"train": str(write_chatml(workspace.directory / "train.json", chosen))},
            lora={"enabled": False},
            train={"max_steps": 1, "batch_size": 1, "learning_rate": 1e-2},
        )
    )
    voices = listening.voices_of("full", workspace)
    assert voices == ["base", "checkpoint-1"]
    request = Request("full", "One two.", temperature=0, max_new_tokens=12)
    base, trained = (soundfile.read(path)[0] for _, path in listening.speak(request, voices, workspace))
    assert not np.array_equal(base, trained)


def test_what_cannot_be_said_is_refused(with_run: Workspace, demo_clips: list[DemoClip]) -> None:
    clip = str(demo_clips[0].path)
    for request, voices, reason in (
        (Request("first", "..."), ["base"], "nothing to say"),
        (Request("first", "One.", reference=clip), ["base"], "belong together"),
        (Request("first", "One.", reference="/etc/hostname", reference_text="a"), ["base"], "outside"),
        (Request("first", "One."), [], "who speaks"),
        (Request("first", "One."), ["../../x"], "no such adapter"),
        (Request("none", "One."), ["base"], "no such run"),
    ):
        with pytest.raises(SpeechtuneError, match=reason):
            list(listening.speak(request, voices, with_run))


def test_only_the_newest_speech_is_kept(workspace: Workspace) -> None:
    for _ in range(listening.SENTENCES_KEPT + 5):
        (listening._new_folder(workspace) / "base.wav").touch()
    kept = sorted(int(path.name) for path in (workspace.directory / "listening").iterdir())
    assert kept == list(range(6, listening.SENTENCES_KEPT + 6))


def test_a_blind_pair_hides_who_speaks_and_is_counted(with_run: Workspace) -> None:
    request = Request("first", "One two.", temperature=0, max_new_tokens=8)
    with pytest.raises(ConfigError, match="different"):
        listening.blind_pair(request, "base", "base", with_run)
    pair = listening.blind_pair(request, "base", "lora_adapters", with_run)
    assert set(pair.voices) == {"base", "lora_adapters"} and [clip.name for clip in pair.clips] == ["A.wav", "B.wav"]
    base = next(path for _, path in listening.speak(request, ["base"], with_run))
    assert pair.clips[pair.voices.index("base")].read_bytes() == base.read_bytes()
    listening.vote(pair, "A", with_run)
    listening.vote(pair, "A", with_run)
    listening.vote(pair, "B", with_run)
    listening.vote(pair, "no difference", with_run)
    found = listening.tally("first", *pair.voices, with_run)
    assert (found.first, found.second, found.neither) == (2, 1, 1)
    other = listening.tally("first", "base", "checkpoint-2", with_run)
    assert (other.first, other.second, other.neither) == (0, 0, 0)


def test_the_interval_of_a_tally_is_the_binomial_one() -> None:
    """Clopper-Pearson bounds are where the tail of the binomial holds 2.5 %: summed here term by term."""
    from math import comb

    found = preference(8, 2, 5)

    def tail(p: float, counts: range) -> float:
        return sum(comb(10, k) * p**k * (1 - p) ** (10 - k) for k in counts)

    assert (found.share, found.neither) == (0.8, 5)
    assert tail(found.low, range(8, 11)) == pytest.approx(0.025, abs=1e-6)
    assert tail(found.high, range(9)) == pytest.approx(0.025, abs=1e-6)
    assert found.p_value == pytest.approx(2 * tail(0.5, range(8, 11)))
    assert np.isnan(preference(0, 0, 3).share)


# Exports, pronunciation, the page


def test_an_adapter_is_exported_and_a_broken_one_is_not(with_run: Workspace) -> None:
    _, path = exports.export("first", "checkpoint-2", with_run)
    with zipfile.ZipFile(path) as packed:
        weights = packed.read("adapter_model.safetensors")
    source = with_run.directory / "runs" / "first" / "checkpoint-2" / "adapter_model.safetensors"
    assert weights == source.read_bytes()
    source.write_bytes(weights[:-8] + bytes(8))
    with pytest.raises(SpeechtuneError):
        exports.export("first", "checkpoint-2", with_run)
    with pytest.raises(SpeechtuneError):
        exports.export("first", "../first", with_run)


def test_phones_in_colour() -> None:
    pairs = (PhonePair("B", "B"), PhonePair("EH", "AE"), PhonePair("R", None), PhonePair(None, "S"))
    score = Score("a", "a", {}, "bear", [], (WordScore("bear", pairs),), (), {}, True)
    assert assessment.in_colour(score) == [
        ("bear:", None), ("B", "right"), ("EH>AE", "replaced"), ("R", "left out"), ("S", "put in"),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_recording_is_scored_and_remembered(workspace: Workspace, demo_clips: list[DemoClip]) -> None:
    clip = demo_clips[0]
    found = assessment.assess(clip.path, clip.text, None, workspace)
    (row,) = assessment.history(workspace)
    assert row["text"] == clip.text and row["scores"] == found.scores and row["run"] == assessment.EMBEDDED
    with pytest.raises(ConfigError, match="outside"):
        assessment.assess(Path("/etc/hostname"), "x", None, workspace)


def test_errors_for_users_become_messages() -> None:
    def fails() -> None:
        raise ConfigError("<b>no</b>")

    def missing() -> None:
        raise ModuleNotFoundError("x", name="scipy")

    with pytest.raises(gr.Error, match="&lt;b&gt;no"):
        reported(fails)()
    with pytest.raises(gr.Error, match=r"speechtune\[evaluate\]"):
        reported(missing)()
    with pytest.raises(ZeroDivisionError):
        reported(lambda: 1 / 0)()


def test_the_page_is_on_loopback_and_serves_no_other_file(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import urllib.error
    import urllib.request

    monkeypatch.chdir(workspace.directory)
    for name in ("GRADIO_TEMP_DIR", "TMPDIR"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("tempfile.tempdir", None)
    secret, given = workspace.directory.parent / "secret.txt", workspace.allowed[0] / "clip.txt"
    recipe = workspace.directory / "runs" / "recipe.yaml"
    recipe.parent.mkdir()
    for path in (secret, given, recipe):
        path.write_text("content")
    page, address = app.serve(workspace, None, block=False)
    try:
        assert address.startswith("http://127.0.0.1:")
        listening_on = [c.laddr for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        port = int(address.rsplit(":", 1)[1].strip("/"))
        assert {place.ip for place in listening_on if place.port == port} == {"127.0.0.1"}
        assert urllib.request.urlopen(f"{address}gradio_api/file={given}").read() == b"content"
        for path in (secret, recipe, Path("/etc/passwd"), given.parent / ".." / "secret.txt"):
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{address}gradio_api/file={path}")
            assert refused.value.code in (403, 404)
        other = urllib.request.Request(address, headers={"Host": "example.org"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(other)
    finally:
        page.close()

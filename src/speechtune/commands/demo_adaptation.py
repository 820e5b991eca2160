"""The demonstration to listen to: a small model that speaks is adapted to a person's voice that it never heard.

Its figures are measured on held-out sentences, with the saved adapter, beside the base alone.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
from rich.console import Console

from speechtune.audio import read_audio, write_wav
from speechtune.commands.demo_voice import SCORERS, VOICES, chatml_row
from speechtune.config import RunConfig
from speechtune.families import build_config, family_part
from speechtune.family import Scorers
from speechtune.inference.evaluate_voices import evaluate_voices, systems_of
from speechtune.lora.files import FOLDER_NAME
from speechtune.tasks.voice_cloning.comparison import MEASURES, SIGNIFICANT, Comparison
from speechtune.tasks.voice_cloning.scorers import load_scorers
from speechtune.training.run import Outcome
from speechtune.types import Audio, AudioRef, GenerationOptions

FOLDER = VOICES.parent / "demo-adaptation"
SPEAKER = "allison"
REFERENCES_PER_SENTENCE = 3
HELD_OUT_STEP = 5  # every fifth clip is held out
SILENCE, MARGIN_SECONDS = 0.02, 0.03  # of the peak; as in examples/speaking_base/features.py
BATCH_SIZE = 48
STRENGTH = 0.3  # of the adapter where it is measured: whole, it is nearer to the voice and loses words (decision 0014)


def _clips() -> list[dict[str, str]]:
    """All recorded voices, and further recordings of the one to learn."""
    clips = []
    for folder in (VOICES, FOLDER):
        rows = (json.loads(line) for line in (folder / "clips.jsonl").read_text(encoding="utf-8").splitlines())
        clips += [{**row, "audio": str(folder / row["audio"])} for row in rows]
    return clips


def _trimmed(clip: dict[str, str], directory: Path) -> dict[str, str]:
    """The clip without the silence around it, in a file of its own: the base has never heard any."""
    audio = read_audio(AudioRef(clip["audio"]))
    loud = np.flatnonzero(np.abs(audio.samples) > SILENCE * np.abs(audio.samples).max())
    margin = int(MARGIN_SECONDS * audio.sampling_rate)
    kept = audio.samples[max(0, loud[0] - margin) : loud[-1] + margin]
    path = directory / Path(clip["audio"]).with_suffix(".wav").name
    write_wav(path, Audio(kept, audio.sampling_rate))
    return {**clip, "audio": str(path.resolve())}


def _rows(targets: list[dict[str, str]], references: list[dict[str, str]], count: int) -> list[dict[str, object]]:
    """Each target behind `count` other recordings in turn."""
    rows = []
    for index, target in enumerate(targets):
        others = [clip for clip in references if clip is not target]
        rows += [chatml_row(others[(index + turn * 7) % len(others)], target) for turn in range(count)]
    return rows


def _prompts(held_out: list[dict[str, str]], references: list[dict[str, str]]) -> str:
    """A list as seed-tts-eval's: her held-out sentences, with their recordings, and sentences that nobody recorded."""
    texts = (FOLDER / "sentences.txt").read_text(encoding="utf-8").splitlines()
    wanted = [(clip["text"], "|" + clip["audio"]) for clip in held_out] + [(text, "") for text in texts]
    lines = []
    for index, (text, recording) in enumerate(wanted):
        reference = references[index % len(references)]
        lines.append(f"{index:03d}|{reference['text']}|{reference['audio']}|{text}{recording}\n")
    return "".join(lines)


def write_data(directory: Path) -> Path:
    """Write the manifests of the voice, the held-out sentences apart; return the training data's."""
    clips = directory / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    own = [_trimmed(clip, clips) for clip in _clips() if clip["speaker"] == SPEAKER]
    held_out = own[::HELD_OUT_STEP]
    known = [clip for clip in own if clip not in held_out]
    manifests = {"train.json": _rows(known, known, REFERENCES_PER_SENTENCE), "eval.json": _rows(held_out, known, 1)}
    for name, rows in manifests.items():
        (directory / name).write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    _prompts_path(directory).write_text(_prompts(held_out, known), encoding="utf-8")
    return directory / "train.json"


def _prompts_path(directory: Path) -> Path:
    return directory / "prompts.lst"


def demo_config(family: str, manifest: Path, directory: Path) -> RunConfig:
    """The demo's recipe, on the base that ships with the family."""
    scorers = {name: package for name, package in SCORERS.items() if importlib.util.find_spec(package) is not None}
    return build_config(
        {
            "family": family,
            "output_dir": directory / "run",
            "model": family_part(family, "tiny").speaking_base(),
            "data": {"train": manifest, "eval": directory / "eval.json", "cache_dir": directory / "cache"},
            "lora": {"rank": 16, "alpha": 32, "dropout": 0.3, "targets": "all"},
            "train": {"max_steps": 90, "batch_size": 12, "learning_rate": 1e-3, "warmup_steps": 10},
            "evaluate": {"every_steps": 45, "batch_size": 8, "prompts": 6, **scorers},
            "checkpoint": {"every_steps": 45, "keep_last": 2},
            "tracking": {"log_every_steps": 10},
        },
        "demo",
    )


def measure(outcome: Outcome, manifest: Path, merged: Path, console: Console) -> list[tuple[str, str]]:
    """Base and saved adapter say the held-out sentences; rows of the table on what improved, and on what did not."""
    config = outcome.job.config
    directory, settings = config.output_dir.parent, config.evaluate
    scorers = load_scorers(settings.asr, settings.speaker, settings.mos)
    base = family_part(config.family, "tiny").speaking_base()
    systems = systems_of(base.pop("path"), [config.output_dir / FOLDER_NAME], True, [STRENGTH])
    comparison = evaluate_voices(
        _prompts_path(directory),
        systems,
        directory / "heard",
        scorers,
        model_options=base,
        cache_dir=config.cache_dir,
        batch_size=BATCH_SIZE,
        options=GenerationOptions(seed=1),
    )
    names = [system.name for system in systems]
    rows = [
        ("held-out sentences", str(comparison.prompts)),
        ("strength of the adapter in what follows", f"{STRENGTH:g}"),
    ]
    rows += _figures(comparison, *names)
    return [*rows, *_ranks(comparison, scorers), ("listen", str(directory / "heard"))]


def _figures(comparison: Comparison, base: str, adapter: str) -> list[tuple[str, str]]:
    rows, not_better = [], []
    for measure, (label, better) in MEASURES.items():
        before, after = (comparison.systems[name].estimates.get(measure) for name in (base, adapter))
        if before is None or after is None:
            continue
        cell = f"{before.value:.3f} -> {after.value:.3f} [{after.low:.3f}, {after.high:.3f}]"
        if after.p_value is not None:
            cell += f", p={after.p_value:.2g}"
            sign = -1 if better == "lower" else 1
            if sign * (after.value - before.value) <= 0 or after.p_value > SIGNIFICANT:
                not_better.append(label)
        rows.append((f"{label}, base -> adapter", cell))
    rows.append(("no significant improvement of", ", ".join(not_better) or "nothing measured here"))
    return rows


def _ranks(comparison: Comparison, scorers: Scorers) -> list[tuple[str, str]]:
    """How often the voice wanted is the nearest of all recorded ones."""
    if scorers.speaker is None:
        return []
    by_voice: dict[str, list[AudioRef]] = {}
    for clip in _clips():
        by_voice.setdefault(clip["speaker"], []).append(AudioRef(clip["audio"]))
    means = {}
    for voice, refs in by_voice.items():
        mean_D = scorers.speaker.embed([read_audio(ref) for ref in refs]).mean(axis=0)
        means[voice] = mean_D / np.linalg.norm(mean_D)
    cells = []
    for name in comparison.systems:
        audios = [read_audio(AudioRef(row.audio)) for row in comparison.rows if row.system == name and row.audio]
        alike_NV = scorers.speaker.embed(audios) @ np.stack(list(means.values())).T
        nearest = alike_NV.argmax(axis=1) == list(means).index(SPEAKER)
        cells.append(f"{nearest.mean():.0%}")
    return [(f"{SPEAKER} is the nearest of {len(means)} recorded voices", " -> ".join(cells))]

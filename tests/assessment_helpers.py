"""Little pronunciation data: rows of the hub's copy of Speechocean762, the same as a folder, and task rows."""

from __future__ import annotations

import copy
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import soundfile
from pyarrow import parquet

from speechtune.data.rows import SPLITS
from speechtune.types import Sample

LISA = {
    "accuracy": 5,
    "stress": 10,
    "total": 6,
    "text": "LISA",
    "phones": ["L", "IY1", "S", "AH0"],
    "phones-accuracy": [0.4, 2.0, 2.0, 1.2],
    "mispronunciations": [{"canonical-phone": "L", "index": 0, "pronounced-phone": "D Z"}],
}
HI = {
    "accuracy": 10,
    "stress": 10,
    "total": 10,
    "text": "HI",
    "phones": ["HH", "AY1"],
    "phones-accuracy": [2.0, 1.5],
    "mispronunciations": [],
}
SCORES = {"accuracy": 8, "completeness": 10.0, "fluency": 9, "prosodic": 7.5, "total": 8}
SPEAKERS = {"train": {"u1": "01", "u2": "01", "u3": "02"}, "test": {"t1": "09"}}


def wav(seconds: float = 0.2, value: float | None = None) -> bytes:
    noise = np.random.default_rng(0).normal(0, 0.1, round(seconds * 4000)).astype(np.float32)
    file = io.BytesIO()
    soundfile.write(file, noise if value is None else np.full_like(noise, value), 4000, format="WAV", subtype="FLOAT")
    return file.getvalue()


def hub_row(name: str = "u2", speaker: str = "01", **fields: Any) -> dict[str, Any]:
    words = [copy.deepcopy(HI), copy.deepcopy(LISA)]
    row = {**SCORES, "text": "HI LISA", "words": words, "speaker": speaker, "gender": "f", "age": int(speaker or 1) + 5}
    return {**row, "audio": {"bytes": wav(), "path": f"{name}.WAV"}, **fields}


def hub_rows(split: str) -> list[dict[str, Any]]:
    return [hub_row(name, speaker) for name, speaker in SPEAKERS[split].items()]


def write_folder(folder: Path) -> Path:
    """The rows of `hub_rows` in the official layout."""
    scores: dict[str, Any] = {}
    for split, speakers in SPEAKERS.items():
        rows = hub_rows(split)
        tables: dict[str, dict[str, str]] = {name: {} for name in ("text", "wav.scp", "utt2spk", "spk2age")}
        tables["spk2gender"] = {}
        for (name, speaker), row in zip(speakers.items(), rows, strict=True):
            (folder / "WAVE").mkdir(parents=True, exist_ok=True)
            (folder / "WAVE" / f"{name}.WAV").write_bytes(row["audio"]["bytes"])
            scores[name] = {key: row[key] for key in (*SCORES, "text", "words")}
            tables["text"][name], tables["utt2spk"][name] = row["text"], speaker
            tables["wav.scp"][name] = f"WAVE/{name}.WAV"
            tables["spk2age"][speaker], tables["spk2gender"][speaker] = str(row["age"]), row["gender"]
        (folder / split).mkdir(exist_ok=True)
        for table, lines in tables.items():
            (folder / split / table).write_text("".join(f"{key}\t{value}\n" for key, value in lines.items()))
    (folder / "resource").mkdir(exist_ok=True)
    (folder / "resource" / "scores.json").write_text(json.dumps(scores))
    return folder


def write_hub(folder: Path, **rows: list[dict[str, Any]]) -> Path:
    for split in SPLITS:
        write_parquet(folder / "data" / f"{split}-00000-of-00001.parquet", rows.get(split, hub_rows(split)))
    return folder


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def bare(sample: Sample) -> Sample:
    """Without what must differ between the layouts."""
    return replace(sample, audio=None, source="")


APA = {"accuracy": 8, "fluency": 9, "prosodic": 7.5, "total": 10.0}
MDD = {"word_transcript": "hi lisa", "phoneme_transcript": "HH AY  D Z IY S <unk>"}


def task_row(task: str = "APA", **fields: Any) -> dict[str, Any]:
    target = {"APA": APA, "MDD": MDD}.get(task, {})
    return {"audio": "a.wav", "text": "Hi, Lisa!", "task": task, "target": dict(target), **fields}


def write_jsonl(folder: Path, *rows: Any) -> Path:
    path = folder / "tasks.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path

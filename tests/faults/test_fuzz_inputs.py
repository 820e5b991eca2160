"""2,000 damaged manifests, tables and recordings go through `validate` and `encode`: issues, never a traceback.

Every case is made from its own seed, so that a failure names what to run again.
"""

import json
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from speechtune.cache.encode import encode_samples
from speechtune.commands.validate import validate
from speechtune.config import DataConfig
from speechtune.data.sources import load_samples
from speechtune.errors import SpeechtuneError
from speechtune.family import Family
from speechtune.types import Audio, AudioRef, Encoded, Sample

CASES = 2_000
GROUP = 100
HANG_SECONDS = 10
SPEAKERS = ("ann", "ann", "bob", "bob")
TEXTS = ("press one for sales", "press two for help", "please hold the line", "good bye | and thank you")
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1e308, float("nan"), float("inf"), 10**30, "", " ", "\0", "\ud800", "é" * 3_000),
    *([], {}, [[[]]], {"audio": {"audio": {}}}, "../secret.wav", "/etc/passwd", "file:///etc/passwd"),
    *("http://127.0.0.1:9/x.wav", "data:audio/wav;base64,AAAA", "C:\\clips\\a.wav", "~/a.wav", ".", "clips", "<audio>"),
)
ODD_BYTES = (
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\x80",
    b"\r",
    b"|",
    b"\t",
    b'"',
    b"{",
    b"]",
    b"\n\n",
    b"1e999",
    b"../",
)


@dataclass
class RawFamily:
    """Keeps a clip's samples as its features: what is tested is how clips are read."""

    name: str = "raw"
    sampling_rate: int = 16_000
    encode_key: str = "raw-1"
    reference_encoder: None = None

    def clips(self, sample: Sample) -> tuple[AudioRef, ...]:
        targets = () if sample.audio is None else (sample.audio,)
        return (*(clip.audio for clip in sample.references), *targets)

    def encode_audio(self, audios: list[Audio]) -> list[np.ndarray]:
        return [audio.samples[:, None] for audio in audios]

    def encode(self, sample: Sample, features: list[np.ndarray]) -> Encoded:
        return Encoded(sample.id, {"features": features[-1]}, len(features[-1]), 0.5)


@contextmanager
def watched(root: Path) -> Iterator[None]:
    """Raise where the block takes 10 s; tell when it opened a file beside `root` that holds data."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"hangs for {HANG_SECONDS} s")

    old = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(HANG_SECONDS)
    OPENED.clear()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    outside = [path for path in OPENED if path.startswith("/etc/passwd") or path.endswith("secret.wav")]
    assert not outside, f"opened {outside}, outside {root}"


OPENED: list[str] = []
"""Files that Python code opened since the last case began."""


@pytest.fixture(scope="module", autouse=True)
def _record_opened_files() -> None:
    sys.addaudithook(lambda event, args: OPENED.append(str(args[0])) if event == "open" else None)


def write_sound(path: Path, seed: int, form: str = "WAV") -> None:
    """0.5 s of a tone with noise, different for each seed."""
    rng = np.random.default_rng(seed)
    time = np.arange(8_000) / 16_000
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.3 * np.sin(2 * np.pi * (200 + 40 * seed) * time) + rng.normal(0, 0.01, len(time))
    soundfile.write(path, samples, 16_000, format=form)


def clips(folder: Path, form: str = "wav") -> list[str]:
    """Four recordings under `folder`; their names relative to it."""
    names = [f"clips/a_{i}.{form}" for i in range(4)]
    for i, name in enumerate(names):
        write_sound(folder / name, i, form.upper())
    return names


def table(header: str | None, row: str) -> Callable[[Path], Path]:
    """A table of four rows, `row` with {audio}, {stem}, {text} and {speaker} filled in."""

    def build(folder: Path) -> Path:
        values = zip(clips(folder), TEXTS, SPEAKERS, strict=True)
        rows = [row.format(audio=a, stem=Path(a).stem, text=t, speaker=s) for a, t, s in values]
        path = folder / ("metadata.csv" if header is None or "\t" not in header else "validated.tsv")
        path.write_text("\n".join([*([header] if header else []), *rows]) + "\n", encoding="utf-8")
        return path

    return build


def chatml(folder: Path) -> Path:
    """The original pipeline's rows, each with the next clip of its speaker as reference."""
    names = clips(folder)
    rows = []
    for i, text in enumerate(TEXTS):
        other = i ^ 1
        parts = [{"type": "text", "text": TEXTS[other]}, {"type": "audio", "audio_url": names[other]}]
        ask = {"type": "text", "text": f"Please generate speech for given text in reference audio's voice: {text}"}
        answer = [{"type": "text", "text": text}, {"type": "audio", "audio_url": names[i]}]
        messages = [{"role": "user", "content": [*parts, ask]}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "speaker": SPEAKERS[i], "start_index": 1, "misc": {"language": "en"}})
    path = folder / "train.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def swift(folder: Path) -> Path:
    """ms-swift's rows."""
    names = clips(folder)
    path = folder / "train.jsonl"
    turns = [("user", "<audio>" + TEXTS[1]), ("assistant", "<audio>" + TEXTS[0])]
    row = {"messages": [{"role": role, "content": text} for role, text in turns], "audios": [names[1], names[0]]}
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


def rows(folder: Path) -> Path:
    """metadata.json with references, offsets and a text file."""
    names = clips(folder)
    (folder / "clips" / "a_3.txt").write_text(TEXTS[3], encoding="utf-8")
    samples: list[dict[str, Any]] = [
        {"id": f"s{i}", "audio_file": name, "transcript": TEXTS[i], "speaker_id": SPEAKERS[i], "duration": 0.5}
        for i, name in enumerate(names[:3])
    ]
    samples[0] |= {"ref_audio_file": names[1], "ref_transcript": TEXTS[1]}
    samples[2] |= {"offset": 0.05, "duration": 0.4}
    samples.append({"id": "s3", "audio_file": names[3], "transcript_file": "clips/a_3.txt"})
    path = folder / "metadata.json"
    path.write_text(json.dumps({"samples": samples}), encoding="utf-8")
    return path


def tasks(folder: Path) -> Path:
    """Rows of pronunciation data."""
    path = folder / "rows.jsonl"
    target = {"accuracy": 8, "fluency": 7, "prosodic": 7, "total": 8}
    lines = [
        {"audio": name, "text": TEXTS[i], "task": "scores", "target": target, "speaker": SPEAKERS[i], "age": 20}
        for i, name in enumerate(clips(folder))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def kaldi(folder: Path) -> Path:
    """wav.scp, text and utt2spk."""
    values = list(zip(clips(folder), TEXTS, SPEAKERS, strict=True))
    for name, column in (("wav.scp", 0), ("text", 1), ("utt2spk", 2)):
        lines = [f"utt{i} {value[column]}\n" for i, value in enumerate(values)]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


def parquet(folder: Path) -> Path:
    """Rows of {audio: {bytes, path}, text, speaker}."""
    columns = {
        "audio": [{"bytes": (folder / name).read_bytes(), "path": name} for name in clips(folder)],
        "text": list(TEXTS),
        "speaker": list(SPEAKERS),
    }
    path = folder / "data.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def qwen(folder: Path) -> Path:
    """JSONL of {audio, text, ref_audio}."""
    names = clips(folder)
    path = folder / "train.jsonl"
    lines = [json.dumps({"audio": name, "text": TEXTS[i], "ref_audio": names[i ^ 1]}) for i, name in enumerate(names)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def pairs(form: str) -> Callable[[Path], Path]:
    """A folder of recordings with a text beside each."""

    def build(folder: Path) -> Path:
        for name, text in zip(clips(folder, form), TEXTS, strict=True):
            (folder / name).with_suffix(".txt").write_text(text, encoding="utf-8")
        return folder

    return build


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "chatml": chatml,
    "ms-swift": swift,
    "metadata": rows,
    "tasks": tasks,
    "Kaldi": kaldi,
    "parquet": parquet,
    "ref_audio": qwen,
    "wav pairs": pairs("wav"),
    "flac pairs": pairs("flac"),
    "mp3 pairs": pairs("mp3"),
    "LJSpeech": table(None, "{stem}|{text}|{text}"),
    "F5": table("audio_file|text", "{audio}|{text}"),
    "GPT-SoVITS": table(None, "{audio}|{speaker}|en|{text}"),
    "Common Voice": table("client_id\tpath\tsentence\tlocale", "{speaker}\t{audio}\t{text}\ten"),
}


def change_value(rng: random.Random, value: Any) -> Any:
    """JSON with one node replaced, dropped, renamed or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.randrange(8)
        if kind == 0:
            return {k: v for k, v in value.items() if k != key}
        if kind == 1:
            return {(str(rng.choice(ODD_VALUES)) if k == key else k): v for k, v in value.items()}
        return {k: change_value(rng, v) if k == key else v for k, v in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.85:
        i = rng.randrange(len(value))
        if rng.random() < 0.15:
            return value[:i] + value[i:] * 2
        return [*value[:i], change_value(rng, value[i]), *value[i + 1 :]]
    return rng.choice(ODD_VALUES)


def change_bytes(rng: random.Random, data: bytes, span: int) -> bytes:
    """Bytes with one to four edits among the first `span`."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(min(span, len(data)) or 1)
        length = rng.choice((1, 1, 4, 20, 400))
        kind = rng.randrange(5)
        if kind == 0:
            data = data[:at] + bytes(rng.randrange(256) for _ in range(min(length, 20))) + data[at + min(length, 20) :]
        elif kind == 1:
            data = data[:at] + data[at + length :]
        elif kind == 2:
            data = data[:at] + data[at : at + length] * 2 + data[at + length :]
        elif kind == 3:
            data = data[:at] + rng.choice(ODD_BYTES) + data[at:]
        else:
            data = data[:at]
    return data


def damage(rng: random.Random, folder: Path, manifest: Path) -> None:
    """Change the manifest, a text or the head of a recording."""
    texts = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "clips"]
    texts += sorted(folder.glob("clips/*.txt"))
    sounds = sorted(path for path in folder.glob("clips/*") if path.suffix != ".txt")
    if rng.random() < 0.35:
        sound = rng.choice(sounds)
        sound.write_bytes(change_bytes(rng, sound.read_bytes(), 100))
    elif manifest.suffix in (".json", ".jsonl") and rng.random() < 0.6:
        text = manifest.read_text(encoding="utf-8")
        values = json.loads(text) if manifest.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        changed = change_value(rng, values)
        many = manifest.suffix == ".jsonl" and isinstance(changed, list)
        result = "\n".join(json.dumps(row) for row in changed) if many else json.dumps(changed)
        manifest.write_text(result, encoding="utf-8")
    else:
        text_file = rng.choice(texts)
        text_file.write_bytes(change_bytes(rng, text_file.read_bytes(), 2_000))


@pytest.mark.parametrize("group", range(CASES // GROUP))
def test_damaged_inputs_are_issues(tmp_path: Path, group: int) -> None:
    write_sound(tmp_path / "secret.wav", 99)
    intact = {name: build(tmp_path / name) for name, build in LAYOUTS.items()}
    family = cast(Family, RawFamily())
    outcomes = {"issues": 0, "read": 0}
    for seed in range(group * GROUP, (group + 1) * GROUP):
        rng = random.Random(seed)
        name = rng.choice(sorted(LAYOUTS))
        folder = tmp_path / str(seed)
        shutil.copytree(tmp_path / name, folder)
        manifest = folder / intact[name].relative_to(tmp_path / name)
        damage(rng, folder, manifest)
        config = DataConfig(train=manifest, audio_root=folder)
        try:
            with watched(folder):
                try:
                    outcomes["issues"] += bool(validate(manifest, config, deep=True).issues)
                except SpeechtuneError as error:
                    assert str(error).strip()
                    outcomes["issues"] += 1
                try:
                    samples = load_samples(manifest, config)
                    encode_samples(family, samples, tmp_path / "cache", quiet=True)
                    outcomes["read"] += 1
                except SpeechtuneError as error:
                    assert str(error).strip()
        except Exception as error:
            error.add_note(f"seed {seed}, {name}")
            raise
    assert outcomes["issues"] > GROUP / 5, "the damage is too mild to test anything"
    assert outcomes["read"] > GROUP / 20, "the damage is too heavy to reach the encoding"

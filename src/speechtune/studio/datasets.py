"""Data sets in a studio's folder: clips that were dropped or recorded, and `metadata.jsonl` with their transcripts."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from speechtune.audio import file_name
from speechtune.commands.prepare import REPORT
from speechtune.commands.validate import Report, validate
from speechtune.config import DataConfig
from speechtune.data.layouts import find_layout, iterate_rows
from speechtune.data.manifest import read_samples
from speechtune.data.plain_rows import AUDIO, REFERENCE_AUDIO, TEXT, is_clip
from speechtune.data.row_parser import first_name
from speechtune.data.rows import Place
from speechtune.data.sources import find_source
from speechtune.errors import ConfigError, ManifestError, printable
from speechtune.storage.files import write_atomically
from speechtune.studio.processes import run_verb
from speechtune.studio.workspace import Workspace, paths_in

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Utterance:
    """A row of a data set as a page shows it; `clip` is None where the row names none that may be played."""

    number: int
    clip: Path | None
    text: str
    issues: str


def add_files(folder: Path, files: Sequence[Path]) -> None:
    """Copy files into a data set; where they are no data of a known layout, clips get rows, to be filled in.

    Raises ConfigError: two files have one name; ManifestError: neither data nor clips are among them.
    """
    names = _copy(files, folder)
    clips = [{"audio": name, "text": _text_beside(folder / name)} for name in names if is_clip(name)]
    if not (folder / METADATA).is_file():
        try:
            find_layout(Place(folder))
            return
        except ManifestError:
            if not clips:
                raise
    _add_rows(folder, clips)


def _copy(files: Sequence[Path], folder: Path) -> list[str]:
    names = [file_name(file.name) for file in files]
    taken = [name for name in names if names.count(name) > 1 or (folder / name).exists()]
    if taken:
        raise ConfigError(f"{folder.name}: there is a file {taken[0]!r} already: rename one, or begin another data set")
    folder.mkdir(parents=True, exist_ok=True)
    for file, name in zip(files, names, strict=True):
        shutil.copyfile(file, folder / name)
    return names


def add_recording(folder: Path, recording: Path | None, sentence: str) -> None:
    """Add a recording of a sentence to a data set, as `recording-N` with the ending it has.

    Raises ConfigError: nothing was recorded.
    """
    if recording is None:
        raise ConfigError("record the sentence first")
    number = next(number for number in count(1) if not any(folder.glob(f"recording-{number}.*")))
    folder.mkdir(parents=True, exist_ok=True)
    named = folder / f"recording-{number}{recording.suffix}"
    if any(folder.iterdir()) and not (folder / METADATA).is_file():
        take_rows(folder, folder)  # metadata.jsonl counts before all else in a folder
    shutil.copyfile(recording, named)
    _add_rows(folder, [{"audio": named.name, "text": sentence}])


def _add_rows(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    metadata = folder / METADATA
    write_atomically(metadata, (metadata.read_bytes() if metadata.is_file() else b"") + _lines(rows))


def _text_beside(clip: Path) -> str:
    beside = clip.with_suffix(".txt")
    return beside.read_text(encoding="utf-8", errors="replace").strip() if beside.is_file() else ""


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(errors="backslashreplace")


def import_rows(source: Path, folder: Path) -> None:
    """Begin a data set with the rows of data that lie elsewhere, which are not copied and stay as they are.

    Raises ConfigError: there is a data set of that name, or as `take_rows`.
    """
    if folder.exists():
        raise ConfigError(f"{folder.name}: there is a data set of that name: choose another")
    take_rows(source, folder)


def correct(folder: Path, texts: Mapping[int, str], workspace: Workspace) -> None:
    """Keep transcripts as a page shows them; rows whose transcript is as it was are not touched.

    Raises ConfigError: as `take_rows`.
    """
    shown = {row.number: row.text for row in utterances(folder, None, workspace)}
    changed = {number: text for number, text in texts.items() if number in shown and text != shown[number]}
    if changed:
        take_rows(folder, folder, changed)


def take_rows(source: Path, folder: Path, texts: Mapping[int, str] | None = None) -> None:
    """Write the rows of some data as a data set's `metadata.jsonl`; clips stay where they are.

    `source` may be the data set itself: `texts` are transcripts that replace those of rows, by number.

    Raises ConfigError: rows that are no plain rows of a clip and a text, so that nothing can be replaced in them.
    """
    root = _root(source)
    rows = []
    for row in iterate_rows(Place(source)):
        value = row.value
        if not isinstance(value, dict) or value.keys().isdisjoint(AUDIO):
            raise ConfigError(f"{row.source}: no plain row of a clip and its text: correct it in that file")
        moved = {key: _placed(value[key], root, folder) for key in {*AUDIO, *REFERENCE_AUDIO} & value.keys()}
        value = value | moved
        if texts and row.number in texts:
            value[first_name(value, TEXT) or "text"] = texts[row.number]
        try:
            json.dumps(value)
        except TypeError:
            raise ConfigError(f"{row.source}: holds its clip: only rows that name a file can be changed here") from None
        rows.append(value)
    write_atomically(folder / METADATA, _lines(rows))


def _placed(clip: object, root: Path, folder: Path) -> object:
    """A clip's place as seen from the folder of the data set."""
    if not isinstance(clip, str) or "://" in clip or root == folder:
        return clip
    return str(root / clip)


def prepare(
    name: str,
    recordings: Sequence[Path],
    place: str,
    workspace: Workspace,
    *,
    asr: str,
    language: str,
    script: Path | None,
) -> tuple[str, str]:
    """Cut raw recordings into a new data set as `speechtune prepare` does; the verdict in lines, and its report.

    Recordings that were dropped are kept beside the data set; others stay at the `place` that was typed.

    Raises SpeechtuneError: as the verb.
    """
    out = workspace.place("data", name)
    if recordings:
        source = workspace.place("recordings", name)
        _copy(recordings, source)
    elif place:
        source = workspace.readable(place)
    else:
        raise ConfigError("drop recordings, or type where they lie")
    for path in paths_in(asr):
        workspace.readable(path)
    arguments = ["prepare", str(source), "--out", str(out), "--asr", asr]
    arguments += ["--language", language] if language else []
    arguments += ["--script", str(workspace.readable(script))] if script else []
    found = run_verb(workspace.directory, *arguments)
    seconds = ", ".join(f"{what} {value / 60:.1f} min" for what, value in found["seconds"].items())
    lines = [f"**{found['verdict']}**: {found['seconds_given'] / 60:.1f} minutes given; {seconds}", *found["problems"]]
    return "\n\n".join(lines), (out / REPORT).read_text(encoding="utf-8")


def check(path: Path, workspace: Workspace) -> Report:
    """What `speechtune validate` finds; clips that lie where the studio must not read are issues, and not opened.

    Raises ManifestError: there is no data of a known layout.
    """
    return validate(path, DataConfig(audio_root=workspace.roots), deep=True)


def utterances(path: Path, report: Report | None, workspace: Workspace) -> list[Utterance]:
    """The rows of a data set, with the issues of each that a report has, for listening and correcting.

    Pronunciation data have labels besides, and give no rows here.
    """
    if find_source(path) is not None:
        return []
    issues: dict[int, list[str]] = {}
    for issue in report.issues if report else ():
        issues.setdefault(issue.row, []).append(issue.message)
    samples = {sample.row: sample for sample in read_samples(path, DataConfig(audio_root=workspace.roots)).samples}
    found = []
    for row in iterate_rows(Place(path)):
        sample = samples.get(row.number)
        if sample is not None:
            text, clip = sample.text, sample.audio.path if sample.audio else None
        else:
            value = row.value if isinstance(row.value, dict) else {}
            text, clip = str(value.get(first_name(value, TEXT) or "", "")), _clip_of(value, path, workspace)
        playable = Path(clip) if clip and Path(clip).is_file() else None
        found.append(Utterance(row.number, playable, printable(text), "; ".join(issues.get(row.number, []))))
    return found


def _clip_of(value: Mapping[str, Any], path: Path, workspace: Workspace) -> Path | None:
    """The clip of a row that gives no sample, where it may be read."""
    name = first_name(value, AUDIO)
    if name is None or not isinstance(value[name], str):
        return None
    try:
        return workspace.readable(_root(path) / value[name])
    except ConfigError:
        return None


def _root(path: Path) -> Path:
    """The folder that paths in the rows of some data start from."""
    _, place = find_layout(Place(path))
    return place.path if place.path.is_dir() else place.path.parent


def statistics_rows(report: Report) -> list[tuple[str, str]]:
    """Statistics as names and values."""
    rows = []
    for name, value in report.statistics.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{key}: {item}" for key, item in value.items() if item)
        rows.append((name.replace("_", " "), str(value)))
    return rows

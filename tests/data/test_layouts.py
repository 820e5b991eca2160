"""Layouts: each one of docs/data.md is read from its example, and what cannot be read says what to change."""

import base64
import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow
import pytest
import soundfile
from pyarrow import ipc, parquet

from speechtune.config import DataConfig
from speechtune.data.layouts import LAYOUTS, find_layout
from speechtune.data.manifest import load_samples, read_samples
from speechtune.data.plain_rows import AUDIO, REFERENCE_AUDIO, REFERENCE_TEXT, TEXT
from speechtune.data.prompts import read_prompts, read_recordings
from speechtune.data.row_parser import LANGUAGE, SPEAKER
from speechtune.data.rows import Place
from speechtune.data.sources import find_source
from speechtune.data.sources import load_samples as load_any
from speechtune.errors import Issue, ManifestError
from speechtune.types import Sample

DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
CLIP = re.compile(r"[\w/.-]+\.(?:wav|flac|mp3|opus)\b")
DEFAULT = DataConfig()


def sound(path: Path, seconds: float = 0.5) -> Path:
    """A clip of noise that differs by its name, in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([*path.name.encode()]).normal(0, 0.1, round(seconds * 16000)).astype(np.float32)
    ogg = {".opus": {"format": "OGG", "subtype": "OPUS"}, ".ogg": {"format": "OGG", "subtype": "VORBIS"}}
    soundfile.write(path, noise, 16000, **ogg.get(path.suffix, {}))
    return path


def write(folder: Path, files: Mapping[str, str], *clips: str) -> Path:
    for clip in clips:
        sound(folder / clip)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    return folder


def jsonl(*rows: Mapping[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_arrow(path: Path, *rows: Mapping[str, Any]) -> Path:
    """Rows as parquet, or as `Dataset.save_to_disk` writes them; clips named in them become bytes."""
    values = [dict(row) for row in rows]
    for value in values:
        value["audio"] = {"bytes": sound(path.parent / value["audio"]["path"]).read_bytes(), **value["audio"]}
    table = pyarrow.Table.from_pylist(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table)
    return path


def samples(path: Path, split: Any = "train", **options: Any) -> list[Sample]:
    result = read_samples(path, DataConfig(**options), split)
    assert result.issues == [], list(map(str, result.issues))
    return result.samples


def only(path: Path) -> Issue:
    (issue,) = read_samples(path, DEFAULT).issues
    return issue


def refusal(path: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        read_samples(path, DEFAULT)
    return str(caught.value)


# ---- the table of the documentation


def documented() -> list[list[str]]:
    lines = DOCS[DOCS.index("| what people have |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize(("what", "layout", "example"), documented(), ids=[row[0][:40] for row in documented()])
def test_every_documented_layout_is_read_from_its_example(tmp_path: Path, what: str, layout: str, example: str) -> None:
    """Guards against layouts refused with a generic list, which almost every newcomer's were."""
    files = dict(re.findall(r"`([^`]+)`: `([^`]+)`", example))
    alone = re.findall(r"`([^`]+)`", re.sub(r"`[^`]+`: `[^`]+`", "", example))
    folder = tmp_path / "corpus"
    assert files
    for name, content in files.items():
        if name.endswith((".parquet", ".arrow")):
            write_arrow(folder / name, json.loads(content))
            continue
        if not content.startswith("{"):
            content = content.replace("\\t", "\t").replace("\\n", "\n")
        write(
            folder, {name: content + "\n"}, *([] if alone else {clip for clip in CLIP.findall(content)} - {"x/a.mp3"})
        )
    write(folder, {}, *alone)
    if layout == "Speechocean762":
        found = find_source(folder)
        assert found is not None and found.format == "folder"
    else:
        assert find_layout(Place(folder))[0].name == layout
    (sample,) = load_any(folder / "train.jsonl" if '"task"' in example else folder, DEFAULT)
    assert (sample.pronunciation is not None) == ('"task"' in example or layout == "Speechocean762")
    assert re.fullmatch(r"hello( there)?(, one)?\.?", sample.text.lower())
    assert sample.audio is not None
    if any(name.startswith("anna") or "anna" in content for name, content in files.items()):
        assert sample.speaker == "anna"
    if "b.wav" in example:
        (reference,) = sample.references
        assert (Path(str(reference.audio)).name, reference.text) == ("b.wav", "One.")
    if len(files) == 1 and not alone:  # a manifest by its own name gives the same
        (again,) = load_any(folder / next(iter(files)), DEFAULT)
        assert (again.text, again.audio, again.speaker) == (sample.text, sample.audio, sample.speaker)


def test_the_documentation_names_every_layout() -> None:
    assert {row[1] for row in documented()} == {layout.name for layout in LAYOUTS} | {"Speechocean762"}


@pytest.mark.parametrize("names", [AUDIO, TEXT, REFERENCE_AUDIO, REFERENCE_TEXT, SPEAKER, LANGUAGE])
def test_the_documentation_names_every_key(names: tuple[str, ...]) -> None:
    assert f"| {', '.join(f'`{name}`' for name in names)} |" in DOCS


# ---- rows


@pytest.mark.parametrize("key", AUDIO)
@pytest.mark.parametrize("text", TEXT)
def test_every_key_is_read(tmp_path: Path, key: str, text: str) -> None:
    write(tmp_path, {"a.jsonl": jsonl({key: "a.wav", text: "Hello."})}, "a.wav")
    (sample,) = samples(tmp_path / "a.jsonl")
    assert (sample.text, str(sample.audio)) == ("Hello.", str(tmp_path / "a.wav"))


def test_references_of_rows(tmp_path: Path) -> None:
    """A reference without text gets that of the row whose clip it is; without such a row it is kept, and counted."""
    rows = [
        {"audio": "a.wav", "text": "A.", "ref_audio": "b.wav"},
        {"audio": "b.wav", "text": "B.", "reference": "c.wav", "reference_text": "C."},
        {"audio": "d.wav", "text": "D.", "prompt_wav": "e.wav"},
    ]
    write(tmp_path, {"a.jsonl": jsonl(*rows)}, *(f"{name}.wav" for name in "abcde"))
    result = read_samples(tmp_path / "a.jsonl", DEFAULT)
    found = [(Path(str(clip.audio)).name, clip.text) for one in result.samples for clip in one.references]
    assert found == [("b.wav", "B."), ("c.wav", "C."), ("e.wav", "")]
    (note,) = result.notes
    assert "1 sample(s) whose reference has no text" in note and "a-3" in note


def part(style: str, path: Path) -> dict[str, Any]:
    data = base64.b64encode(path.read_bytes()).decode()
    return {
        "audio": {"type": "audio", "audio": path.name},
        "path": {"type": "audio", "path": path.name},
        "url": {"type": "audio", "url": path.name},
        "openai": {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}},
        "vllm": {"type": "audio_url", "audio_url": {"url": f"data:audio/wav;base64,{data}"}},
        "data uri": {"type": "audio", "audio_url": f"data:audio/wav;base64,{data}"},
        "qwen": {"audio": path.name},
        "datasets": {"type": "audio", "audio": {"bytes": None, "path": path.name}},
    }[style]


@pytest.mark.parametrize("style", ["audio", "path", "url", "openai", "vllm", "data uri", "qwen", "datasets"])
def test_audio_parts_of_chats(tmp_path: Path, style: str) -> None:
    write(tmp_path, {}, "a.wav", "b.wav")
    user = [{"type": "text", "text": "One."}, part(style, tmp_path / "b.wav"), {"type": "text", "text": "Hello."}]
    answer = [{"text": "Hello."}, part(style, tmp_path / "a.wav")]
    row = {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}
    write(tmp_path, {"a.jsonl": jsonl(row)})
    (sample,) = load_samples(tmp_path / "a.jsonl", DEFAULT)
    clips = [sample.audio, *(clip.audio for clip in sample.references)]
    contents = [clip.data or Path(str(clip.path)).read_bytes() for clip in clips if clip is not None]
    assert contents == [(tmp_path / name).read_bytes() for name in ("a.wav", "b.wav")]
    assert (sample.text, sample.references[0].text) == ("Hello.", "One.")


def test_query_and_response_with_history_and_system(tmp_path: Path) -> None:
    row = {
        "query": "Hello.",
        "response": "<audio>",
        "history": [["One.", "<audio>"]],
        "system": "Speak.",
        "audios": ["b.wav", "a.wav"],
    }
    write(tmp_path, {"a.jsonl": jsonl(row)}, "a.wav", "b.wav")
    (sample,) = samples(tmp_path / "a.jsonl")
    assert (sample.text, sample.system, [clip.text for clip in sample.references]) == ("Hello.", "Speak.", ["One."])


@pytest.mark.parametrize(
    "row", [{"query": "x", "response": "<audio>"}, {"conversations": [{"from": "gpt", "value": "<audio>"}]}]
)
def test_a_tag_without_a_clip_is_an_issue(tmp_path: Path, row: dict[str, Any]) -> None:
    """Guards against `<audio>` read as a word of the text where 'audios' is missing."""
    write(tmp_path, {"a.jsonl": jsonl(row)})
    assert (only(tmp_path / "a.jsonl").code, "1 <audio> tag(s)" in only(tmp_path / "a.jsonl").message) == (
        "audio_count",
        True,
    )


@pytest.mark.parametrize(
    "odd", [{"conversations": 5}, {"conversations": [5]}, {"query": 1, "response": 2, "history": 3}]
)
def test_odd_chats_are_issues(tmp_path: Path, odd: dict[str, Any]) -> None:
    write(tmp_path, {"a.jsonl": jsonl(odd)})
    assert read_samples(tmp_path / "a.jsonl", DEFAULT).issues


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"snd": "x/a.wav", "words": "Hello."}, "rename 'snd' to 'audio' and 'words' to 'text'"),
        ({"snd": {"bytes": "", "path": "a"}, "text": "Hello."}, "rename 'snd' to 'audio';"),
        (
            {"audio": "a.wav", "words": "Hello there.", "who": "x"},
            "expected 'transcript_file' or 'text'; rename 'words' to 'text'",
        ),
        ({}, "expected 'messages', or 'audio' and 'text'; its keys: none"),
        ({"rows": [{"audio": "a.wav"}], "n": 1}, "rename 'rows' to 'samples' if it holds the rows"),
        ({"u1": {"audio": "a.wav"}, "u2": {}}, "write its values as a list"),
    ],
)
def test_unknown_keys_are_told_how_to_be_named(tmp_path: Path, row: dict[str, Any], advice: str) -> None:
    write(tmp_path, {"a.jsonl": jsonl(row)}, "a.wav")
    assert advice in only(tmp_path / "a.jsonl").message


# ---- tables and lists


@pytest.mark.parametrize(
    ("lines", "text", "speaker", "language"),
    [
        ("a.wav|Hi there\nb.wav|So", "Hi there", None, None),
        ("a.wav|Hi 2|Hi two\nb.wav|No|No", "Hi two", None, None),
        ("a.wav|Hi|Hi\nb.wav|No|No", "Hi", None, None),
        ("a.wav|Hi there|7\nb.wav|So|8", "Hi there", "7", None),
        ("a.wav|7|Hi there\nb.wav|8|So", "Hi there", "7", None),
        ("a.wav|Hi 2|Hi two|1.5\nb.wav|So|So|2", "Hi two", None, None),
        ("a.wav|anna|ZH|Hi there\nb.wav|anna|ZH|So", "Hi there", "anna", "ZH"),
        ("a.wav|anna|ZH|Hi there|HH AY|1 2|2 1\nb.wav|anna|ZH|So|S|1|1", "Hi there", "anna", "ZH"),
        ('a.wav\tHi, "there"\nb.wav\tSo', 'Hi, "there"', None, None),
        ('a.wav,"Hi, there"\nb.wav,So', "Hi, there", None, None),
    ],
)
def test_columns_of_lists(tmp_path: Path, lines: str, text: str, speaker: str | None, language: str | None) -> None:
    write(tmp_path, {"x.list": lines}, "a.wav", "b.wav")
    first, second = samples(tmp_path / "x.list")
    assert (first.text, first.speaker, first.language) == (text, speaker, language)
    assert second.text in ("So", "No") and [one.source for one in (first, second)] == [
        f"{tmp_path}/x.list:{n}" for n in (1, 2)
    ]


def test_texts_of_tables_are_kept(tmp_path: Path) -> None:
    """Quotes belong to the text where no CSV is written; a field of CSV may hold commas, quotes and line ends."""
    write(tmp_path, {"a.tsv": '\n\npath\tsentence\na.wav\t"Hi," he said\n\nb.wav\t"So\n'}, "a.wav", "b.wav")
    assert [(one.text, one.row, one.source[-1]) for one in samples(tmp_path / "a.tsv")] == [
        ('"Hi," he said', 1, "4"),
        ('"So', 2, "6"),
    ]
    write(tmp_path, {"b.csv": 'Audio;Text;duration\na.wav;"Hi; ""you""\nthere";0.5\nb.wav;So;\n'})
    first, second = samples(tmp_path / "b.csv")
    assert (first.text, first.declared_seconds, second.source) == ('Hi; "you"\nthere', (0.5,), f"{tmp_path}/b.csv:4")


def test_a_table_whose_clips_are_called_by_id(tmp_path: Path) -> None:
    """Guards against LJSpeech's metadata with a header line, which was refused for want of a column of clips."""
    write(tmp_path, {"metadata.csv": "id|text|normalized_text\nLJ-1|Dr. A|Doctor A\n"}, "wavs/LJ-1.wav")
    (one,) = samples(tmp_path)
    assert (one.text, one.audio and one.audio.path) == ("Doctor A", f"{tmp_path}/wavs/LJ-1.wav")
    write(tmp_path, {"other.csv": "id|text\nnowhere|Hi\n"})
    assert only(tmp_path / "other.csv").code == "unknown_format"


def test_broken_tables(tmp_path: Path) -> None:
    """Guards against an open quote that swallows the rows behind it, and a bar in a text that shifts the columns."""
    write(tmp_path, {"a.csv": 'audio,text\na.wav,Hi\nb.wav,"So\na.wav,No\n'}, "a.wav", "b.wav")
    assert (only(tmp_path / "a.csv").code, only(tmp_path / "a.csv").source) == (
        "unreadable_rest",
        f"{tmp_path}/a.csv:3",
    )
    write(tmp_path, {"b.csv": "a.wav|Hi\nb.wav|So|what\n"})
    assert (only(tmp_path / "b.csv").code, "3 fields, but 2 columns" in only(tmp_path / "b.csv").message) == (
        "bad_row",
        True,
    )
    write(tmp_path, {"c.csv": "audio,text\nnone.wav,Hi\n,So\na.wav,\n"})
    found = read_samples(tmp_path / "c.csv", DEFAULT)
    assert [issue.code for issue in found.issues] == ["missing_audio", "empty_text"]
    (tmp_path / "d.csv").write_bytes(b"audio,text\na.wav,caf\xe9\n")
    assert only(tmp_path / "d.csv").code == "bad_unicode"


def test_clips_of_tables_stay_within_the_root(tmp_path: Path) -> None:
    folder = write(tmp_path / "in", {"a.csv": "audio|text\n../secret.wav|Hi\n"}, "../secret.wav")
    result = read_samples(folder / "a.csv", DataConfig(audio_root=folder))
    assert [issue.code for issue in result.issues] == ["outside_root"]


# ---- folders


def test_what_systems_leave_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "Hi.", "._a.txt": "\0", "._a.wav": "\0", ".DS_Store": "\0", "Thumbs.db": "x"}, "a.wav")
    write(
        tmp_path,
        {"__MACOSX/b.txt": "x", ".ipynb_checkpoints/a.txt": "Hi."},
        "__MACOSX/b.wav",
        ".ipynb_checkpoints/a.wav",
    )
    result = read_samples(tmp_path, DEFAULT)
    assert (result.num_rows, result.issues, [one.text for one in result.samples]) == (1, [], ["Hi."])
    write(tmp_path / "p", {".x.parquet": "x", "._a.csv": "x"})
    write_arrow(tmp_path / "p" / "a.parquet", {"audio": {"path": "a.wav"}, "text": "Hi."})
    assert len(samples(tmp_path / "p")) == 1


def test_pairs_of_many_endings(tmp_path: Path) -> None:
    endings = ["wav", "flac", "mp3", "ogg", "opus", "aiff", "WAV"]
    write(tmp_path, {f"{n}.txt": f"Text {n}." for n in range(7)}, *(f"{n}.{end}" for n, end in enumerate(endings)))
    assert [one.text for one in load_samples(tmp_path, DEFAULT)] == [f"Text {n}." for n in range(7)]


def test_a_clip_to_be_converted_is_named_and_gives_way_to_its_copy(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "Hi.", "a.m4a": "\0\0\0\x20ftypM4A "})
    with pytest.raises(ManifestError, match="convert it: ffmpeg -i"):
        load_samples(tmp_path, DEFAULT)
    sound(tmp_path / "a.wav")
    assert [str(one.audio) for one in load_samples(tmp_path, DEFAULT)] == [str(tmp_path / "a.wav")]


def test_corpora_of_readers(tmp_path: Path) -> None:
    """The speaker of LibriSpeech is the reader, not the chapter; VCTK's second microphone is no second sample."""
    libri = write(
        tmp_path / "l",
        {"84/121/84-121.trans.txt": "84-121-0 HI\n84-121-1 SO\n"},
        "84/121/84-121-0.flac",
        "84/121/84-121-1.flac",
    )
    assert [(one.id, one.text, one.speaker, len(one.references)) for one in samples(libri)] == [
        ("84/121/84-121-0", "HI", "84", 1),
        ("84/121/84-121-1", "SO", "84", 1),
    ]
    vctk = write(tmp_path / "v", {"txt/p1/p1_1.txt": "Hi."}, "wav48/p1/p1_1_mic1.flac", "wav48/p1/p1_1_mic2.flac")
    assert [(one.speaker, Path(str(one.audio)).name) for one in samples(vctk)] == [("p1", "p1_1_mic1.flac")]
    write(vctk, {"txt/p1/p1_2.txt": "So."}, "wav48/p1/p1_3_mic1.flac")
    assert [issue.code for issue in read_samples(vctk, DEFAULT).issues] == ["missing_audio", "missing_text"]
    write(tmp_path / "e", {"a.json": "[1]"}, "a.mp3")
    assert only(tmp_path / "e").code == "invalid_json"
    write(tmp_path / "h", {"a.lab": "0 50000 sil\n50000 90000 hh\n"}, "a.wav")
    assert (only(tmp_path / "h").code, "times" in only(tmp_path / "h").message) == ("bad_transcript", True)


def test_kaldi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"wav.scp": "r1 wav/a.wav\nr2 sox x |\n", "text": "u1 Hi there\nu2 So\nu3 No\n", "utt2spk": "u1 anna\n"}
    data = write(tmp_path / "data", {**files, "segments": "u1 r1 0.1 0.4\nu2 r2 0 1\nu4 r1 0 1\n"})
    sound(tmp_path / "wav/a.wav")
    monkeypatch.chdir(tmp_path)
    result = read_samples(data, DEFAULT)
    (sample,) = result.samples
    assert sample.audio is not None and sample.audio.path == str(tmp_path / "wav/a.wav")
    assert (sample.id, sample.text, sample.speaker) == ("u1", "Hi there", "anna")
    assert (sample.audio.offset_seconds, round(sample.audio.duration_seconds or 0, 6)) == (0.1, 0.3)
    assert [(issue.sample_id, issue.code) for issue in result.issues] == [
        ("u2", "bad_path"),
        ("data-3", "missing_audio"),
        ("data-4", "missing_text"),
    ]


def test_an_unreadable_folder_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against clips that are missing in silence, as os.walk passes over what it cannot list."""
    write(tmp_path, {"a/a.txt": "Hi.", "b/b.txt": "So."}, "a/a.wav", "b/b.wav")
    import os

    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert refusal(tmp_path) == f"{tmp_path}/b: cannot be read: Permission denied"


# ---- parquet and Arrow


def test_splits_of_voices(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_arrow(tmp_path / "p/data" / f"{split}-0.parquet", {"audio": {"path": "a.wav"}, "text": split})
        write_arrow(tmp_path / "s" / split / "data-0.arrow", {"audio": {"path": "a.wav"}, "text": split})
        write(tmp_path / "f", {f"{split}/metadata.csv": f"file_name,text\na.wav,{split}\n"}, f"{split}/a.wav")
        write(
            tmp_path / "c",
            {f"{split}.tsv": f"path\tsentence\na.wav\t{split}\n", "validated.tsv": "path\tsentence\n"},
            "clips/a.wav",
        )
    for folder in "psfc":
        for split in ("train", "test"):
            assert [one.text for one in load_any(tmp_path / folder, DEFAULT, default_split=split)] == [split]
            if folder != "c":
                assert [one.text for one in load_any(tmp_path / folder / split, DEFAULT)] == [split]
    assert read_samples(tmp_path / "c", DEFAULT).notes[0] == "of this folder train.tsv is read"


def test_clips_in_parquet_are_not_copied_into_quarantine(tmp_path: Path) -> None:
    rows = [{"audio": {"path": f"{n}.wav"}, "text": "" if n else "Hi."} for n in range(2)]
    path = write_arrow(tmp_path / "own.parquet", *rows)
    config = DataConfig(on_error="quarantine", quarantine_limit=0.5)
    assert len(load_any(path, config, tmp_path / "run")) == 1
    (line,) = (tmp_path / "run" / "quarantine-own.jsonl").read_text().splitlines()
    assert json.loads(line)["content"]["audio"]["bytes"].endswith(" bytes>") and len(line) < 1000


def test_what_does_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_arrow(tmp_path / "own.parquet", {"audio": {"path": "a.wav"}, "text": "Hi."})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 100})())
    assert "would be read into memory" in refusal(path)


# ---- what cannot be read


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        target.writestr("a", "b")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"snd,words\nx/1.wav,Hello\n", "rename 'snd' to 'audio' and 'words' to 'text'"),
        ("a.csv", b"Hello|a.wav\n", "the clip comes first in a line"),
        ("a.zip", archive(), "a zip archive: unpack it, and name the folder"),
        ("a.xlsx", archive(), "a spreadsheet: save it as CSV"),
        ("a.tar", b"\0" * 257 + b"ustar" + b"\0" * 300, "a tar archive: unpack it"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x\n", "a Git LFS pointer"),
        ("a.csv", "audio,text\na.wav,Hi\n".encode("utf-16"), "UTF-16 text: save it as UTF-8"),
        ("a.wav", b"RIFF....", "a clip, not data"),
    ],
)
def test_files_that_cannot_be_read_say_what_helps(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path / name)


def test_folders_that_cannot_be_read_say_what_helps(tmp_path: Path) -> None:
    assert "holds neither metadata.json nor any other data file" in refusal(tmp_path)
    sound(tmp_path / "a.wav")
    write(tmp_path, {"config.json": '{"rate": 16000}', "README.txt": "Read me, please", "b.csv": "id,text\n1,Hi\n"})
    assert "no audio file has a .txt or .lab of the same name" in refusal(tmp_path)
    write(tmp_path, {"x.jsonl": jsonl({"audio": "a.wav", "text": "Hi."}), "y.csv": "audio,text\na.wav,Hi\n"})
    assert "name the data file in it that is meant, such as x.jsonl, y.csv" in refusal(tmp_path)


# ---- prompts and recordings


def test_prompts_and_recordings_go_by_the_same_names(tmp_path: Path) -> None:
    write(tmp_path, {"p.csv": "id,text,ref_audio,ref_text\n1,Hello.,b.wav,One.\n"}, "a.wav", "b.wav")
    write(tmp_path, {"p.jsonl": jsonl({"text": "Hello.", "ref_audio": "b.wav", "ref_text": "One."})})
    for name in ("p.csv", "p.jsonl"):
        (prompt,) = read_prompts(tmp_path / name, DEFAULT)
        assert (prompt.audio, prompt.text, prompt.references[0].text) == (None, "Hello.", "One.")
    write(tmp_path, {"r.jsonl": jsonl({"file_name": "a.wav"}, {"audio_filepath": "b.wav", "text": "So."})})
    assert [one.text for one in read_recordings(tmp_path / "r.jsonl", DEFAULT)] == ["", "So."]

"""Rows of folders: clips with a text beside each, or in a folder beside; tables of Kaldi."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from speechtune.data.plain_rows import AUDIO_SUFFIXES, is_clip
from speechtune.data.rows import Place, Row
from speechtune.errors import ManifestError

_TEXT_ENDINGS = {".normalized.txt": 0, ".original.txt": 3, ".txt": 1, ".lab": 2, ".json": 4}
"""Endings of the files of texts, the longer first; of several beside one clip the lowest number is read."""
_TRANSCRIPTS = ".trans.txt"  # of LibriSpeech: a line an utterance
_TEXT_FOLDERS = ("txt", "text", "texts", "transcripts")
_SECOND_MICROPHONE, _FIRST_MICROPHONE = "_mic2", "_mic1"  # of VCTK: one utterance twice
_LIBRI = re.compile(r"(\d+)[-_](\d+)[-_]")


class _Found:
    """The clips and the texts under a folder by their path without ending."""

    def __init__(self) -> None:
        self.clips: dict[str, list[str]] = {}
        self.texts: dict[str, tuple[int, str]] = {}
        self.spoken: dict[str, str] = {}

    def add(self, folder: Path, base: Path) -> "_Found":
        """Add the files of a tree; keys are relative to it, paths to `base`."""
        for place, names in walk(folder):
            for name in names:
                path = os.path.join(place, name)
                if name.endswith(_TRANSCRIPTS):
                    self._read_transcripts(place, path, folder)
                elif is_clip(name) and not os.path.splitext(name)[0].endswith(_SECOND_MICROPHONE):
                    key = os.path.splitext(path)[0].removesuffix(_FIRST_MICROPHONE)
                    self.clips.setdefault(key, []).append(os.path.relpath(folder / path, base))
                elif ending := next((end for end in _TEXT_ENDINGS if name.lower().endswith(end)), None):
                    text = (_TEXT_ENDINGS[ending], os.path.relpath(folder / path, base))
                    key = path[: -len(ending)]
                    self.texts[key] = min(self.texts.get(key, text), text)
        return self

    def _read_transcripts(self, place: str, path: str, folder: Path) -> None:
        for line in (folder / path).read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n"):
            key, _, text = line.strip().partition(" ")
            if key:
                self.spoken[os.path.join(place, key)] = text

    def rows(self, folder: Path) -> Iterator[Row]:
        """A row for each clip, and for each text without one where clips lie."""
        spoken = {os.path.dirname(key) for key in self.clips}
        alone = {key for key, (rank, _) in self.texts.items() if rank < 4 and os.path.dirname(key) in spoken}
        keys = self.clips.keys() | {key for key in alone if not _is_note(key)}
        for number, key in enumerate(sorted(keys), 1):
            yield self._row(folder, number, key)

    def _row(self, folder: Path, number: int, key: str) -> Row:
        clips = self.clips.get(key, [])
        clips = [clip for clip in clips if clip.lower().endswith(AUDIO_SUFFIXES)] or clips
        rank, text = self.texts.get(key, (-1, ""))
        value: dict[str, Any] = {"id": key, "speaker_id": _speaker(key) or folder.resolve().name}
        value |= {"audio_file": clips[0]} if clips else {}
        source = f"{folder / (text or (clips or [key])[0])}:1"
        if key in self.spoken:
            value["text"] = self.spoken[key]
        elif text.endswith(".json"):
            try:
                described = json.loads((folder / text).read_text(encoding="utf-8-sig"))
                value |= dict(described, audio_file=clips[0] if clips else None)
            except (OSError, ValueError, TypeError, RecursionError) as error:
                return Row(number, source, None, "invalid_json", f"not a JSON object: {error}", json.dumps(value))
        elif text:
            value["transcript_file"] = text
        if len(clips) > 1:
            code, reason = "duplicate_audio", f"several audio files belong to the text {key}.txt; keep one"
        elif not clips:
            code, reason = "missing_audio", f"no {' or '.join(AUDIO_SUFFIXES)} of the same name beside this text"
        elif rank < 0 and key not in self.spoken:
            code, reason = "missing_text", "no .txt of the same name beside it"
        else:
            return Row(number, source, value)
        return Row(number, source, None, code, reason, json.dumps(value))


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder of a tree, relative to it ("" for itself), and its files; what systems leave is passed over."""

    def stop(error: OSError) -> None:
        # os.walk would pass over the folder, and its clips would be missing in silence
        raise ManifestError(f"{error.filename}: cannot be read: {error.strerror}")

    for place, folders, files in os.walk(folder, onerror=stop):
        folders[:] = sorted(name for name in folders if not _is_left_behind(name))
        relative = os.path.relpath(place, folder)
        yield "" if relative == "." else relative, sorted(name for name in files if not _is_left_behind(name))


def _is_left_behind(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def is_pairs(place: Place) -> bool:
    """Whether some folder of a tree holds a clip with a text beside it."""
    for _, names in walk(place.path) if place.path.is_dir() else ():
        if any(name.endswith(_TRANSCRIPTS) for name in names):
            return True
        clips = {os.path.splitext(name)[0] for name in names if is_clip(name)}
        if clips and any(
            name.lower().endswith(end) and name[: -len(end)] in clips for end in _TEXT_ENDINGS for name in names
        ):
            return True
    return False


def pair_rows(place: Place) -> Iterator[Row]:
    """Clips with a text of the same name beside each, or with LibriSpeech's transcripts; speaker = parent folder."""
    return _Found().add(place.path, place.path).rows(place.path)


def text_folder(place: Place) -> Path | None:
    """The folder of texts of a folder that keeps clips and texts apart, as VCTK does."""
    if not place.path.is_dir():
        return None
    return next((path for name in _TEXT_FOLDERS if (path := place.path / name).is_dir()), None)


def parallel_rows(place: Place) -> Iterator[Row]:
    """Clips in one folder, texts in another, under the same names; of VCTK's two microphones the first is taken."""
    found = _Found()
    for tree in sorted(place.path.iterdir()):
        if tree.is_dir() and not _is_left_behind(tree.name):
            found.add(tree, place.path)
    return found.rows(place.path)


def is_kaldi(place: Place) -> bool:
    """Whether a folder is a data directory of Kaldi."""
    return all((place.path / name).is_file() for name in ("wav.scp", "text"))


def kaldi_rows(place: Place) -> Iterator[Row]:
    """Rows of `text`, with the clip of `wav.scp` (cut by `segments`) and the speaker of `utt2spk`."""
    folder = place.path
    names = ("wav.scp", "segments", "utt2spk")
    clips, segments, speakers = ({key: value for _, key, value in _lines(folder / name)} for name in names)
    number, spoken = 0, set[str]()
    for number, (line, key, text) in enumerate(_lines(folder / "text"), 1):
        spoken.add(key)
        source = f"{folder / 'text'}:{line}"
        recording, *span = (segments.get(key) or key).split()
        clip = clips.get(recording, "")
        value: dict[str, Any] = {"id": key, "text": text, "speaker": speakers.get(key)}
        try:
            start, end = map(float, span or (0, 0))
        except ValueError:
            yield Row(number, source, None, "bad_row", "segments: expected recording, start and end in seconds")
            continue
        if clip:
            here = not os.path.isfile(folder / clip) and os.path.isfile(clip)  # as Kaldi looks for it
            value["audio_file"] = os.path.abspath(clip) if here else clip
            yield Row(number, source, value | ({"offset": start, "duration": end - start} if span else {}))
        else:
            reason = f"wav.scp has no line for {recording!r}"
            yield Row(number, source, None, "missing_audio", reason, json.dumps(value))
    for more, key in enumerate(sorted((segments or clips).keys() - spoken), 1):
        yield Row(number + more, f"{folder / 'text'}:1", None, "missing_text", f"text has no line for {key!r}")


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, key and value of each line of a table of Kaldi."""
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n"), 1):
        key, *rest = line.split(None, 1) or [""]
        if key:
            yield number, key, rest[0].strip() if rest else ""


def _speaker(key: str) -> str:
    """The folder of a clip, or the reader of LibriSpeech's reader/chapter/reader-chapter-number."""
    folder, name = os.path.split(key)
    libri = _LIBRI.match(name)
    return libri[1] if libri and os.path.basename(folder) == libri[2] else folder


def _is_note(key: str) -> bool:
    return os.path.basename(key).lower() in ("readme", "license", "licence")

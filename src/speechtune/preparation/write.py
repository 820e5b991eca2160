"""The folder of data: clips, manifest, ChatML for training and evaluation, and what was rejected."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml

from speechtune.preparation.cut import Piece
from speechtune.preparation.prepared import CLIPS, Prepared
from speechtune.preparation.results import Progress
from speechtune.preparation.selection import KeptClip, chat_row, choose_references
from speechtune.storage.files import write_atomically

MANIFEST, TRAIN, TEST, REJECTED = "manifest.jsonl", "train.jsonl", "test.jsonl", "rejected.jsonl"
SETTINGS = "prepare.yaml"


def write_data(prepared: Prepared, progress: Progress) -> None:
    """Write clips and files of data; clips of an earlier run that are not kept any more are removed."""
    request, findings = prepared.request, prepared.findings
    out, config = request.out, request.config
    by_id = {piece.id: piece for piece in findings.pieces.values()}
    references = choose_references(prepared.clips, prepared.held, config.select)
    speaker = request.speaker or config.speakers.voice
    (out / CLIPS).mkdir(parents=True, exist_ok=True)
    for number, clip in enumerate(prepared.clips):
        _link(request.piece_file(by_id[clip.id]), out / clip.audio)
        progress("clips", number + 1, len(prepared.clips))
    wanted = {os.path.basename(clip.audio) for clip in prepared.clips}
    for path in (out / CLIPS).iterdir():
        if path.name not in wanted and path.is_file():
            path.unlink()
    rows = {clip.id: chat_row(clip, references[clip.id], speaker) for clip in prepared.clips}
    _write_rows(out / MANIFEST, (_manifest_row(prepared, by_id[c.id], c, references[c.id]) for c in prepared.clips))
    _write_rows(out / TRAIN, (row for name, row in rows.items() if name not in prepared.held))
    _write_rows(out / TEST, (row for name, row in rows.items() if name in prepared.held))
    _write_rows(out / REJECTED, _rejected_rows(prepared))
    settings = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_atomically(out / SETTINGS, settings.encode())


def _link(source: Path, target: Path) -> None:
    """Put a file at a second place, without a second copy where the disk allows."""
    if target.exists() and target.samefile(source):
        return
    aside = target.with_name(f".{target.name}")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, aside)
    aside.replace(target)


def _write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _measures(prepared: Prepared, piece: Piece) -> dict[str, object]:
    """What the steps found of a piece, as the rows of clips and of rejected pieces give it."""
    findings, key = prepared.findings, piece.key
    rows: dict[str, object] = {"source": piece.source, "start": piece.start, "end": piece.end}
    scores: dict[str, object] = {}
    if key in findings.quality:
        scores |= findings.quality[key].model_dump() | findings.loudness[key].model_dump()
    if (voice := findings.voices.get(key)) is not None:
        scores |= {"voice": voice.name, "voice_similarity": voice.similarity, "halves_similarity": voice.halves}
    if (transcript := findings.transcripts.get(key)) is not None:
        rows["transcript"] = transcript.text
        scores["confidence"] = transcript.confidence
    if (match := findings.match(key)) is not None:
        scores["script_errors"] = round(match.errors, 4)
        rows["script_lines"] = [line + 1 for line in match.lines]
    return rows | {"scores": scores}


def _manifest_row(prepared: Prepared, piece: Piece, clip: KeptClip, reference: KeptClip | None) -> dict[str, object]:
    return {
        "id": clip.id,
        "audio": clip.audio,
        "text": clip.text,
        "speaker": prepared.request.speaker or prepared.request.config.speakers.voice,
        "language": clip.language,
        "duration": round(clip.seconds, 4),
        **_measures(prepared, piece),
        "decisions": {
            "split": "test" if clip.id in prepared.held else "train",
            "reference": reference.id if reference else None,
            "text": "script" if prepared.findings.match(piece.key) else "recogniser",
        },
    }


def _rejected_rows(prepared: Prepared) -> Iterable[dict[str, object]]:
    """A row for each piece, stretch and line of the script that is not kept, with its reasons."""
    findings = prepared.findings
    for recording in prepared.recordings:
        for stretch in prepared.activities[recording.digest].stretches:
            place = {"source": recording.name, "start": stretch.start, "end": stretch.end}
            yield {**place, "reason": stretch.kind, "messages": [f"{stretch.kind} between speech"]}
        for key, piece in findings.pieces.items():
            if piece.source == recording.name and (against := prepared.reasons[key]):
                messages = [f"{reason.code}: {reason.message}" for reason in against]
                yield {"id": piece.id, **_measures(prepared, piece), "reason": against[0].code, "messages": messages}
    script = prepared.request.script
    for line in findings.script.missing if findings.script else ():
        yield {"script_line": line + 1, "text": script[line], "reason": "not_spoken", "messages": ["no clip says it"]}

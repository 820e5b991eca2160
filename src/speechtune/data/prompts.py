"""Rows that ask for something: what is to be spoken and in whose voice, or which recording is to be assessed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from speechtune.audio import InvalidAudioError, audio_info
from speechtune.config import DataConfig
from speechtune.data.chatml import chat_messages
from speechtune.data.layouts import iterate_rows
from speechtune.data.plain_rows import AUDIO, REFERENCE_AUDIO, REFERENCE_TEXT, TEXT, read_row
from speechtune.data.quarantine import require_valid
from speechtune.data.row_parser import Context, first_name, read_rows
from speechtune.data.rows import Place, Row
from speechtune.errors import ManifestError
from speechtune.types import AudioRef, Clip, Sample


def read_prompts(path: Path, config: DataConfig) -> list[Sample]:
    """Read rows {"id"?, "text", "reference"?, "reference_text"?, "system"?, "scene"?}, or a training manifest's rows.

    Raises ManifestError: every issue, with file and line.
    """

    def read(context: Context) -> Sample | None:
        value = context.row.value
        has_clip = chat_messages(value) is not None or not value.keys().isdisjoint(AUDIO)
        return read_row(context) if has_clip or value.keys().isdisjoint(TEXT) else _prompt(context)

    return require_valid(path, read_rows(path, iterate_rows(Place(path)), config, read))


def read_recordings(path: Path, config: DataConfig) -> list[Sample]:
    """Read rows {"audio", "text"?, "id"?, "offset"?, "duration"?}, or a training manifest's rows with their targets.

    Raises ManifestError: every issue, with file and line.
    """

    def read(context: Context) -> Sample | None:
        value = context.row.value
        has_text = first_name(value, (*TEXT, "transcript_file")) or chat_messages(value) is not None
        return read_row(context) if has_text else _recording(context)

    return require_valid(path, read_rows(path, iterate_rows(Place(path)), config, read))


def _recording(context: Context) -> Sample:
    row = context.row
    audio, declared = context.audio(row.value, AUDIO) or (None, None)
    seconds = () if declared is None else (declared,)
    return Sample(context.sample_id, "", audio, source=row.source, row=row.number, declared_seconds=seconds)


def _prompt(context: Context) -> Sample:
    value, row = context.row.value, context.row
    text = context.text(context.optional_text(value, *TEXT) or "", "the text")
    references = []
    if first_name(value, REFERENCE_AUDIO):
        named = context.audio(value, REFERENCE_AUDIO)
        spoken = context.text(context.optional_text(value, *REFERENCE_TEXT) or "", "the reference's text")
        references = [] if named is None else [Clip(named[0], spoken)]
    system, scene = context.optional_text(value, "system"), context.optional_text(value, "scene")
    sample = Sample(context.sample_id, text, None, tuple(references), system, scene)
    return replace(sample, source=row.source, row=row.number)


FIELDS = "utt|prompt_text|prompt_wav|target_text, with |target_wav where there is a recording of the target"
LANGUAGES = frozenset({"en", "zh"})
"""Folders of seed-tts-eval's test sets, named by language."""


def read_seed_list(path: Path, config: DataConfig | None = None, language: str | None = None) -> list[Sample]:
    """Read a list of seed-tts-eval; wavs are named relative to it. A missing wav is an issue, not left out as there.

    Args:
        path: the list, such as `en/meta.lst`.
        config: `audio_root` confines the wavs.
        language: of the texts; None takes the folder's name where that is "en" or "zh".

    Raises ManifestError: every issue, with file and line.
    """
    folder = path.resolve().parent.name
    if language is None and folder in LANGUAGES:
        language = folder

    def read(context: Context) -> Sample | None:
        sample = _seed_sample(context)
        return sample and replace(sample, language=language)

    return require_valid(path, read_rows(path, _seed_rows(path), config or DataConfig(), read))


def _seed_rows(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_bytes().decode("utf-8-sig", errors="surrogateescape").split("\n")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            fields = [part.strip() for part in line.split("|")]
            yield Row(number, f"{path}:{number}", {"id": fields[0], "fields": fields})


def _seed_sample(context: Context) -> Sample | None:
    fields, row = context.row.value["fields"], context.row
    if len(fields) not in (4, 5) or not fields[0]:
        context.issue("bad_row", f"{len(fields)} fields; expected {FIELDS}")
        return None
    prompt_text, prompt_wav, text, *target = fields[1:]
    reference, *targets = [_existing_clip(context, place) for place in (prompt_wav, *target)]
    context.text(prompt_text, "the prompt's text")
    context.text(text, "the target's text")
    if reference is None:
        return None
    clips = (Clip(reference, prompt_text),)
    return Sample(context.sample_id, text, next(iter(targets), None), clips, source=row.source, row=row.number)


def _existing_clip(context: Context, place: str) -> AudioRef | None:
    if (path := context.path(place)) is None:
        return None
    ref = AudioRef(path)
    try:
        audio_info(ref)
    except InvalidAudioError as error:
        context.issue(error.code, str(error))
    return ref

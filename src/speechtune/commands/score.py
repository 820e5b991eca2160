"""The verb `score`: pronunciation of recordings."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from speechtune.commands import check_output, print_json, require_words, wide_console
from speechtune.config import DataConfig
from speechtune.data.prompts import read_recordings
from speechtune.data.quarantine import require_valid
from speechtune.data.sources import find_source, read_source
from speechtune.errors import ConfigError, printable
from speechtune.inference.load import open_adapter
from speechtune.inference.score import Score, assessor, check_recordings, log, score_samples
from speechtune.tasks.pronunciation.alignment import pronunciation_dictionary
from speechtune.tasks.pronunciation.targets import canonical_phones
from speechtune.types import AudioRef, Sample

_SHOWN = 20  # scores printed where they are also written to a file


def read_requests(audio: Sequence[Path], text: str | None, manifest: Path | None) -> list[Sample]:
    """Recordings to score: files with at most one common text, or the rows of a manifest; every clip is decoded."""
    if bool(audio) == (manifest is not None):
        raise ConfigError("name audio files, or one manifest with --manifest")
    if manifest is None:
        require_words("--text", text)
        samples = [
            Sample(printable(str(path)), text or "", AudioRef(str(path)), source=str(path), row=number)
            for number, path in enumerate(audio, 1)
        ]
        return check_recordings("the command line", samples)
    if text is not None:
        raise ConfigError("--text goes with audio files; a manifest names its own texts")
    if (source := find_source(manifest)) is None:
        return check_recordings(str(manifest), read_recordings(manifest, DataConfig()))
    found = read_source(source, None if source.format == "jsonl" else source.split or "test", DataConfig())
    samples = check_recordings(str(manifest), require_valid(manifest, found))
    asked: dict[object, Sample] = {}
    for sample in samples:  # JSONL may ask for both tasks of a clip, and both are answered anyway
        labels = sample.pronunciation
        asked.setdefault((sample.audio, sample.text) if labels and labels.task else sample.id, sample)
    return list(asked.values())


def print_score(score: Score, console: Console) -> None:
    """Print one recording's scores; mispronounced phones, as canonical>predicted, stand out."""
    console.print(Text(score.audio), soft_wrap=True)
    table = Table(show_header=False)
    for name, value in score.scores.items():
        table.add_row(name, f"{value:g}")
    if score.transcript is not None:
        table.add_row("transcript", Text(score.transcript))
    if score.phones:
        table.add_row("phones", Text(" ".join(score.phones)))
    for word in score.words:
        shown = Text()
        for pair in word.phones:
            mark = pair.predicted if pair.correct else f"{pair.canonical or '+'}>{pair.predicted or '-'}"
            shown.append(f"{mark} ", style="" if pair.correct else "bold red")
        table.add_row(Text(word.text, style="bold red" if word.mispronounced else ""), shown)
    if score.unknown_words:
        table.add_row("not in the dictionary", Text(" ".join(score.unknown_words)))
    if not score.complete:
        table.add_row("incomplete", "an answer was cut off or could not be read; see `raw` with --json")
    console.print(table)


def run_score(
    audio: Sequence[Path],
    text: str | None,
    manifest: Path | None,
    *,
    model: str | None,
    adapter: Path | None,
    model_options: Mapping[str, str],
    out: Path | None,
    cache_dir: Path,
    batch_size: int,
    max_new_tokens: int | None,
    as_json: bool,
) -> int:
    """Score recordings, print them, and write JSONL to `out`; 0."""
    if out is not None:
        check_output(out, folder=False)
    samples = read_requests(audio, text, manifest)
    if any(sample.text and canonical_phones(sample) is None for sample in samples):
        pronunciation_dictionary()  # a missing package is reported before hours of answering
    _, family, loaded = assessor(model, open_adapter(adapter) if adapter else None, model_options)
    scores = score_samples(family, loaded, samples, cache_dir, batch_size=batch_size, max_tokens=max_new_tokens)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(score.to_json(), ensure_ascii=False) + "\n" for score in scores]
        # half of a surrogate pair in an answer is no UTF-8; as "\\udXXX" it is still JSON
        out.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
        log.info("%d scores written to %s", len(scores), out)
    if as_json:
        print_json({"scores": [score.to_json() for score in scores]})
    elif out is None or len(scores) <= _SHOWN:
        for score in scores:
            print_score(score, wide_console())
    return 0

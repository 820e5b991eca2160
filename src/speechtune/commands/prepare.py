"""The verb `prepare`: recordings -> clips with texts, ready for training, and a verdict."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from speechtune.commands import check_output, print_json, wide_console
from speechtune.config import apply_override, build_config, load_config
from speechtune.errors import ConfigError
from speechtune.preparation.activity import load_detector
from speechtune.preparation.prepare import prepare
from speechtune.preparation.prepared import Request
from speechtune.preparation.report import minutes_table, page
from speechtune.preparation.script import read_script
from speechtune.preparation.settings import INSTALL, PrepareConfig
from speechtune.preparation.summary import Summary, summarise
from speechtune.preparation.transcribe import check_language
from speechtune.storage.files import write_atomically
from speechtune.tasks.pronunciation.alignment import pronunciation_dictionary
from speechtune.tasks.voice_cloning.scorers import load_scorers
from speechtune.tasks.voice_cloning.support import need
from speechtune.tasks.voice_cloning.word_errors import language_code

log = logging.getLogger("speechtune")

REPORT = "report.html"
SHOWN = 10


def run_prepare(
    recordings: Path,
    overrides: Sequence[str],
    *,
    out: Path,
    config: Path | None,
    script: Path | None,
    asr: str | None,
    language: str | None,
    speaker: str | None,
    as_json: bool,
) -> int:
    """Prepare recordings, and print what came of them; 0 for GO, 1 for NO-GO."""
    overrides = [*overrides, *([f"transcribe.asr={asr}"] if asr else [])]
    check_output(out, folder=True)
    request = make_request(
        recordings, out, read_config(config, overrides), script=script, language=language, speaker=speaker
    )
    columns = (TextColumn("{task.description:12}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=as_json) as bar:
        tasks: dict[str, Any] = {}

        def show(step: str, done: float, total: float) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step)
            bar.update(tasks[step], completed=done, total=total)

        prepared = prepare(request, show)
    summary = summarise(prepared)
    write_atomically(out / REPORT, page(prepared, summary).encode(errors="replace"))
    if as_json:
        print_json({"out": str(out), "verdict": summary.verdict, **asdict(summary)})
    else:
        print_summary(summary, out)
    return 1 if summary.problems else 0


def read_config(path: Path | None, overrides: Sequence[str]) -> PrepareConfig:
    """The defaults, or those of a YAML file, with dotted overrides."""
    if path is not None:
        return load_config(path, overrides, lambda _: PrepareConfig)
    values: dict[str, Any] = {}
    issues = [issue for override in overrides if (issue := apply_override(values, override)) is not None]
    return build_config(values, "speechtune prepare", PrepareConfig, issues)


def make_request(
    recordings: Path,
    out: Path,
    config: PrepareConfig,
    *,
    script: Path | None,
    language: str | None,
    speaker: str | None,
) -> Request:
    """Load all that the steps need, so that what is missing is told before work begins."""
    if config.transcribe.asr is None:
        what = "no recogniser is named; for example --asr faster-whisper:FOLDER_OR_ID or --asr pocketsphinx"
        raise ConfigError(f"{what} ({INSTALL})")
    for module in ("pyloudnorm", "rapidfuzz", "scipy"):
        need(module, "speechtune prepare", INSTALL)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorers = load_scorers(config.transcribe.asr, config.speakers.encoder, config.quality.mos, device=device)
    assert scorers.asr is not None
    language = language_code(language)
    check_language(scorers.asr, language)
    if language in (None, "en"):
        pronunciation_dictionary()
    lines = read_script(script) if script else ()
    detector = load_detector(config.activity)
    if config.activity.detector == "energy":
        log.warning("activity.detector=energy takes every sound for speech that is louder than the room")
    return Request(
        recordings, out, config, scorers.asr, detector, scorers.speaker, scorers.mos, lines, language, speaker
    )


def print_summary(summary: Summary, out: Path) -> None:
    """Print the verdict and what became of the minutes."""
    console = wide_console()
    header, *rows = minutes_table(summary)
    table = Table(*header)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for problem in summary.problems:
        console.print(Text(problem), style="red")
    if summary.missing_lines:
        more = " ..." if len(summary.missing_lines) > SHOWN else ""
        shown = ", ".join(map(str, summary.missing_lines[:SHOWN])) + more
        console.print(f"lines of the script that no clip says: {shown}")
    console.print(Text(f"{summary.verdict}: {out / REPORT}; train with data.train={out} data.eval={out}"), style="bold")

"""Pronunciation of single recordings, with the scores kept so that progress shows."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from speechtune.commands.demo import DEFAULTS
from speechtune.commands.score import read_requests
from speechtune.errors import ConfigError
from speechtune.family import Family
from speechtune.inference.load import load_model, open_adapter
from speechtune.inference.score import Score, assessor, score_samples
from speechtune.studio.form import DEMO, start_from
from speechtune.studio.workspace import Workspace

HISTORY_NAME = "history.jsonl"
EMBEDDED = "the embedded model: random weights, its scores mean nothing"
EMBEDDED_START = DEMO + DEFAULTS["pronunciation"]
MAX_NEW_TOKENS = 160  # of the embedded model, which does not know when to stop

Shown = list[tuple[str, str | None]]
"""Pieces of text, each with the kind that gives it a colour."""


def assess(recording: Path | None, text: str, run: str | None, workspace: Workspace) -> Score:
    """Score a recording by a run's adapter, or by the embedded model, and add the scores to the history.

    Raises SpeechtuneError: as `speechtune score`.
    """
    if recording is None:
        raise ConfigError("record the sentence, or drop a file")
    samples = read_requests([workspace.readable(recording)], text.strip() or None, None)
    family, model = _load(run or EMBEDDED, workspace)
    longest = None if run else MAX_NEW_TOKENS
    (score,) = score_samples(family, model, samples, workspace.directory / "cache", max_tokens=longest)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    row = {"time": now, "run": run or EMBEDDED, "text": text, "transcript": score.transcript, "scores": score.scores}
    path = workspace.directory / "pronunciation" / HISTORY_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return score


@lru_cache(maxsize=1)
def _load(run: str, workspace: Workspace) -> tuple[Family, nn.Module]:
    if run == EMBEDDED:
        return load_model(start_from(EMBEDDED_START, workspace), None, ability="assess pronunciation")
    _, family, model = assessor(None, open_adapter(workspace.run(run)))
    return family, model


def history(workspace: Workspace) -> list[Mapping[str, Any]]:
    """All scores so far, the oldest first."""
    path = workspace.directory / "pronunciation" / HISTORY_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def in_colour(score: Score) -> Shown:
    """Phones word by word: as the text asks, replaced (canonical>said), left out or put in; without a text as said."""
    if not score.words:
        return [(phone, None) for phone in score.phones]
    pieces: Shown = []
    for word in score.words:
        pieces.append((f"{word.text}:", None))
        for pair in word.phones:
            if pair.correct:
                pieces.append((str(pair.predicted), "right"))
            elif pair.predicted is None:
                pieces.append((str(pair.canonical), "left out"))
            elif pair.canonical is None:
                pieces.append((pair.predicted, "put in"))
            else:
                pieces.append((f"{pair.canonical}>{pair.predicted}", "replaced"))
    return pieces

"""The page on prepared recordings: verdict, minutes by reason, quality, coverage, and what to record next."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from speechtune import __version__
from speechtune.preparation.coverage import WANTED
from speechtune.preparation.prepared import Prepared
from speechtune.preparation.summary import Summary
from speechtune.report.facts import time_of
from speechtune.report.render import ASSETS, TEMPLATES
from speechtune.report.sections import Block, Section

BINS = 10
MAX_ROWS = 200  # of a table; the files beside the page hold all
WORDS = {
    "train": "kept for training",
    "test": "kept for evaluation",
    "silence": "pauses",
    "noise": "noise",
    "tone": "tones, music",
    "too_short": "too short",
    "too_long": "too long, without a pause",
    "other_voice": "another voice",
    "two_voices": "two voices in one piece",
    "clipped": "clipped",
    "noisy": "noise under the speech",
    "low_mos": "low predicted quality",
    "no_words": "no words",
    "low_confidence": "recogniser not sure",
    "script_mismatch": "not as in the script",
    "speech_rate": "too fast or too slow for its text",
    "duplicate": "said before",
}


class Histogram(NamedTuple):
    """How many clips, kept and rejected, lie in each range of a measure; `highest` is the fullest range's number."""

    title: str
    bins: Sequence[tuple[str, int, int]]
    highest: int


def page(prepared: Prepared, summary: Summary) -> str:
    """The page; it loads nothing from anywhere."""
    kept = summary.seconds.get("train", 0.0) + summary.seconds.get("test", 0.0)
    headline = [
        ("recorded", time_of(summary.seconds_given)),
        ("kept", time_of(kept)),
        ("clips for training", str(summary.counts.get("train", 0))),
        ("clips for evaluation", str(summary.counts.get("test", 0))),
    ]
    return TEMPLATES.get_template("preparation.html").render(
        name=prepared.request.recordings.resolve().name,
        problems=summary.problems,
        headline=headline,
        parts=[section for section in _sections(prepared, summary) if section.blocks],
        histograms=list(_histograms(prepared)),
        style=(ASSETS / "report.css").read_text(encoding="utf-8"),
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def minutes_table(summary: Summary) -> list[tuple[str, ...]]:
    """What became of the recordings: a row of names, then a row each with pieces, time and share."""
    rows: list[tuple[str, ...]] = [("what", "pieces", "time", "share")]
    for name, seconds in sorted(summary.seconds.items(), key=lambda item: -item[1]):
        share = seconds / max(summary.seconds_given, 1e-9)
        rows.append((WORDS[name], str(summary.counts.get(name, "-")), time_of(seconds), f"{share:.1%}"))
    return rows


def _sections(prepared: Prepared, summary: Summary) -> Iterator[Section]:
    coverage = summary.coverage
    yield Section("minutes", "Minutes kept of minutes given", [Block("table", minutes_table(summary))])
    yield Section("estimate", "What this amount gives", [Block("note", summary.estimate)])
    voices = [("voice", "speaks"), *((name, time_of(value)) for name, value in summary.voices.items())]
    ask = Block("note", "Another voice is taken with speakers.voice=voice-2. Voices are never mixed.")
    yield Section("voices", "Voices", [Block("table", voices), ask] if summary.voices else [])
    yield Section("script", "Where script and speech differ", _script_blocks(prepared, summary))
    if coverage.counts:
        columns = [(coverage.unit, "times"), *((unit, str(count)) for unit, count in coverage.counts.items())]
        blocks = [Block("table", list(zip(*columns, strict=True)))]
        if coverage.unknown:
            blocks.append(Block("note", f"Not in the dictionary: {', '.join(coverage.unknown[:MAX_ROWS])}"))
        yield Section("coverage", f"The {coverage.unit} of the texts", blocks)
    nothing = Block("note", "Nothing is rare.")
    if coverage.unit == "characters":
        nothing = Block("note", "The project's own list is in English alone: no sentences for this language.")
    what = f"Sentences of the project's own list with the phones that stand less than {WANTED} times in the texts"
    rare = Block("note", f"{what} ({' '.join(coverage.rare)}):")
    following = [rare, Block("list", coverage.next_sentences)] if coverage.next_sentences else [nothing]
    yield Section("next", "What to record next", following)
    with_what = [*summary.scorers.items(), *((f"language of {name}", one) for name, one in summary.languages.items())]
    yield Section("scorers", "What measured it", [Block("facts", with_what[:MAX_ROWS])])


def _script_blocks(prepared: Prepared, summary: Summary) -> list[Block]:
    findings = prepared.findings
    blocks: list[Block] = []
    if summary.missing_lines:
        lines = [f"line {line}: {prepared.request.script[line - 1]}" for line in summary.missing_lines]
        blocks += [Block("note", "Lines that no clip says:"), Block("list", lines[:MAX_ROWS])]
    rows = [
        (findings.pieces[key].id, "rejected" if prepared.reasons[key] else "kept", match.text, transcript.text)
        for key, transcript in findings.transcripts.items()
        if (match := findings.match(key)) is not None and match.errors > 0
    ]
    if rows:
        blocks.append(Block("table", [("piece", "", "script", "recogniser"), *rows[:MAX_ROWS]]))
    return blocks


def _histograms(prepared: Prepared) -> Iterator[Histogram]:
    findings = prepared.findings
    measures = {
        "predicted opinion score": {key: one.mos for key, one in findings.quality.items()},
        "speech over noise, dB": {key: one.snr_db for key, one in findings.quality.items()},
        "loudness as recorded, LUFS": {key: one.lufs for key, one in findings.loudness.items()},
        "recogniser's confidence": {key: one.confidence for key, one in findings.transcripts.items()},
        "cosine to the voice": {key: one.similarity for key, one in findings.voices.items()},
        "length, s": {key: findings.pieces[key].seconds for key in findings.quality},
    }
    for title, by_key in measures.items():
        values = {key: float(value) for key, value in by_key.items() if value is not None}
        if not values:
            continue
        edges = np.histogram_bin_edges(list(values.values()), BINS)
        parts = [
            [value for key, value in values.items() if bool(prepared.reasons[key]) is bad] for bad in (False, True)
        ]
        kept, rejected = (np.histogram(part, edges)[0] for part in parts)
        labels = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges)]
        bins = [(label, int(a), int(b)) for label, a, b in zip(labels, kept, rejected, strict=True)]
        yield Histogram(title, bins, int((kept + rejected).max()))

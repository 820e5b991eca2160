"""The part of a report to listen to: per prompt the reference, the base and every evaluation, with mel pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from speechtune.report_audio import MAX_CLIP_SECONDS, AudioBudget, Picture, spread
from speechtune.report_data import Clip, Prompt, RunReport, number
from speechtune.report_facts import figure

MAX_PROMPTS = 60
"""Prompts on a page; the first ones are shown."""
ALWAYS_SHOWN = 4  # reference, base, best, last; what is between is folded

CLIP_SCORES = {"wer": "WER", "per": "PER", "sim": "similarity", "mos": "MOS", "duration_ratio": "duration ×"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One clip of one run on the page; the smaller `rank`, the earlier it gets a place."""

    label: str
    clip: Clip
    rank: int


def listening(reports: Sequence[RunReport], budget: AudioBudget) -> str:
    """Players and mel pictures; prompts that runs share stand together."""
    prompts: dict[tuple[str, str], tuple[Prompt, list[Cell]]] = {}
    for report in reports:
        for prompt in report.prompts:
            _, cells = prompts.setdefault((prompt.id, prompt.text), (prompt, []))
            cells += _cells(report, prompt, len(reports) > 1, bool(cells))
    shown = list(prompts.values())[:MAX_PROMPTS]
    if not shown:
        return "<p>No samples were kept: <code>samples/prompts.jsonl</code> is not there or empty.</p>"
    wanted = sorted(((cell.rank, n, cell) for n, (_, cells) in enumerate(shown) for cell in cells), key=lambda w: w[:2])
    pictures = {cell.clip.path: budget.picture(cell.clip.path) for _, _, cell in wanted if cell.clip.path is not None}
    longest = max((p.duration_seconds for p in pictures.values() if p), default=1.0)
    cards = [_card(prompt, cells, pictures, min(longest, MAX_CLIP_SECONDS)) for prompt, cells in shown]
    return _notes(budget, len(prompts), any(pictures.values())) + "".join(cards)


def _cells(report: RunReport, prompt: Prompt, several: bool, has_reference: bool) -> list[Cell]:
    steps = [clip.step for clip in prompt.clips if clip.step is not None]
    order = spread(steps, report.best_step)
    cells = []
    for clip in prompt.clips:
        if clip.step is None:
            if not has_reference:
                cells.append(Cell("reference", clip, 0))
            continue
        label = "base, zero-shot" if clip.step == 0 else f"step {clip.step:,}"
        if clip.step == report.best_step:
            label += " (best)"
        cells.append(Cell(f"{report.name}: {label}" if several else label, clip, 1 + order.index(clip.step)))
    return cells


def _notes(budget: AudioBudget, num_prompts: int, any_sound: bool) -> str:
    lines = []
    if any_sound:
        lines.append(
            f"The clips are re-encoded to fit this page: mono, MP3, at most {MAX_CLIP_SECONDS:.0f} s each and "
            f"{budget.limit / 2**20:.0f} MiB together (here {budget.used / 2**20:.1f} MiB). Judge fine differences by "
            "the files in samples/. Mel pictures of a page share one time scale."
        )
    if num_prompts > MAX_PROMPTS:
        lines.append(f"Only the first {MAX_PROMPTS} of {num_prompts} prompts are shown.")
    if budget.left_out:
        lines.append(f"{len(budget.left_out)} clip(s) did not fit any more; their cells name the files.")
    lines += budget.broken[:5]
    if len(budget.broken) > 5:
        lines.append(f"{len(budget.broken) - 5} more clips cannot be read.")
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)


def _card(prompt: Prompt, cells: Sequence[Cell], pictures: Mapping[Path, Picture | None], seconds: float) -> str:
    about = ", ".join(part for part in (prompt.speaker, prompt.language) if part)
    first = [cell for cell in cells if cell.rank < ALWAYS_SHOWN]
    rest = [cell for cell in cells if cell.rank >= ALWAYS_SHOWN]
    more = ""
    if rest:
        more = (
            f"<details><summary>{len(rest)} further evaluation(s)</summary>{_grid(rest, pictures, seconds)}</details>"
        )
    content = _grid(first, pictures, seconds) if cells else "<p>Nothing was recorded or generated for it.</p>"
    return (
        f'<article class="prompt"><h3 dir="auto">{escape(prompt.text or prompt.id)}</h3>'
        f'<p class="note">{escape(prompt.id)}{escape(" · " + about if about else "")}</p>{content}{more}</article>'
    )


def _grid(cells: Sequence[Cell], pictures: Mapping[Path, Picture | None], seconds: float) -> str:
    return f'<div class="clips">{"".join(_clip(cell, pictures, seconds) for cell in cells)}</div>'


def _clip(cell: Cell, pictures: Mapping[Path, Picture | None], seconds: float) -> str:
    parts = [f"<h4>{escape(cell.label)}</h4>"]
    path = cell.clip.path
    picture = pictures.get(path) if path is not None else None
    label = escape(cell.label, quote=True)
    if picture is not None:
        width = min(100.0, 100 * min(picture.duration_seconds, MAX_CLIP_SECONDS) / seconds)
        parts.append(
            f'<div class="mel"><img src="{picture.mel}" alt="mel picture, {label}" style="width:{width:.1f}%">'
        )
        parts.append(f'</div><audio controls preload="metadata" src="{picture.sound}" title="{label}"></audio>')
        if picture.cut:
            parts.append(f"<p>first {MAX_CLIP_SECONDS:.0f} s of {picture.duration_seconds:.0f} s</p>")
    elif path is not None:
        parts.append(f"<p>not on this page: <code>{escape(str(path))}</code></p>")
    elif cell.clip.scores.get("heard") is None:  # an answer in text needs no player
        parts.append("<p>no audio kept</p>")
    return f'<div class="clip">{"".join(parts)}{_scores(cell.clip.scores)}</div>'


def _scores(scores: Mapping[str, Any]) -> str:
    shown = [
        f"{label} {figure(scores[name], 3)}" for name, label in CLIP_SCORES.items() if scores.get(name) is not None
    ]
    if number(scores.get("seconds")) is not None:
        shown.append(f"{figure(scores['seconds'], 3)} s")
    if scores.get("stopped") is False:
        shown.append("did not stop by itself")
    lines = [", ".join(shown)] if shown else []
    if scores.get("heard") is not None:
        lines.append(f"heard: {scores['heard']}")
    return "".join(f'<p dir="auto">{escape(line)}</p>' for line in lines)

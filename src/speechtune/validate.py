"""The verb `validate`: all faults of a manifest and what it holds, as tables or JSON."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from speechtune.config import DataConfig
from speechtune.families.base import AudioRef, Sample
from speechtune.manifest import Fault, Progress, check_audio, read_samples

DURATION_EDGES_SECONDS = (0, 1, 2, 5, 10, 15, 20, 30, 60)
"""Lower edges of the duration histogram; the last bin is open."""

_FAULTS_SHOWN = 50
_GROUPS_SHOWN = 20
_SCRIPT_NAMES = {"CJK": "Chinese characters", "HIRAGANA": "Japanese", "KATAKANA": "Japanese", "HANGUL": "Korean"}


@dataclass(frozen=True, slots=True)
class Report:
    """What `validate` found; `faults` empty means that training accepts the manifest."""

    path: Path
    faults: list[Fault]
    statistics: dict[str, Any]
    notes: list[str]

    def to_json(self) -> str:
        """The report as one JSON object with all faults."""
        values = {
            "path": str(self.path),
            "faults": [asdict(fault) for fault in self.faults],
            "statistics": self.statistics,
            "notes": self.notes,
        }
        return json.dumps(values, ensure_ascii=False, indent=2)


def validate(path: Path, config: DataConfig, deep: bool = False, progress: Progress | None = None) -> Report:
    """Read a manifest and check its audio: headers, or with `deep` every decoded sample.

    Raises:
        ManifestError: there is no such file, or it is of no known layout.
    """
    result = read_samples(path, config)
    check = check_audio(result.samples, config, deep, progress)
    faults = sorted(result.faults + check.faults, key=lambda fault: fault.row)
    notes = list(result.notes)
    urls = {ref for sample in result.samples for ref in _clips(sample) if ref.url is not None}
    if urls and not deep:
        notes.append(f"{len(urls)} clip(s) given as URL were not fetched; a deep check fetches them")
    bad_rows = {fault.row for fault in faults}
    sound = [sample for sample in result.samples if sample.extra["row"] not in bad_rows]
    return Report(path, faults, statistics(sound, check.durations) | {"num_rows": result.num_rows}, notes)


def statistics(samples: Sequence[Sample], durations: Mapping[AudioRef, float]) -> dict[str, Any]:
    """Counts, hours, speakers, languages and the duration histogram of the targets.

    `durations` in seconds, from `check_audio`; a target that is not in it counts as unknown.
    """
    seconds = [durations[s.audio] for s in samples if s.audio is not None and s.audio in durations]
    histogram = Counter(max(edge for edge in DURATION_EDGES_SECONDS if edge <= value) for value in seconds)
    return {
        "num_samples": len(samples),
        "hours": round(sum(seconds) / 3600, 4),
        "unknown_durations": len(samples) - len(seconds),
        "with_reference": sum(bool(sample.references) for sample in samples),
        "without_reference": sum(not sample.references for sample in samples),
        "speakers": dict(Counter(sample.speaker or "(not given)" for sample in samples).most_common()),
        "languages": dict(Counter(sample.language or guess_script(sample.text) for sample in samples).most_common()),
        "duration_histogram": {_bin_name(edge): histogram[edge] for edge in DURATION_EDGES_SECONDS},
    }


def guess_script(text: str) -> str:
    """Most frequent script of the letters of `text`, from their Unicode names, e.g. "Latin script"."""
    scripts = Counter(map(_script, text))
    scripts.pop("", None)
    return scripts.most_common(1)[0][0] if scripts else "no letters"


def print_report(report: Report, console: Console) -> None:
    """Print notes, statistics and faults as tables."""
    values = report.statistics
    console.print(Text(str(report.path)))
    table = Table("what", "value")
    table.add_row("rows / sound samples", f"{values['num_rows']} / {values['num_samples']}")
    table.add_row("hours of target audio", f"{values['hours']:.2f}")
    table.add_row("with / without reference", f"{values['with_reference']} / {values['without_reference']}")
    for name in ("speakers", "languages"):
        groups = list(values[name].items())
        lines = [f"{group}: {count}" for group, count in groups[:_GROUPS_SHOWN]]
        lines += [f"... and {len(groups) - _GROUPS_SHOWN} more"] if len(groups) > _GROUPS_SHOWN else []
        table.add_row(f"{name} ({len(groups)})", Text("\n".join(lines)))
    lines = [f"{name:>9} s: {count}" for name, count in values["duration_histogram"].items() if count]
    table.add_row("durations", Text("\n".join(lines)))
    console.print(table)
    for note in report.notes:
        console.print(Text(f"note: {note}"))
    if not report.faults:
        console.print("no faults", style="green")
        return
    console.print(f"{len(report.faults)} fault(s)", style="bold red")
    faults = Table("where", "sample", "fault", "message")
    for fault in report.faults[:_FAULTS_SHOWN]:
        faults.add_row(*map(Text, (fault.source, fault.sample_id, fault.code, fault.message)))
    console.print(faults)
    if len(report.faults) > _FAULTS_SHOWN:
        kinds = Counter(fault.code for fault in report.faults).most_common()
        counts = ", ".join(f"{count} {code}" for code, count in kinds)
        console.print(Text(f"... and {len(report.faults) - _FAULTS_SHOWN} more; in all: {counts}"))


def _clips(sample: Sample) -> list[AudioRef]:
    return ([] if sample.audio is None else [sample.audio]) + [clip.audio for clip in sample.references]


def _bin_name(edge: int) -> str:
    index = DURATION_EDGES_SECONDS.index(edge) + 1
    return f"{edge}-{DURATION_EDGES_SECONDS[index]}" if index < len(DURATION_EDGES_SECONDS) else f"{edge}+"


@lru_cache(maxsize=65536)
def _script(character: str) -> str:
    if not character.isalpha():
        return ""
    word = unicodedata.name(character, "").partition(" ")[0]
    return _SCRIPT_NAMES.get(word, f"{word.title()} script" if word else "")

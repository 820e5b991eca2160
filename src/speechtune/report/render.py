"""The report as one HTML page that loads nothing from anywhere, and as Markdown for a pull request or a terminal."""

import base64
import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from html import escape
from importlib import resources

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from speechtune import __version__
from speechtune.report.facts import headline, state_line, time_parts
from speechtune.report.plots import section_plots
from speechtune.report.read_run import RunReport
from speechtune.report.sections import PAGE_SECTIONS, SAMPLES, comparison, not_comparable, sections
from speechtune.report.sound import MAX_CLIP_SECONDS, MAX_PROMPTS, AudioBudget, samples

ASSETS = resources.files("speechtune") / "assets" / "report"
TEMPLATES = Environment(
    loader=PackageLoader("speechtune", "assets/report"),
    autoescape=select_autoescape(disabled_extensions=("md",), default=True),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def page(reports: Sequence[RunReport], budget: AudioBudget | None = None) -> str:
    """The page for one run or several; `budget` limits the sound on it."""
    budget = budget or AudioBudget()
    if len(reports) == 1:
        parts = sections(reports[0])
        parts.insert(2, SAMPLES)
    else:
        parts = [*comparison(reports), *PAGE_SECTIONS]
    script = (ASSETS / "report.js").read_text(encoding="utf-8")
    return TEMPLATES.get_template("page.html").render(
        reports=reports,
        parts=parts,
        plots=section_plots(reports),
        prompts=samples(reports, budget),
        budget=budget,
        max_clip_seconds=MAX_CLIP_SECONDS,
        max_prompts=MAX_PROMPTS,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=(ASSETS / "report.css").read_text(encoding="utf-8"),
        version=__version__,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def markdown(reports: Sequence[RunReport]) -> str:
    """The text for one run or several."""
    return TEMPLATES.get_template("report.md").render(reports=reports).rstrip("\n") + "\n"


def plain(value: object) -> str:
    """Text from data on one line, without meaning for Markdown or HTML."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", escape(" ".join(str(value).split()), quote=False))


TEMPLATES.filters |= {"plain": plain, "yaml": partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)}
TEMPLATES.globals |= {f.__name__: f for f in (state_line, headline, time_parts, sections, comparison, not_comparable)}

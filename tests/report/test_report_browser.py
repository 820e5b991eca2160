"""The report in a real browser: no complaint, no request, players that play, plots that show, a phone's width."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import report_cases
from browser import Browser, find_chromium
from helpers import DemoClip
from speechtune.commands.report import run_report
from speechtune.report.read_run import read_run
from speechtune.report.render import page

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on the search path (apt-get install chromium, or set $CHROMIUM)"
)

EVIL = (
    "<script>document.title = 'hacked'</script><img src=https://example.org/x.png onerror=\"document.title='hacked'\">"
)

PLAYS = """Promise.all([...document.querySelectorAll('audio')].map((player) => new Promise((resolve) => {
  const done = (what) => resolve([what, player.duration, player.error && player.error.message]);
  player.addEventListener('error', () => done('error'));
  setTimeout(() => done('timeout'), 20000);
  player.preload = 'auto';
  player.addEventListener('canplaythrough', () => done('canplaythrough'));
  player.load();
})))"""

PLAY_TWO = """(async () => {
  const [first, second] = document.querySelectorAll('audio');
  await first.play();
  await second.play();
  await new Promise((resolve) => setTimeout(resolve, 150));
  const found = [first.paused, second.paused, second.currentTime > 0];
  second.pause();
  return found;
})()"""

BOXES = """[...document.querySelectorAll('svg.plot')].map((plot) => {
  const box = plot.getBoundingClientRect(), line = plot.querySelector('.line').getBBox();
  const letter = plot.querySelector('.tick').getBoundingClientRect().height;
  return [box.width, box.height, line.width, getComputedStyle(plot.querySelector('.line')).stroke, letter];
})"""

READING = """(() => {
  const plot = document.querySelector('svg.plot'), box = plot.getBoundingClientRect();
  const at = {clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, bubbles: true};
  plot.dispatchEvent(new PointerEvent('pointermove', at));
  return plot.parentElement.querySelector('.reading').textContent;
})()"""

AXES = """[...document.querySelectorAll('figure.panel')].map((figure) => [
  figure.querySelector('h3').textContent,
  [...figure.querySelectorAll('.tick[text-anchor=end]')].map((tick) => tick.textContent),
  [...figure.querySelectorAll('svg *')].flatMap((e) => [...e.attributes]
    .filter((a) => ['x', 'y', 'x1', 'x2', 'y1', 'y2', 'cx', 'cy', 'd'].includes(a.name)).map((a) => a.value)),
  [...figure.querySelectorAll('.broken title')].map((title) => title.textContent),
])"""

# Elements that stick out of the window, but for what scrolls in a box of its own.
WIDTHS = """[innerWidth, document.documentElement.scrollWidth, [...document.querySelectorAll('body *')]
  .filter((e) => !e.closest('.scroll') && !e.closest('svg') && e.getBoundingClientRect().right > innerWidth + 1)
  .map((e) => e.outerHTML.slice(0, 80))]"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, demo_clips: list[DemoClip]) -> dict[str, Path]:
    """Reports on one full run with a hostile text in it, on an unfinished run, on a Phi-4 run, and on all of them."""
    folder = tmp_path_factory.mktemp("runs")
    full = report_cases.make_run(folder / ("a-run-with-a-rather-long-name-" * 3), demo_clips[:3])
    prompts = [{"id": f"p{n}", "text": EVIL, "speaker": "x" * 300, "language": EVIL} for n in range(3)]
    report_cases.write_lines(full / "samples" / "prompts.jsonl", prompts)
    bare = report_cases.make_bare_run(folder / "bare")
    phones = report_cases.make_run(folder / "phones", kind=report_cases.PHI4)
    for name, runs in {"full": [full], "bare": [bare], "phones": [phones], "compared": [full, bare, phones]}.items():
        run_report(runs, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in ("full", "bare", "phones", "compared")}


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path / "profile") as started:
        yield started


@pytest.mark.parametrize("name", ["full", "bare", "phones", "compared"])
def test_the_page_works(browser: Browser, pages: dict[str, Path], name: str, tmp_path: Path) -> None:
    for width, dark in ((1280, False), (390, True)):
        browser.open(pages[name], width, dark=dark)
        inner, scrolled, outside = browser.evaluate(WIDTHS)
        assert inner == width and scrolled <= width and not outside, (scrolled, outside)
        plots = browser.evaluate(BOXES)
        assert len(plots) >= 5
        for box_width, box_height, line_width, stroke, letter in plots:
            assert box_width > 250 and box_height > 120 and line_width > 100, (box_width, box_height, line_width)
            assert stroke.startswith("rgb") and letter >= 9, (stroke, letter)
        assert browser.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 14
        assert browser.evaluate(READING).startswith("step ")
        assert browser.screenshot(tmp_path / f"{name}-{width}.png").stat().st_size > 20_000
    assert "hacked" not in browser.evaluate("document.title")
    assert not browser.problems, browser.problems
    assert {url.partition(":")[0] for url in browser.requests} <= {"file", "data"}, browser.requests


def test_all_players_play(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["full"], 1280)
    players = browser.evaluate(PLAYS)
    assert len(players) == 15
    assert all(what == "canplaythrough" and duration > 1 for what, duration, _ in players), players
    assert browser.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 50)")
    assert browser.evaluate(PLAY_TWO) == [True, False, True]  # one at a time
    assert not browser.problems, browser.problems


CURVES = {  # losses of one run by step, and the labels of its axis
    "nothing": ([0.0], ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
    "one": ([5.0], ["4.6", "4.8", "5", "5.2", "5.4"]),
    "below": ([-1.0, -1.0], ["-1.1", "-1.05", "-1", "-0.95", "-0.9"]),
    "wide": ([1e-300, 1e300], None),
    "decades": ([0.03, 400.0], ["0.1", "1", "10", "100"]),
    "half": ([3.3, 200.0], ["5", "10", "20", "50", "100", "200"]),
    "tiny": ([0.0, 1e-9], None),
    "gap": ([None, 2.0, float("nan")], ["1.8", "1.9", "2", "2.1", "2.2"]),
    "NaN": ([float("nan")], ["0", "0.5", "1"]),
    "close": ([1e6, 1e6 + 100], None),
}


def test_every_curve_has_axes(browser: Browser, tmp_path: Path) -> None:
    """Values that leave no range, or one that no linear axis can show: round labels, and no NaN in the drawing."""
    run = report_cases.make_bare_run(tmp_path / "run")
    rows = [
        {"step": step, "losses": {name: values[step] for name, (values, _) in CURVES.items() if step < len(values)}}
        for step in range(3)
    ]
    report_cases.write_lines(run / "metrics.jsonl", rows)
    (tmp_path / "axes.html").write_text(page([read_run(run, "run")]), encoding="utf-8")
    browser.open(tmp_path / "axes.html", 1280)
    drawn = {title: rest for title, *rest in browser.evaluate(AXES)}
    for name, (_, expected) in CURVES.items():
        labels, numbers, broken = drawn[f"loss of the {name} head"]
        assert 2 <= len(labels) < 20 and len(set(labels)) == len(labels), (name, labels)
        assert expected is None or labels == expected, (name, labels)
        assert numbers and not any("NaN" in n or "Infinity" in n for n in numbers), (name, numbers)
        assert broken == {"gap": ["step 2, run: NaN or infinite"], "NaN": ["step 0, run: NaN or infinite"]}.get(
            name, []
        )
    assert not browser.problems, browser.problems


def test_the_browser_would_tell(browser: Browser, tmp_path: Path) -> None:
    """The checks above can fail: a page that errs, loads and overflows is noticed."""
    page = "<title>x</title><p style='width:2000px'>x</p><script>console.error('e'); undefined.x</script>"
    (tmp_path / "bad.html").write_text("<meta name=viewport content='width=device-width'>" + page)
    browser.open(tmp_path / "bad.html", 390)
    _, scrolled, outside = browser.evaluate(WIDTHS)
    assert scrolled >= 2000 and outside
    assert len(browser.problems) == 2, browser.problems

"""The studio as a person uses it, in a real browser: data, an issue, its correction, a run, its sound, its export."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from browser import Browser, find_chromium
from helpers import DemoClip

CHROMIUM = find_chromium()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the search path (apt-get install chromium)"),
]
SOURCE = Path(__file__).parents[2] / "src"
PATIENCE_SECONDS = 120.0
# Its plots name an older Vega-Lite than the one it brings; its connection says so when a page is left.
WARNINGS_OF_GRADIO = ("The input spec uses Vega-Lite", "Method not implemented.")
TABS = ("data", "train", "listen", "pronounce", "runs")

HELPERS = """window.studio = {
  element(id, inner) { return document.querySelector(`#${id} ${inner}`); },
  fill(id, text) {
    const field = this.element(id, 'textarea, #' + id + ' input');
    field.value = text;
    field.dispatchEvent(new Event('input', {bubbles: true}));
  },
  options(id) {
    this.element(id, 'input').focus();
    return [...document.querySelectorAll('[role=option]')].map((option) => option.textContent.trim());
  },
  choose(id, text) {
    this.element(id, 'input').focus();
    const found = [...document.querySelectorAll('[role=option]')].find((o) => o.textContent.trim().endsWith(text));
    found.dispatchEvent(new MouseEvent('mousedown', {bubbles: true}));
    this.element(id, 'input').blur();
  },
  tab(name) {
    const tabs = [...document.querySelectorAll('[role=tab], .overflow-dropdown button')];
    tabs.find((tab) => tab.textContent.trim().toLowerCase() === name).click();
  },
  text(id) { const found = document.getElementById(id); return found ? found.textContent : ''; },
  box(selector) {
    const found = document.querySelector(selector);
    found.scrollIntoView({block: 'center'});
    const box = found.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  },
};"""

# Seconds of each recording that was spoken, as the browser decodes them.
PLAYED = """Promise.all([...document.querySelectorAll('.spoken a[download]')].map(async (a) => {
  const bytes = await (await fetch(a.href)).arrayBuffer();
  return (await new OfflineAudioContext(1, 16000, 16000).decodeAudioData(bytes)).duration;
}))"""

# What sticks out of the window, but for tables that scroll in a box of their own, and the menu of tabs.
WIDTHS = """[document.documentElement.scrollWidth, [...document.querySelectorAll('body *')].filter((e) =>
  e.checkVisibility({visibilityProperty: true, opacityProperty: true})
  && e.getBoundingClientRect().right > innerWidth + 1
  && !e.closest('.table-wrap, .overflow-dropdown, button[tabindex="-1"]')).map((e) => e.outerHTML.slice(0, 90))]"""


@dataclass
class Studio:
    """A studio that runs, and the folders it must leave alone."""

    address: str
    directory: Path
    outside: Path
    process: subprocess.Popen[bytes]


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    """A studio in a process of its own; its home, its current folder and a folder of data lie below `outside`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    outside = tmp_path / "outside"
    for name in ("home", "here", "data", "tmp"):
        (outside / name).mkdir(parents=True)
    environment = os.environ | {
        "HOME": str(outside / "home"),
        "TMPDIR": str(outside / "tmp"),
        "PYTHONPATH": str(SOURCE),
    }
    command = [sys.executable, "-m", "speechtune", "studio", "--dir", str(tmp_path / "studio"), "--port", str(port)]
    command += ["--allow", str(outside / "data")]
    with (tmp_path / "studio.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=outside / "here", env=environment, stdout=log, stderr=log)
    try:
        yield Studio(f"http://127.0.0.1:{port}/", tmp_path / "studio", outside, process)
    finally:
        process.terminate()
        process.wait(20)


class Person:
    """What a person does on the page."""

    def __init__(self, browser: Browser, studio: Studio) -> None:
        self.browser, self.studio = browser, studio

    def open(self, width: int) -> None:
        """Load the page once the studio answers."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            assert self.studio.process.poll() is None and time.monotonic() < deadline
            try:
                socket.create_connection(("127.0.0.1", int(self.studio.address.rpartition(":")[2][:-1])), 1).close()
                break
            except OSError:
                time.sleep(0.2)
        self.browser.open(self.studio.address, width)
        self.wait("document.querySelector('#data-name textarea, #data-name input') !== null")
        self.browser.evaluate(HELPERS)

    def wait(self, condition: str) -> None:
        """Until a condition holds on the page."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.browser.evaluate(condition):
            shown = self.browser.evaluate("document.body.innerText")
            assert time.monotonic() < deadline, (condition, self.browser.problems, shown)
            time.sleep(0.2)

    def see(self, element: str, text: str) -> None:
        """Until an element shows a text."""
        self.wait(f"studio.text({json.dumps(element)}).includes({json.dumps(text)})")

    def fill(self, element: str, text: str) -> None:
        self.wait(f"studio.element({json.dumps(element)}, 'textarea, #{element} input') !== null")
        self.browser.evaluate(f"studio.fill({json.dumps(element)}, {json.dumps(text)})")

    def choose(self, element: str, text: str) -> None:
        """Take what ends so from a list, once it is there and no answer of the studio chooses something else."""
        name, wanted = json.dumps(element), json.dumps(text)
        chosen = f"studio.element({name}, 'input').value.endsWith({wanted})"
        self.wait(f"studio.options({name}).some((option) => option.endsWith({wanted}))")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.browser.evaluate(chosen):
            assert time.monotonic() < deadline
            self.browser.evaluate(f"studio.choose({name}, {wanted})")
            time.sleep(1)

    def click(self, element: str) -> None:
        self.browser.evaluate(f"document.getElementById({json.dumps(element)}).click()")

    def tab(self, name: str) -> None:
        self.browser.evaluate(f"studio.tab({json.dumps(name)})")

    def type_into(self, selector: str, text: str) -> None:
        """Double-click what a selector finds, and type into it."""
        x, y = self.browser.evaluate(f"studio.box({json.dumps(selector)})")
        for count in (1, 2):
            for kind in ("mousePressed", "mouseReleased"):
                self.browser.call(
                    "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=count
                )
        time.sleep(0.3)
        self.browser.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.browser.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time of change."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_from_recordings_to_an_exported_adapter(studio: Studio, tmp_path: Path, demo_clips: list[DemoClip]) -> None:
    clips = sorted((c for c in demo_clips if c.speaker == "allison"), key=lambda c: c.duration_seconds)[:3]
    (studio.outside / "data" / "note.txt").write_text("to be read, never written")
    before = contents(studio.outside)
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path / "profile") as browser:
        person = Person(browser, studio)
        person.open(1280)
        person.fill("data-name", "voice")
        browser.give_files("#data-files input[type=file]", [clip.path for clip in clips])
        person.see("data-files", clips[2].path.name[:10])
        person.click("data-add")
        person.see("data-verdict", "3 issue(s)")
        browser.screenshot(tmp_path / "data.png")
        for number, clip in enumerate(clips):
            person.type_into(f"#data-rows [data-testid='cell-{number}-1']", clip.text)
        person.click("data-save")
        person.see("data-verdict", "No issues")
        rows = [json.loads(line) for line in (studio.directory / "data/voice/metadata.jsonl").read_text().splitlines()]
        assert [row["text"] for row in rows] == [clip.text for clip in clips]

        person.tab("train")
        person.fill("train-name", "first")
        steps = {"train-max_steps": "4", "checkpoint-every_steps": "2", "evaluate-every_steps": "2"}
        for option, value in {**steps, "evaluate-prompts": "1", "train-epochs": "-1"}.items():
            person.fill(f"option-{option}", value)
        person.click("train-go")
        person.see("option-train-epochs", "Input should be greater than 0")
        person.see("train-verdict", "1 issue(s)")
        person.fill("option-train-epochs", "3")
        person.click("train-go")
        person.see("train-verdict", "trains first")
        person.see("train-state", "finished at step 4 of 4")
        person.wait("document.querySelectorAll('.sample').length === 4")  # recording, base, steps 2 and 4
        browser.screenshot(tmp_path / "train.png")
        shutil.copytree(studio.directory / "runs" / "first", studio.directory / "runs" / "second")

        person.tab("listen")
        person.choose("listen-run", "first")
        person.wait("document.querySelectorAll('#listen-voices input:checked').length === 2")
        person.click("listen-speak")
        person.wait("document.querySelectorAll('.spoken').length === 2")
        person.wait("document.querySelectorAll('.spoken a[download]').length === 2")
        spoken = browser.evaluate(PLAYED)
        assert len(spoken) == 2 and all(0.3 < seconds < 20 for seconds in spoken), spoken
        browser.screenshot(tmp_path / "listen.png")

        person.tab("runs")
        person.choose("runs-run", "first")
        person.choose("runs-other", "second")
        person.click("runs-compare")
        person.wait("(document.querySelector('iframe.report') || {srcdoc: ''}).srcdoc.includes('What differs')")
        person.choose("runs-checkpoint", "checkpoint-2")
        person.click("runs-export")
        person.see("runs-done", "checks passed")
        browser.screenshot(tmp_path / "runs.png")
        with zipfile.ZipFile(studio.directory / "exports" / "first-checkpoint-2.zip") as packed:
            assert {"adapter_config.json", "adapter_model.safetensors"} <= set(packed.namelist())

        person.open(390)
        for name in TABS:
            person.tab(name)
            time.sleep(1)
            scrolled, outside = browser.evaluate(WIDTHS)
            assert scrolled <= 390 and not outside, (name, scrolled, outside)
            browser.screenshot(tmp_path / f"{name}-390.png")
        problems = {found for found in browser.problems if not any(known in found for known in WARNINGS_OF_GRADIO)}
        assert not problems, "\n".join(problems)
        assert {url for url in browser.requests if not url.startswith((studio.address, "data:", "blob:"))} == set()
    studio.process.send_signal(signal.SIGTERM)
    studio.process.wait(20)
    assert contents(studio.outside) == before

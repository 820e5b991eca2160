"""Recordings are assessed as `speechtune score` assesses them."""

import json
from pathlib import Path
from typing import Any

import pytest

from conftest import Serve
from helpers import DemoClip
from speechtune.cli import main
from speechtune.inference.adapter_set import AdapterSet
from speechtune.inference.load import open_adapter
from speechtune.training.run import Outcome

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def assessor(phi4_base: Path, phi4_run: Outcome) -> AdapterSet:
    """The tiny Phi-4, prepared as its adapter wants it."""
    stored = open_adapter(phi4_run.job.config.output_dir)
    return AdapterSet(None, None, stored, "assess pronunciation")


def test_scores_are_those_of_the_command_line(
    serve: Serve,
    assessor: AdapterSet,
    phi4_run: Outcome,
    demo_clips: list[DemoClip],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = phi4_run.job.config.output_dir
    client = serve({"tuned": adapter}, models=assessor, max_new_tokens=60)
    clip = min(demo_clips[:8], key=lambda one: one.duration_seconds)

    def ask(**fields: Any) -> dict[str, Any]:
        answer = client.post("/v1/pronunciation", data=fields, files={"file": ("x", clip.path.read_bytes())})
        assert answer.status_code == 200, answer.text
        return answer.json()

    words = ["score", clip.path, "--text", clip.text, "--adapter", adapter, "--max-new-tokens", 60]
    capsys.readouterr()
    assert main([str(word) for word in [*words, "--cache-dir", tmp_path / "cache", "--json"]]) == 0
    (expected,) = json.loads(capsys.readouterr().out)["scores"]
    found = ask(text=clip.text, model="tuned")
    assert found == {name: value for name, value in expected.items() if name not in ("id", "audio")}
    assert ask(text=clip.text) != found, "the base answers otherwise"
    assert {path.name for path in (tmp_path / "server").rglob("*")} == set(), "no recording is kept"
    refused = client.post("/v1/pronunciation", files={"file": ("x", b"no audio")})
    assert refused.status_code == 422 and "1 recording(s) cannot be scored" in refused.json()["error"]["message"]
    assert client.post("/v1/audio/speech", json={"input": "Hi."}).status_code == 404

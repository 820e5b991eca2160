"""`speechtune push` against a local stand-in of the hub's API: what is sent, and what is refused before anything is."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelCard

from speechtune.cli import main
from speechtune.errors import AdapterError, ConfigError
from speechtune.export.push import plan_upload, upload

NAME = "someone/adapter"


class Hub(BaseHTTPRequestHandler):
    """The three calls that a commit of small files makes."""

    calls: list[tuple[str, Any]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        type(self).calls.append((self.path, body))
        if self.path == "/api/repos/create":
            self._reply({"url": f"https://huggingface.co/{NAME}"})
        elif self.path == "/api/validate-yaml":
            self._reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self._reply({"files": modes})
        elif self.path.endswith("/commit/main"):
            url = f"https://huggingface.co/{NAME}/commit/{'0' * 40}"
            self._reply({"commitUrl": url, "commitOid": "0" * 40, "success": True})
        else:
            self._reply({"error": "not here"}, 404)

    def _reply(self, values: dict[str, Any], code: int = 200) -> None:
        body = json.dumps(values).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HfApi]:
    Hub.calls = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield HfApi(endpoint=f"http://127.0.0.1:{server.server_address[1]}", token="hf_test")
    server.shutdown()


@pytest.fixture
def run(adapter_run: Path, tmp_path: Path) -> Path:
    """A finished run, with recordings of two evaluations."""
    folder = shutil.copytree(adapter_run, tmp_path / "run")
    for step in ("step-0", "step-4", "step-20"):
        (folder / "samples" / step).mkdir(parents=True)
        (folder / "samples" / step / "a.wav").write_bytes(step.encode())
    return folder


def test_adapter_card_recipe_and_last_samples_go_in_one_commit(hub: HfApi, run: Path) -> None:
    plan = plan_upload(run, NAME, private=True)
    wanted = {"adapter_model.safetensors", "adapter_config.json", "README.md", "MANIFEST.json", "base_recipe.json"}
    wanted |= {"prompts.json"}
    assert set(plan.files) == wanted | {"samples/a.wav"}
    assert Path(plan.files["samples/a.wav"]).parent.name == "step-20"
    assert "/commit/" in upload(plan, api=hub)
    paths = [path for path, _ in Hub.calls]
    commit = ["/api/validate-yaml", f"/api/models/{NAME}/preupload/main", f"/api/models/{NAME}/commit/main"]
    assert paths == ["/api/repos/create", *commit]
    asked = json.loads(Hub.calls[0][1])  # its wording depends on the client's version
    assert asked.get("private") is True or asked.get("visibility") == "private"
    lines = [json.loads(line) for line in Hub.calls[-1][1].splitlines()]
    assert {line["value"]["path"] for line in lines if line["key"] == "file"} == set(plan.files)


def test_a_dry_run_sends_nothing(hub: HfApi, run: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["push", str(run), NAME, "--dry-run", "--json", "--no-samples"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dry_run"] and found["url"] is None and "samples/a.wav" not in found["files"]
    assert Hub.calls == []


def test_the_card_is_one_the_hub_reads(run: Path) -> None:
    card = ModelCard.load(run / "lora_adapters" / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "peft" and card.data.pipeline_tag == "text-to-speech"
    assert "consent" in card.text and "licence" in card.text


@pytest.mark.parametrize(
    ("damage", "reason"),
    [("weights", "not uploaded"), ("card", "no model card"), ("metadata", "metadata block"), ("name", "owner/name")],
)
def test_what_is_refused_before_anything_is_sent(damage: str, reason: str, run: Path) -> None:
    folder, name = run / "lora_adapters", NAME
    if damage == "weights":
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "card":
        (folder / "README.md").unlink()
    elif damage == "metadata":
        (folder / "README.md").write_text("---\nlibrary_name: [peft\n---\n# a card\n")
    else:
        name = "adapter"
    with pytest.raises((AdapterError, ConfigError), match=reason):
        plan_upload(run, name, private=False)


def test_a_hub_that_refuses_is_one_clear_error(run: Path, hub: HfApi) -> None:
    plan = plan_upload(run, "else/where", private=False)
    with pytest.raises(ConfigError, match="the hub did not take it"):
        upload(plan, api=HfApi(endpoint="http://127.0.0.1:9", token="hf_test"))

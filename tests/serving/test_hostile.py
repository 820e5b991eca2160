"""Requests that are refused: by whom, by what they carry, by what they name; nothing is read or written elsewhere."""

import asyncio
import io
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import soundfile
from starlette.testclient import TestClient

from adapter_helpers import copy_adapter, edit_config
from conftest import Serve
from helpers import DemoClip
from speechtune.cli import main

SPEECH, VOICES = "/v1/audio/speech", "/v1/audio/voices"


def refusal(answer: Any) -> tuple[int, str]:
    """Status and code of an error in OpenAI's form."""
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return answer.status_code, error["code"]


def test_the_key_is_asked_for(serve: Serve) -> None:
    client = serve(api_key="right key")
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right key"}, {"api-key": "x"}):
        for method, path in (("GET", "/v1/models"), ("POST", SPEECH), ("GET", "/metrics"), ("GET", "/openapi.json")):
            assert refusal(client.request(method, path, headers=headers)) == (401, "invalid_api_key")
    assert client.get("/v1/models", headers={"Authorization": "Bearer right key"}).status_code == 200
    assert client.get("/health").status_code == 200


def test_without_a_key_only_this_machine_is_served(serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    """Not by another name either: a page whose name leads here could ask otherwise."""
    client = serve()
    for host in ("attacker.example", "localhost.attacker.example", "[", "", "127.0.0.1.nip.io"):
        assert refusal(client.get("/v1/models", headers={"Host": host})) == (403, "forbidden_host"), host
    for host in ("localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"):
        assert client.get("/v1/models", headers={"Host": host}).status_code == 200, host
    crossing = {"Origin": "https://attacker.example"}
    assert refusal(client.post(SPEECH, json={"input": "Hi."}, headers=crossing)) == (403, "forbidden_origin")
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "set SPEECHTUNE_API_KEY in the environment" in capsys.readouterr().err


def test_bodies_have_a_limit(serve: Serve, add_voice: Callable[..., Any]) -> None:
    client = serve(max_characters=50)
    assert refusal(client.post(SPEECH, content=b"x" * (2**20 + 1))) == (413, "body_too_large")
    endless = (b"x" * 2**16 for _ in range(20))  # without a length
    assert refusal(client.post(SPEECH, content=endless)) == (413, "body_too_large")
    assert refusal(client.post(SPEECH, headers={"Content-Length": "-5"}, content=b"")) == (413, "body_too_large")
    assert refusal(add_voice(client, audio=bytes(33 * 2**20))) == (413, "body_too_large")
    assert refusal(client.post(SPEECH, json={"input": "a" * 51})) == (413, "text_too_long")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"\xff", 400),
        (b"[" * 100_000, 400),
        (b'"text"', 422),
        ({}, 422),
        ({"input": ""}, 422),
        ({"input": "... !"}, 422),
        ({"input": "Hi.", "speed": 2}, 422),
        ({"input": "Hi.", "instructions": "shout"}, 422),
        ({"input": "Hi.", "response_format": "aac"}, 422),
        ({"input": "Hi.", "temperature": -1}, 422),
        (b'{"input": "Hi.", "temperature": NaN}', 422),
        (b'{"input": "\\ud800 lone"}', 422),
        ({"input": "Hi. <|eot_id|>"}, 422),
        ({"input": "Hi.", "model": "/etc"}, 404),
        ({"input": "Hi.", "voice": "../../../etc/passwd"}, 404),
        ({"input": "Hi.", "voice": "http://127.0.0.1/x.wav"}, 404),
        ({"input": "Hi.", "voice": {"id": "me"}}, 422),
    ],
    ids=str,
)
def test_texts_that_are_refused(body: Any, status: int, serve: Serve) -> None:
    client = serve()
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(SPEECH, content=content, headers={"Content-Type": "application/json"})
    assert refusal(answer)[0] == status
    assert client.post(SPEECH, json={"input": "Hi."}).status_code == 200, "the server goes on"


def wav(samples: np.ndarray, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


NOISE = np.random.default_rng(0).normal(0, 0.1, 16_000)
RECORDINGS = {
    "empty": b"",
    "text": b"not audio at all",
    "silent": wav(np.zeros(16_000)),
    "too short": wav(NOISE[:200]),
    "too long": wav(np.tile(NOISE, 61)),
    "torn": wav(NOISE)[:40],
    "a playlist of files": b"#EXTM3U\nfile:///etc/passwd\n",
    "a page": b"<html><script src='http://127.0.0.1:1/'></script></html>",
}


@pytest.mark.parametrize("name", RECORDINGS)
def test_recordings_that_are_refused(
    name: str, serve: Serve, add_voice: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_connection(*address: object) -> None:
        raise AssertionError(f"opened {address}")

    client = serve()
    monkeypatch.setattr(socket, "create_connection", no_connection)
    assert refusal(add_voice(client, audio=RECORDINGS[name]))[0] == 422
    assert not list((tmp_path / "server").rglob("*.json")) and client.get(VOICES).json() == {"data": []}


@pytest.mark.parametrize(
    "name", ["../up", "a/b", "", ".hidden", "x" * 65, "a b", "a\0b", "\u202egnp", "CON.json", "default/..", "\n", "a\n"]
)
def test_hostile_names(name: str, serve: Serve, add_voice: Callable[..., Any], tmp_path: Path) -> None:
    client = serve()
    before = {path for path in tmp_path.rglob("*")}
    assert refusal(add_voice(client, name))[0] in (400, 422)
    assert {path for path in tmp_path.rglob("*")} == before
    assert client.delete(f"{VOICES}/{quote(name, safe='')}").status_code in (404, 405, 422)


def test_hostile_file_names_and_forms(serve: Serve, reference: DemoClip, tmp_path: Path) -> None:
    """The name of an upload is not looked at; a form with anything else than its fields is refused."""
    client, sound = serve(), reference.path.read_bytes()
    fields = {"name": "me", "text": reference.text}

    def post(files: Any, data: Any = fields) -> Any:
        return client.post(VOICES, data=data, files=files)

    assert refusal(post({"audio_sample": ("a.flac", sound), "more": ("b", b"x")}))[0] in (400, 422)
    assert refusal(post({"other": ("a.flac", sound)}))[0] == 422
    assert refusal(post({"audio_sample": ("a", sound)}, fields | {"path": "/etc/passwd"}))[0] == 422
    assert refusal(post({"audio_sample": ("a", sound)}, fields | {"strength": "NaN"}))[0] == 422
    assert refusal(post({"audio_sample": ("a", sound)}, fields | {"adapter": "../x"}))[0] == 422
    assert refusal(post({"audio_sample": ("a", sound)}, {"name": "me"}))[0] == 422
    assert refusal(client.post(VOICES, data={**fields, "audio_sample": "/etc/passwd"}))[0] in (400, 422)
    assert refusal(client.post(VOICES, json={**fields, "audio_sample": "file:///etc/passwd"}))[0] == 400
    torn = {"Content-Type": "multipart/form-data"}
    assert refusal(client.post(VOICES, content=b"--x", headers=torn))[0] == 400
    charset = {"Content-Type": "multipart/form-data; boundary=x; charset=nonsense"}
    assert refusal(client.post(VOICES, content=b"--x\r\n", headers=charset))[0] in (400, 422)
    for name in ("../../../../tmp/evil.wav", "C:\\evil", "a\0b", "\u202e"):
        assert post({"audio_sample": (name, sound)}).status_code == 200, name
        assert client.delete(f"{VOICES}/me").status_code == 200
    assert {path.name for path in tmp_path.rglob("*")} <= {"server", "voices"}


def test_adapters_come_from_the_root_alone(serve: Serve, adapter_run: Path, tmp_path: Path) -> None:
    root, good = tmp_path / "root", adapter_run / "lora_adapters"
    copy_adapter(good, root / "good", manifest=True)
    edit_config(copy_adapter(good, root / "changed", manifest=True), lora_alpha=1)
    edit_config(copy_adapter(good, root / "useless"), lora_alpha=0)
    (root / "empty").mkdir()
    copy_adapter(good, tmp_path / "outside")
    client = serve(root=root)

    def add(name: str) -> Any:
        return client.post("/v1/adapters", json={"name": name})

    for name in ("../outside", "good/../../outside", "/etc", ".", "..", ""):
        assert refusal(add(name))[0] == 422, name
    assert refusal(add("outside")) == (404, "not_found")
    reasons = {"changed": "manifest", "useless": "changes no logit", "empty": "adapter_config.json"}
    for name, reason in reasons.items():
        answer = add(name)
        assert refusal(answer) == (422, "AdapterError") and reason in answer.text
        assert refusal(client.post(SPEECH, json={"input": "Hi.", "model": name}))[0] == 404
    assert add("good").json()["effect"] > 0 and add("good").status_code == 200
    assert client.post(SPEECH, json={"input": "Hi.", "model": "good"}).status_code == 200


def test_too_many_at_a_time_are_sent_away(serve: Serve) -> None:
    client = serve(max_requests=1)

    async def both() -> list[Any]:
        asked = [asyncio.to_thread(client.post, SPEECH, json={"input": "Hello there.", "seed": n}) for n in range(4)]
        return await asyncio.gather(*asked)

    answers = asyncio.run(both())
    codes = sorted(answer.status_code for answer in answers)
    assert codes[0] == 200 and codes[-1] == 429
    busy = next(answer for answer in answers if answer.status_code == 429)
    assert refusal(busy) == (429, "busy") and int(busy.headers["Retry-After"]) >= 1
    assert busy.json()["error"]["type"] == "rate_limit_error"
    assert client.post(SPEECH, json={"input": "Hello there."}).status_code == 200


def test_the_deadline(serve: Serve) -> None:
    client = serve(deadline_seconds=0.01)
    assert refusal(client.post(SPEECH, json={"input": "Hello there."})) == (504, "deadline")


def test_what_is_not_there(serve: Serve) -> None:
    client: TestClient = serve()
    assert refusal(client.get("/v1/nothing"))[0] == 404
    assert refusal(client.put(SPEECH))[0] == 405
    assert refusal(client.post("/v1/pronunciation", files={"file": b"x"})) == (404, "not_served")

"""The server as a process: OpenAI's client, clients that are slow, hostile or leave, and signals."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
import soundfile
from hypothesis import HealthCheck, given, settings
from openai import APIStatusError, AuthenticationError, OpenAI
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from helpers import DemoClip
from speechtune.audio import read_provenance

KEY = "a key of the tests"
TEXT = "Hello there. How are you?"
SETTINGS = settings(
    max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
)

pytestmark = pytest.mark.slow


@dataclass
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[str]
    log: list[str]

    def client(self, key: str = KEY) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def metric(self, name: str) -> float:
        """The value of a counter or gauge."""
        text = httpx2.get(f"{self.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


Start = Callable[..., Any]


@pytest.fixture(scope="module")
def start(tiny_base: Path, adapter_run: Path) -> Start:
    """Start a server in a folder, and wait until it serves."""

    @contextmanager
    def run(folder: Path, *flags: str) -> Iterator[Server]:
        words = [sys.executable, "-m", "speechtune", "serve", "--port", "0", "--dir", str(folder)]
        words += ["--model", str(tiny_base / "model"), "--codec", str(tiny_base / "codec"), "--max-new-tokens", "24"]
        words += ["--adapter", f"tuned={adapter_run / 'lora_adapters'}", *flags]
        environment = {**os.environ, "SPEECHTUNE_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
        assert process.stderr is not None
        log: list[str] = []
        for line in process.stderr:
            log.append(line)
            if found := re.search(r"serving .* on (http://\S+)", line):
                break
        else:
            raise AssertionError("".join(log))
        with ThreadPoolExecutor(1) as reader:
            reader.submit(log.extend, process.stderr)
            for _ in range(300):
                try:
                    httpx2.get(f"{found[1]}/health")
                    break
                except httpx2.TransportError:
                    time.sleep(0.1)
            try:
                yield Server(found[1], process, log)
            finally:
                process.kill()
                process.wait()

    return run


@pytest.fixture(scope="module")
def server(start: Start, tmp_path_factory: pytest.TempPathFactory, demo_clips: list[DemoClip]) -> Iterator[Server]:
    with start(tmp_path_factory.mktemp("server"), "--batch-size", "8") as running:
        assert add_voice(running, min(demo_clips, key=lambda clip: clip.duration_seconds)) == 200
        yield running


def add_voice(server: Server, clip: DemoClip) -> int:
    return httpx2.post(
        f"{server.url}/v1/audio/voices",
        headers={"Authorization": f"Bearer {KEY}"},
        data={"name": "me", "text": clip.text},
        files={"audio_sample": ("me.wav", clip.path.read_bytes())},
    ).status_code


def test_openais_client_gets_a_streamed_wav(server: Server, tmp_path: Path) -> None:
    client, out = server.client(), tmp_path / "out.wav"
    assert [model.id for model in client.models.list()] == ["base", "tuned"]
    with client.audio.speech.with_streaming_response.create(
        model="tuned", voice="me", input=TEXT * 3, response_format="wav", extra_body={"seed": 7}
    ) as answer:
        assert answer.headers["content-type"] == "audio/wav" and "content-length" not in answer.headers
        chunks = list(answer.iter_bytes())
    out.write_bytes(b"".join(chunks))
    samples, rate = soundfile.read(out)
    assert rate == 24_000 and len(samples) > rate and samples.any()
    origin = read_provenance(out)
    assert origin is not None and origin["generated"] is True and len(origin["adapter_sha256"]) == 64
    assert len(chunks) > 1 and chunks[0][4:8] == b"\xff\xff\xff\xff", "sizes are not known when it begins"


def test_openais_client_understands_refusals(server: Server) -> None:
    asked: dict[str, Any] = {"model": "base", "voice": "me", "input": TEXT}
    with pytest.raises(AuthenticationError, match="bearer token"):
        server.client("wrong").audio.speech.create(**asked)
    with pytest.raises(APIStatusError, match="no voice") as caught:
        server.client().audio.speech.create(**(asked | {"voice": "nobody"}))
    assert caught.value.status_code == 404 and caught.value.body["param"] == "voice"  # type: ignore[index]


def test_sixty_four_at_once_all_succeed(server: Server) -> None:
    client = server.client()
    expected = {seed: client.audio.speech.create(**request(seed)).content for seed in range(2)}
    batches = server.metric("speechtune_batch_size_count")
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda n: client.audio.speech.create(**request(n % 2)).content, range(64)))
    assert all(answer == expected[n % 2] for n, answer in enumerate(answers))
    assert server.metric("speechtune_batch_size_count") - batches < 32, "they shared batches"


def request(seed: int) -> dict[str, Any]:
    asked = {"model": "base", "voice": "me", "input": "Hello there.", "response_format": "wav"}
    return {**asked, "extra_body": {"seed": seed}}


def connect(server: Server) -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def head(length: int, path: str = "/v1/audio/speech") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", "Content-Type: application/json"]
    return "\r\n".join([*lines, f"Content-Length: {length}", "", ""]).encode()


def test_clients_that_leave_free_the_model(server: Server) -> None:
    body = ('{"voice": "me", "response_format": "wav", "input": "' + TEXT * 40 + '"}').encode()
    leaving = []
    for _ in range(8):
        leaving.append(connect(server))
        leaving[-1].sendall(head(len(body)) + body)
    time.sleep(0.5)
    for one in leaving:
        one.close()
    for _ in range(200):
        if server.metric("speechtune_waiting") == 0:
            break
        time.sleep(0.1)
    assert server.metric("speechtune_waiting") == 0
    started = time.monotonic()
    assert server.client().audio.speech.create(**request(3)).content
    assert time.monotonic() - started < 20, "640 pieces are not spoken for nobody"


def test_slow_clients_hold_up_nobody(server: Server) -> None:
    """One sends its body byte by byte, one never, one reads nothing of a long answer."""
    slow, silent, deaf = connect(server), connect(server), connect(server)
    slow.sendall(head(1000) + b"{")
    silent.sendall(b"POST /v1/audio/speech HTTP/1.1\r\nHost:")
    body = ('{"voice": "me", "response_format": "wav", "input": "' + TEXT * 4 + '"}').encode()
    deaf.sendall(head(len(body)) + body)
    for _ in range(3):
        slow.sendall(b" ")
        assert server.client().audio.speech.create(**request(4)).content
    for one in (slow, silent, deaf):
        one.close()


@pytest.mark.parametrize(
    "data",
    [b"\0" * 100, b"GET http://127.0.0.1:1/ HTTP/1.1\r\n\r\n", b"POST / HTTP/1.1\r\n" + b"A: " + b"x" * 10**5],
    ids=["not HTTP", "a proxy's request", "endless headers"],
)
def test_what_is_not_a_request(data: bytes, server: Server) -> None:
    one = connect(server)
    one.sendall(data)
    answer = one.recv(1000)
    assert not answer or answer.split()[1][:1] == b"4"
    one.close()
    assert httpx2.get(f"{server.url}/health").status_code == 200


def test_paths_lead_nowhere(server: Server) -> None:
    for path in ("/../../etc/passwd", "/v1/audio/voices/..%2f..%2fetc", "/%2e%2e/x", "/docs", "//etc/passwd"):
        one = connect(server)
        one.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
        assert one.recv(100).split()[1] in (b"404", b"405"), path
        one.close()


def test_killed_and_started_again(start: Start, tmp_path: Path, demo_clips: list[DemoClip]) -> None:
    clip, folder = min(demo_clips, key=lambda clip: clip.duration_seconds), tmp_path / "server"
    with start(folder) as first:
        assert add_voice(first, clip) == 200
        before = first.client().audio.speech.create(**request(1)).content
        second = subprocess.run(
            [sys.executable, "-m", "speechtune", "serve", "--dir", str(folder), "--port", "0"],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert second.returncode == 2 and "is writing into this folder" in second.stderr
        (folder / "voices" / ".me.json.torn").write_text("{")
        first.process.kill()
    with start(folder) as again:
        assert again.client().audio.speech.create(**request(1)).content == before


def test_a_signal_lets_what_runs_finish(start: Start, tmp_path: Path, demo_clips: list[DemoClip]) -> None:
    with start(tmp_path / "server") as server, ThreadPoolExecutor(4) as pool:
        assert add_voice(server, min(demo_clips, key=lambda clip: clip.duration_seconds)) == 200
        running = [pool.submit(server.client().audio.speech.create, **request(number)) for number in range(4)]
        while server.metric("speechtune_batch_size_count") < 1:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert all(soundfile.read(io.BytesIO(answer.result().content))[1] == 24_000 for answer in running)
        assert server.process.wait(30) == -signal.SIGTERM
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{server.url}/health")


def test_the_examples_of_the_page_run(server: Server, tmp_path: Path, demo_clips: list[DemoClip]) -> None:
    """docs/serve.md, as it stands but for the address and the key."""
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    voice = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)[0]
    (python,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    clip = min(demo_clips, key=lambda one: one.duration_seconds)
    (tmp_path / "anna.flac").write_bytes(clip.path.read_bytes())
    address = "http://127.0.0.1:8000"
    assert address in voice and address in python
    environment = {**os.environ, "SPEECHTUNE_API_KEY": KEY}
    words: dict[str, Any] = {"cwd": tmp_path, "env": environment, "check": True, "capture_output": True, "text": True}
    done = subprocess.run(["bash", "-ec", voice.replace(address, server.url)], **words)
    assert '"name":"anna"' in done.stdout
    assert soundfile.info(tmp_path / "hello.mp3").frames > 1000
    code = python.replace(address, server.url).replace("the server's key", KEY)
    subprocess.run([sys.executable, "-c", code], **words)
    assert soundfile.info(tmp_path / "hello.wav").samplerate == 24_000


def test_made_up_requests(server: Server) -> None:
    """From the OpenAPI, by schemathesis: no server error, and no answer that the document does not know."""
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_dict(httpx2.get(f"{server.url}/openapi.json", headers=headers).json())
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 9
    for operation in operations:
        seen: list[int] = []

        def check(case: schemathesis.Case) -> None:
            answer = case.call(base_url=server.url, headers=headers)
            seen.append(answer.status_code)  # noqa: B023  # called before the next operation
            case.validate_response(answer, checks=checks)

        given(case=operation.as_strategy())(SETTINGS(check))()
        assert seen, operation.label

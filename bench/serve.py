"""`speechtune serve` under load: 64 clients beside one, and mixed load for a time.

    python bench/serve.py rate                  # requests a second, one by one and by 64 clients at once
    python bench/serve.py soak --minutes 30     # mixed load: every answer as it should be, memory flat

All on the small model that ships with speechtune, on this machine alone.
"""

import argparse
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
SENTENCES = (ROOT / "tests" / "sound" / "sentences.txt").read_text(encoding="utf-8").splitlines()
REFERENCE = ROOT / "tests" / "sound" / "voices" / "af_heart.flac"
REFERENCE_TEXT = "Good morning, the train to the coast leaves at nine."
CLIENTS = 64
CAP = ("--max-new-tokens", "160")  # 6.4 s, twice what the sentences take: one that does not end holds up its batch
LEAST_RATIO = 4.0
MOST_GROWTH = 0.05  # of memory, from the first minute to the end
BOUNDARY = "speechtune"


@contextmanager
def server(folder: Path, *flags: str) -> Iterator[tuple[int, psutil.Process]]:
    """A server of its own on a free port: the port and its process; ended by SIGTERM."""
    command = [sys.executable, "-m", "speechtune", "serve", "--port", "0", "--dir", str(folder), *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    log: list[str] = []
    for line in process.stderr:
        log.append(line)
        if found := re.search(r"serving .* on http://[^:]+:(\d+)", line):
            break
    else:
        raise RuntimeError("the server did not start:\n" + "".join(log[-20:]))
    try:
        with ThreadPoolExecutor(1) as reader:
            reader.submit(log.extend, process.stderr)
            port = int(found[1])
            while ask(port, "GET", "/health")[0] != 200:
                time.sleep(0.1)
            yield port, psutil.Process(process.pid)
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    finally:
        process.kill()
    if process.returncode != -signal.SIGTERM:
        raise RuntimeError(f"the server ended with {process.returncode}:\n" + "".join(log[-20:]))


def ask(port: int, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> Any:
    """Status and body of an answer; 0 where there is none."""
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request(method, path, body, {"Content-Type": kind} if body is not None else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except ConnectionRefusedError:
        return 0, b""
    finally:
        connection.close()


def speak(port: int, text: str, voice: str = "heart", **more: Any) -> tuple[int, bytes]:
    values = {"input": text, "voice": voice, "response_format": "wav", **more}
    return ask(port, "POST", "/v1/audio/speech", json.dumps(values).encode())


def add_voice(port: int, name: str) -> int:
    fields = {"name": name, "text": REFERENCE_TEXT}
    parts = [f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="audio_sample"; filename="a.flac"\r\n\r\n'
    body = "".join([*parts, head]).encode() + REFERENCE.read_bytes() + f"\r\n--{BOUNDARY}--\r\n".encode()
    return ask(port, "POST", "/v1/audio/voices", body, f"multipart/form-data; boundary={BOUNDARY}")[0]


def measure_rate(batch_size: int) -> dict[str, Any]:
    """Requests a second, one client after another and 64 at once: by the clock, and by the server's processor time.

    Both are moved by what else runs on the machine.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        server(Path(folder), "--batch-size", str(batch_size), *CAP) as (port, its),
    ):
        assert add_voice(port, "heart") == 200
        texts = [SENTENCES[number % len(SENTENCES)] for number in range(CLIENTS)]
        speak(port, texts[0])

        def rates(clients: int) -> tuple[float, float, list[int]]:
            started, used = time.monotonic(), sum(its.cpu_times()[:2])
            with ThreadPoolExecutor(clients) as pool:
                found = list(pool.map(lambda number: speak(port, texts[number], seed=number)[0], range(CLIENTS)))
            used = sum(its.cpu_times()[:2]) - used
            return CLIENTS / (time.monotonic() - started), CLIENTS / used, [s for s in found if s != 200]

        (alone, alone_cpu, failed), (together, together_cpu, more) = rates(1), rates(CLIENTS)
    return {
        "alone_per_second": alone, "together_per_second": together, "ratio": together / alone,
        "ratio_by_processor_time": together_cpu / alone_cpu, "failed": failed + more,
    }  # fmt: skip


def soak(minutes: float, load: int = 6) -> dict[str, Any]:
    """Mixed load for a time; what came back otherwise than it should, and memory after a minute and at the end."""
    unexpected: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    memory: list[int] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        server(Path(folder), "--max-new-tokens", "120", "--batch-size", "8") as (port, process),
    ):
        assert add_voice(port, "heart") == 200
        ends = time.monotonic() + 60 * minutes

        def client(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < ends:
                kind = chance.choice(list(KINDS))
                asked[kind] += 1
                if problem := KINDS[kind](port, chance):
                    unexpected[f"{kind}: {problem}"] += 1

        with ThreadPoolExecutor(load) as clients:
            done = [clients.submit(client, number) for number in range(load)]
            warm = time.monotonic() + min(60.0, 30 * minutes)
            while time.monotonic() < ends:
                time.sleep(min(5.0, 3 * minutes))
                if time.monotonic() >= warm:
                    memory.append(process.memory_info().rss)
            for one in done:
                one.result()
        files = sorted(path.name for path in Path(folder).rglob("*") if path.is_file())
    tail = memory[-max(1, len(memory) // 10) :]
    first, last = memory[0] / 2**20, sum(tail) / len(tail) / 2**20
    return {
        "minutes": minutes, "asked": dict(asked), "unexpected": dict(unexpected), "mib_warm": first, "mib_end": last,
        "growth": last / first - 1, "files": files,
    }  # fmt: skip


def _sentence(port: int, chance: random.Random) -> str:
    kind = chance.choice(["wav", "mp3", "opus", "flac", "pcm"])
    status, body = speak(port, chance.choice(SENTENCES), chance.choice(["heart", "default"]), response_format=kind)
    return "" if status == 200 and len(body) > 100 else f"{status}, {len(body)} bytes"


def _long(port: int, chance: random.Random) -> str:
    status, body = speak(port, " ".join(chance.sample(SENTENCES, 6)), seed=chance.randrange(9))
    return "" if status == 200 and len(body) > 1000 else f"{status}, {len(body)} bytes"


def _leaves(port: int, chance: random.Random) -> str:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"input": " ".join(SENTENCES[:5]), "voice": "heart", "response_format": "wav"})
    connection.request("POST", "/v1/audio/speech", body, {"Content-Type": "application/json"})
    time.sleep(chance.random() * 3)
    connection.close()
    return ""


def _wrong(port: int, chance: random.Random) -> str:
    bodies = [b"{", b'{"input": ""}', b'{"input": "x", "voice": "../../etc"}', b'{"input": "x", "model": "none"}']
    status, _ = ask(port, "POST", "/v1/audio/speech", chance.choice(bodies))
    return "" if status in (400, 404, 422) else str(status)


def _voice(port: int, chance: random.Random) -> str:
    name = f"v{chance.randrange(10**9)}"
    found = [add_voice(port, name), speak(port, "Good morning.", name)[0]]
    found.append(ask(port, "DELETE", f"/v1/audio/voices/{name}")[0])
    return "" if found == [200] * 3 else str(found)


def _looks(port: int, chance: random.Random) -> str:
    found = [ask(port, "GET", path)[0] for path in ("/health", "/metrics", "/v1/models", "/v1/audio/voices")]
    return "" if found == [200] * 4 else str(found)


KINDS = {
    "sentence": _sentence,
    "long text": _long,
    "leaves": _leaves,
    "wrong": _wrong,
    "voice": _voice,
    "looks": _looks,
}


def main() -> int:
    """Measure, print JSON, and say by the exit code whether it is within bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rate", "soak"))
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--batch-size", type=int, default=32)
    given = parser.parse_args()
    if given.what == "rate":
        found = measure_rate(given.batch_size)
        good = not found["failed"] and found["ratio"] >= LEAST_RATIO
    else:
        found = soak(given.minutes)
        good = not found["unexpected"] and found["growth"] <= MOST_GROWTH
    print(json.dumps(found, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())

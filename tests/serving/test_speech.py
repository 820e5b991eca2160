"""What the server speaks is what `speechtune generate` speaks, whoever else asks; in every format, at any length."""

import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from starlette.testclient import TestClient

from conftest import ROWS, Serve
from helpers import DemoClip
from speechtune.cli import main
from speechtune.inference.sentences import cut_text

TEXT = "Hello there."


def spoken(client: TestClient, text: str = TEXT, **more: Any) -> np.ndarray:
    """The samples of an answer, as 16-bit numbers."""
    answer = client.post("/v1/audio/speech", json={"input": text, "response_format": "wav", "voice": "me", **more})
    assert answer.status_code == 200, answer.text
    return samples(answer.content)


def samples(wav: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(wav), dtype="int16")[0]


@pytest.fixture
def generate(tiny_base: Path, reference: DemoClip, tmp_path: Path) -> Callable[..., np.ndarray]:
    """What the command line speaks in the same voice."""

    def run(text: str, *more: object, voice: bool = True) -> np.ndarray:
        out = tmp_path / "generated.wav"
        words = ["generate", "--text", text, "--out", out, "--cache-dir", tmp_path / "cache", "--max-new-tokens", ROWS]
        words += ["--model", tiny_base / "model", "--codec", tiny_base / "codec", *more]
        words += ["--reference", reference.path, "--reference-text", reference.text] if voice else []
        assert main([str(word) for word in words]) == 0
        return soundfile.read(out, dtype="int16")[0]

    return run


def test_adapters_at_once_answer_as_generate_does(
    serve: Serve, add_voice: Callable[..., Any], generate: Callable[..., np.ndarray], adapter_run: Path
) -> None:
    """Twelve requests at a time for the base and two adapters, in batches with other texts and seeds."""
    adapters = {"a": adapter_run / "lora_adapters", "b": adapter_run / "checkpoint-2"}
    client = serve(adapters)
    assert add_voice(client).status_code == 200
    assert add_voice(client, "half", adapter="a", strength="0.5").status_code == 200
    asked = [{"model": model, "seed": seed} for model in ("base", "a", "b") for seed in (1, 2)]
    asked += [{"voice": "half", "seed": seed} for seed in (1, 2)]
    texts = [TEXT, "Another sentence, which is longer."]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda one: spoken(client, texts[0], **one), asked))
        list(pool.map(lambda one: spoken(client, texts[1], **one), asked))
        again = list(pool.map(lambda one: spoken(client, texts[0], **one), reversed(asked)))
    flags = {"base": (), "a": ("--adapter", adapters["a"]), "b": ("--adapter", adapters["b"])}
    # a prompt of the training goes with an adapter, and the base alone has none
    for one, answer, other in zip(asked, answers, reversed(again), strict=True):
        words = flags[one["model"]] if "model" in one else (*flags["a"], "--strength", "0.5")
        assert np.array_equal(answer, generate(texts[0], "--seed", one["seed"], *words)), one
        assert np.array_equal(answer, other)
    assert len({answer.tobytes() for answer in answers}) == len(asked), "each adapter and seed has another answer"
    sizes = client.get("/metrics").text
    assert "speechtune_batch_size_bucket" in sizes


def test_an_adapter_added_under_load_changes_no_running_answer(
    serve: Serve, add_voice: Callable[..., Any], adapter_run: Path, generate: Callable[..., np.ndarray], tmp_path: Path
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "later").symlink_to(adapter_run / "checkpoint-2")
    client = serve({"a": adapter_run / "lora_adapters"}, root)
    add_voice(client)
    quiet = {model: spoken(client, model=model) for model in ("base", "a")}
    asked = ["base", "a"] * 8
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(spoken, client, model=model) for model in asked]
        added = client.post("/v1/adapters", json={"name": "later"})
        assert added.status_code == 200 and added.json()["effect"] > 0
        for model, answer in zip(asked, running, strict=True):
            assert np.array_equal(answer.result(), quiet[model])
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["base", "a", "later"]
    assert np.array_equal(spoken(client, model="later"), generate(TEXT, "--adapter", root / "later"))


@pytest.mark.parametrize("kind", ["wav", "flac", "mp3", "opus", "pcm"])
@pytest.mark.parametrize("text", [TEXT, "Hello there. How are you?"], ids=["one piece", "streamed"])
def test_formats(kind: str, text: str, serve: Serve, add_voice: Callable[..., Any]) -> None:
    """A long text and a short one can be read to their ends; what says so in the file says that it was generated."""
    client = serve()
    add_voice(client)
    expected = spoken(client, text)
    answer = client.post("/v1/audio/speech", json={"input": text, "response_format": kind, "voice": "me"})
    assert answer.status_code == 200
    if kind == "pcm":
        assert answer.headers["content-type"] == "audio/pcm;rate=24000"
        assert np.array_equal(np.frombuffer(answer.content, "<i2"), expected)
        return
    with soundfile.SoundFile(io.BytesIO(answer.content)) as file:
        found, comment = file.read(10**7, dtype="int16"), json.loads(file.comment)
    assert comment["generated"] is True and comment["adapter_strength"] is None
    if kind in ("wav", "flac"):
        assert len(found) == len(expected)
        assert int(np.abs(found.astype(int) - expected).max()) <= (kind == "flac")  # libsndfile rounds otherwise there
    else:
        assert abs(len(found) - len(expected)) < 3000  # frames of an encoder, and its delay
        assert 0.5 < float(np.abs(found).mean() / np.abs(expected).mean()) < 2


def test_a_long_text_is_spoken_piece_by_piece(
    serve: Serve, add_voice: Callable[..., Any], generate: Callable[..., np.ndarray]
) -> None:
    """3,000 characters: each sentence is spoken once, in its place, as `generate` speaks it."""
    sentences = [f"Number {word} of all of them goes here." for word in ("one", "two", "three", "four")]
    text = " ".join(sentences * 20)
    assert len(text) > 3000 and cut_text(text) == sentences * 20
    client = serve(max_new_tokens=12, batch_size=8)
    add_voice(client)
    pieces = [generate(sentence, "--max-new-tokens", 12) for sentence in sentences]
    assert len({piece.tobytes() for piece in pieces}) == 4
    with client.stream(
        "POST", "/v1/audio/speech", json={"input": text, "response_format": "wav", "voice": "me"}
    ) as answer:
        chunks = list(answer.iter_raw())
    assert len(chunks) > 20, "streamed"
    assert np.array_equal(samples(b"".join(chunks)), np.concatenate(pieces * 20))


def test_without_a_reference_the_first_piece_is_the_reference_of_the_others(
    serve: Serve, generate: Callable[..., np.ndarray], tmp_path: Path, tiny_base: Path
) -> None:
    client = serve()
    found = spoken(client, "Hello there. How are you?", voice="default")
    first = generate("Hello there.", voice=False)
    assert np.array_equal(found[: len(first)], first)
    alone = generate("How are you?", voice=False)
    assert len(found) > len(first) and not np.array_equal(found[len(first) :], alone)


def test_voices_stay(serve: Serve, add_voice: Callable[..., Any], adapter_run: Path) -> None:
    adapters = {"a": adapter_run / "lora_adapters"}
    client = serve(adapters)
    assert add_voice(client, "kept", adapter="a", strength="0.25").json()["strength"] == 0.25
    assert add_voice(client, "kept").status_code == 409
    before = spoken(client, voice="kept")
    client.__exit__()
    again = serve(adapters)
    assert [voice["name"] for voice in again.get("/v1/audio/voices").json()["data"]] == ["kept"]
    assert np.array_equal(spoken(again, voice="kept"), before)
    assert again.delete("/v1/audio/voices/kept").json() == {"id": "kept", "deleted": True}
    assert again.delete("/v1/audio/voices/kept").status_code == 404
    assert again.post("/v1/audio/speech", json={"input": TEXT, "voice": "kept"}).status_code == 404

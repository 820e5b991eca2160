"""A server on the tiny base, in this process."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from helpers import DemoClip
from speechtune.inference.adapter_set import AdapterSet
from speechtune.serving.app import create_app
from speechtune.serving.service import Limits, Service

ROWS = 24
Serve = Callable[..., TestClient]


@pytest.fixture(scope="module")
def models(tiny_base: Path) -> AdapterSet:
    """The tiny base with its codec; servers of one module share it, one after another."""
    return AdapterSet(str(tiny_base / "model"), {"codec_path": str(tiny_base / "codec")})


@pytest.fixture
def serve(models: AdapterSet, tmp_path: Path) -> Iterator[Serve]:
    """Start a server, with folders of adapters by name; what it is given besides is limits, or the application's."""
    with ExitStack() as stack:

        def start(
            adapters: dict[str, Path] | None = None,
            root: Path | None = None,
            api_key: str | None = None,
            models: AdapterSet = models,
            body_seconds: float = 30.0,
            **limits: Any,
        ) -> TestClient:
            limits = {"batch_size": 4, "max_new_tokens": ROWS} | limits
            folder = tmp_path / "server"
            app = create_app(
                lambda: Service(models, folder, Limits(**limits), adapters, root), api_key, body_seconds=body_seconds
            )
            folder.mkdir(exist_ok=True)
            client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
            return stack.enter_context(client)

        yield start


@pytest.fixture
def reference(demo_clips: list[DemoClip]) -> DemoClip:
    """The shortest of the shipped clips."""
    return min(demo_clips, key=lambda clip: clip.duration_seconds)


@pytest.fixture
def add_voice(reference: DemoClip) -> Callable[..., Any]:
    """Register a voice; returns the answer."""

    def add(client: TestClient, name: str = "me", **fields: Any) -> Any:
        sound = {"audio_sample": ("../../../etc/passwd", fields.pop("audio", reference.path.read_bytes()))}
        return client.post("/v1/audio/voices", data={"name": name, "text": reference.text, **fields}, files=sound)

    return add

"""The HTTP interface of a service: OpenAI's speech endpoint, voices, pronunciation, models, health, metrics."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, FastAPI, Path, Request, Response
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from speechtune import __version__
from speechtune.data.row_parser import text_issues
from speechtune.inference.sentences import cut_text
from speechtune.serving import schemas
from speechtune.serving.errors import CLIENT_LEFT, Refused, add_error_handlers
from speechtune.serving.formats import AudioStream, Format
from speechtune.serving.guard import Count, Guard
from speechtune.serving.metrics import MEDIA_TYPE
from speechtune.serving.service import BASE, Service
from speechtune.serving.voices import NAME, Voice
from speechtune.types import AudioRef, GenerationOptions, Output

MAX_JSON_BYTES = 2**20
MAX_UPLOAD_BYTES = 32 * 2**20
BODY_SECONDS = 30.0
WHOLE: frozenset[Format] = frozenset({"flac"})
"""Formats whose readers need the length at the beginning: sent when all of it is there."""
T = TypeVar("T")


class _Form(MultiPartParser):
    """Keeps uploads in memory: the guard has limited their size, and nothing is written outside the server's folder."""

    spool_max_size = MAX_UPLOAD_BYTES


class _TimedStream(StreamingResponse):
    """A stream that ends with the deadline, however slowly it is read."""

    seconds = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.timeout(self.seconds):
            await super().__call__(scope, receive, send)


def create_app(load: Callable[[], Service], api_key: str | None, *, body_seconds: float = BODY_SECONDS) -> FastAPI:
    """The application; `load` makes the service in the event loop when it starts.

    Without an `api_key` only requests to a loopback address are answered.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = app.state.service = load()
        await service.start()
        yield
        await service.close()

    app = FastAPI(
        title="speechtune serve", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        responses=schemas.ERRORS,
    )  # fmt: skip
    app.include_router(router)
    app.add_middleware(Count)
    limits = {"max_json_bytes": MAX_JSON_BYTES, "max_upload_bytes": MAX_UPLOAD_BYTES, "body_seconds": body_seconds}
    app.add_middleware(Guard, api_key=api_key, **limits)
    add_error_handlers(app)
    return app


router = APIRouter()


def _service(request: Request, ability: str | None = None) -> Service:
    """The service that a request came to, which must be able to do what it asks for."""
    service: Service = request.app.state.service
    if ability is not None and ability not in service.models.family.abilities:
        raise Refused(404, f"this server's model does not {ability}", "not_served")
    return service


@router.get("/health")
async def health(request: Request) -> schemas.Health:
    """That the server answers."""
    return schemas.Health(waiting=len(_service(request).batches))


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    return Response(_service(request).metrics.text(), headers={"Content-Type": MEDIA_TYPE})


@router.get("/v1/models")
async def models(request: Request) -> schemas.Models:
    """The base and the adapters that are in use."""
    adapters = _service(request).adapters.describe()
    listed = [schemas.ModelInfo(id=name, effect=effect) for name, effect in adapters.items()]
    return schemas.Models(data=[schemas.ModelInfo(id=BASE), *listed])


@router.post("/v1/adapters")
async def add_adapter(request: Request, body: schemas.AdapterBody) -> schemas.ModelInfo:
    """Verify an adapter, and prove that it is active, before its name may be used."""
    service = _service(request)
    if service.adapters.find(body.name) is None:
        raise Refused(404, f"no adapter {body.name!r} among those that this server may use", "not_found", "name")
    adapter = await service.adapters.register(body.name)
    return schemas.ModelInfo(id=body.name, effect=adapter.effect)


@router.get("/v1/audio/voices")
async def voices(request: Request) -> schemas.Voices:
    """All registered voices."""
    return schemas.Voices(data=[_info(voice) for voice in _service(request).voices])


def _info(voice: Voice) -> schemas.VoiceInfo:
    return schemas.VoiceInfo(**voice.model_dump(exclude={"audio"}))


@router.post("/v1/audio/voices", openapi_extra=schemas.VOICE_FORM)
async def add_voice(request: Request) -> schemas.VoiceInfo:
    """Register a voice."""
    service = _service(request, "speak")
    fields = await _read_form(request, schemas.VOICE_FORM)
    recording = fields.pop("audio_sample")
    assert isinstance(recording, bytes)
    try:  # the recording afterwards, as it is: the field reads base64
        voice = Voice.model_validate({**fields, "audio": b""}).model_copy(update={"audio": recording})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Refused(422, f"{where}: {first['msg']}", "invalid_value", where) from None
    _require_speakable(voice.text, "text")
    if service.voices.get(voice.name) is not None:
        raise Refused(409, f"there is a voice {voice.name!r} already: delete it first", "exists", "name")
    if voice.adapter is not None and service.adapters.find(voice.adapter) is None:
        raise Refused(404, f"no adapter {voice.adapter!r}", "not_found", "adapter")
    await service.add_voice(voice)
    return _info(voice)


def _require_speakable(text: str, where: str) -> None:
    if not any(character.isalnum() for character in text):
        raise Refused(422, f"{where}: there is nothing to say in it", "empty_text", where)
    for code, message in text_issues(text, where):
        raise Refused(422, message, code, where)


@router.delete("/v1/audio/voices/{name}")
async def remove_voice(request: Request, name: Annotated[str, Path(pattern=NAME)]) -> schemas.Deleted:
    """Forget a voice; what is being spoken with it goes on."""
    if not _service(request).remove_voice(name):
        raise Refused(404, f"no voice {name!r}", "not_found", "name")
    return schemas.Deleted(id=name)


@router.post("/v1/audio/speech", response_class=Response, responses=schemas.AUDIO)
async def speech(request: Request, body: schemas.SpeechBody) -> Response:
    """Speak a text."""
    started, service = time.monotonic(), _service(request, "speak")
    if len(body.input) > service.limits.max_characters:
        most = service.limits.max_characters
        raise Refused(413, f"the text has {len(body.input)} characters, {most} are taken", "text_too_long", "input")
    _require_speakable(body.input, "input")
    chosen = service.choose(body.model, body.voice)
    pieces, options = cut_text(body.input), GenerationOptions(temperature=body.temperature, seed=body.seed)
    origin = await service.origin(chosen)
    stream = AudioStream(body.response_format, service.models.family.sampling_rate, origin)
    whole = len(pieces) == 1 or body.response_format in WHOLE
    chunks = _encoded(stream, service.speak(pieces, chosen, options), whole)
    first = await _until_left(request, anext(chunks))  # what cannot be spoken is told before the answer begins
    service.metrics.first_audio.observe(time.monotonic() - started)
    response = _TimedStream(_joined(first, chunks), media_type=stream.media_type)
    response.seconds = service.limits.deadline_seconds - (time.monotonic() - started)
    return response


async def _encoded(
    stream: AudioStream, outputs: AsyncGenerator[Output, None], whole: bool
) -> AsyncGenerator[bytes, None]:
    """The bytes of a stream, at the least one piece: all at once, or as soon as there are any."""
    async with aclosing(outputs):
        async for output in outputs:
            if output.audio is None or not len(output.audio.samples):
                continue
            if whole:
                await asyncio.to_thread(stream.write, output.audio)
            elif data := await asyncio.to_thread(stream.add, output.audio):
                yield data
    yield await asyncio.to_thread(stream.end)


async def _joined(first: bytes, chunks: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with aclosing(chunks):
        yield first
        async for chunk in chunks:
            yield chunk


@router.post("/v1/pronunciation", openapi_extra=schemas.SCORE_FORM)
async def pronunciation(request: Request) -> dict[str, Any]:
    """Assess a recording, as `speechtune score` does."""
    service = _service(request, "assess pronunciation")
    fields = await _read_form(request, schemas.SCORE_FORM)
    recording, text = fields["file"], fields.get("text", "")
    adapter = service.choose_adapter(str(fields.get("model", BASE)))
    assert isinstance(recording, bytes) and isinstance(text, str)
    score = await _until_left(request, service.score(AudioRef(data=recording), text, adapter))
    values = score.to_json()
    # half of a surrogate pair in an answer is no UTF-8, but escaped it is JSON
    return json.loads(json.dumps({name: values[name] for name in values.keys() - {"id", "audio"}}))


async def _read_form(request: Request, form: dict[str, Any]) -> dict[str, str | bytes]:
    """Fields of a multipart body, of which `form` is the OpenAPI: texts, and the bytes of the file."""
    schema = form["requestBody"]["content"]["multipart/form-data"]["schema"]
    try:
        parser = _Form(request.headers, request.stream(), max_files=1, max_fields=len(schema["properties"]))
        parts = (await parser.parse()).multi_items()
    except (MultiPartException, LookupError, UnicodeError, ValueError) as error:
        reason = error.message if isinstance(error, MultiPartException) else "no multipart/form-data"
        raise Refused(400, f"the body cannot be read: {reason}", "bad_form") from None
    fields: dict[str, str | bytes] = {}
    for name, part in parts:
        is_file = isinstance(part, UploadFile)
        wants_file = schema["properties"].get(name, {}).get("format") == "binary"
        if name not in schema["properties"] or name in fields or is_file != wants_file:
            raise Refused(422, f"{name!r}: not a field of this form, given twice, or of another kind", "bad_form")
        fields[name] = await part.read() if isinstance(part, UploadFile) else part
        most = schema["properties"][name].get("maxLength")
        if most is not None and len(fields[name]) > most:
            raise Refused(422, f"{name}: at most {most} characters", "too_long", name)
    if missing := [name for name in schema["required"] if name not in fields]:
        raise Refused(422, f"missing: {', '.join(missing)}", "missing_field", missing[0])
    return fields


async def _until_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled when the client leaves."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait([task, left], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refused(CLIENT_LEFT, "the client left", "client_left")
        return task.result()
    finally:
        left.cancel()
        task.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""Bodies of requests and answers, as OpenAI's API and its client have them; what would do nothing is refused."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from speechtune.serving.formats import KINDS, Format
from speechtune.serving.service import BASE
from speechtune.serving.voices import MAX_STRENGTH, NAME, NO_REFERENCE, Name

MAX_SEED = 2**63 - 1
MODEL = "`base`, or the name of an adapter, for voices without one"


class SpeechBody(BaseModel, frozen=True, extra="forbid"):
    """A text to be spoken."""

    input: str = Field(min_length=1, description="The text, of any length up to the server's limit.")
    model: str = Field(default=BASE, max_length=200, description=MODEL)
    voice: str = Field(default=NO_REFERENCE, max_length=200, description="A registered voice; `default` is none.")
    response_format: Format = Field(default="mp3", description="The sampling rate is the model's.")
    seed: int = Field(default=42, ge=0, le=MAX_SEED, description="As `--seed` of `speechtune generate`.")
    temperature: float | None = Field(default=None, ge=0, le=10, allow_inf_nan=False, description="0 is greedy.")
    speed: Literal[1] = Field(default=1, description="No other is offered.")
    stream_format: Literal["audio"] = Field(default="audio", description="No other is offered.")


class AdapterBody(BaseModel, frozen=True, extra="forbid"):
    """An adapter to be used from now on."""

    name: Name = Field(description="Name of its folder among those that the server may use.")


class VoiceInfo(BaseModel, frozen=True):
    """A voice without its recording."""

    name: str
    text: str
    adapter: str | None
    strength: float


class Voices(BaseModel, frozen=True):
    """All registered voices."""

    data: list[VoiceInfo]


class ModelInfo(BaseModel, frozen=True):
    """The base or an adapter; `effect` is by how much an adapter was seen to move the base's logits."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "speechtune"
    effect: float | None = None


class Models(BaseModel, frozen=True):
    """The base and the adapters that are in use."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class Health(BaseModel, frozen=True):
    """That the server answers, and how much waits."""

    status: Literal["ok"] = "ok"
    waiting: int


class Deleted(BaseModel, frozen=True):
    """A voice that is gone."""

    id: str
    deleted: Literal[True] = True


class Error(BaseModel, frozen=True):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel, frozen=True):
    """An error in the form of OpenAI's API."""

    error: Error


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": what}
    for status, what in {
        400: "not readable",
        401: "no API key, or a wrong one",
        403: "asked from elsewhere",
        404: "no such name",
        408: "the body did not arrive in time",
        413: "too large",
        422: "cannot be used; the message says why",
        429: "too many requests at a time; `Retry-After` says when to come back",
        504: "not answered in time",
    }.items()
}
AUDIO: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The audio, sent while it is generated where the format allows it.",
        "content": {kind.media_type: {"schema": {"type": "string", "format": "binary"}} for kind in KINDS.values()},
    }
}


def form(required: list[str], **fields: dict[str, Any]) -> dict[str, Any]:
    """OpenAPI of a multipart body; read by hand, because the framework's own reader would write it to the disk."""
    schema = {"type": "object", "properties": fields, "required": required, "additionalProperties": False}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


FILE = {"type": "string", "format": "binary", "description": "A recording in any format that libsndfile reads."}
VOICE_FORM = form(
    ["name", "text", "audio_sample"],
    name={"type": "string", "pattern": NAME},
    text={"type": "string", "minLength": 1, "maxLength": 2000, "description": "What is said in it, word for word."},
    audio_sample=FILE,
    adapter={"type": "string", "pattern": NAME, "description": "Adapter that speaks with it."},
    strength={
        "type": "number",
        "minimum": 0,
        "maximum": MAX_STRENGTH,
        "description": "How much of it counts.",
    },
)
SCORE_FORM = form(
    ["file"],
    file=FILE,
    text={"type": "string", "maxLength": 2000, "description": "What was to be read; phones are aligned with it."},
    model={"type": "string", "maxLength": 200, "description": MODEL},
)

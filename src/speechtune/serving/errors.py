"""Errors as answers: of requests, of what they ask for, and of the server."""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from speechtune.errors import SpeechtuneError
from speechtune.serving.guard import error_response
from speechtune.serving.service import NotFound

CLIENT_LEFT = 499


class Refused(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def add_error_handlers(app: FastAPI) -> None:
    """Let every error be answered in the form of OpenAI's API."""
    app.exception_handler(Refused)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(NotFound)(_not_found)
    app.exception_handler(SpeechtuneError)(_not_usable)
    app.exception_handler(TimeoutError)(_too_late)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(Exception)(_failed)


async def _refused(request: Request, error: Refused) -> JSONResponse:
    return error_response(error.status, str(error), error.code, error.param)


async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])
    unreadable = first["type"] == "json_invalid"
    message = f"{where}: {first['msg']}" if where else str(first["msg"])
    return error_response(400 if unreadable else 422, message, "invalid_value", where or None)


async def _not_found(request: Request, error: NotFound) -> JSONResponse:
    return error_response(404, str(error), "not_found", error.param)


async def _not_usable(request: Request, error: SpeechtuneError) -> JSONResponse:
    return error_response(422, str(error), type(error).__name__)


async def _too_late(request: Request, error: TimeoutError) -> JSONResponse:
    return error_response(504, "not answered within the server's deadline", "deadline")


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    return error_response(error.status_code, str(error.detail), "http_error", headers=error.headers)


async def _failed(request: Request, error: Exception) -> JSONResponse:
    return error_response(500, "the server met an error; its log has more", "internal_error")

"""Before any handler: who may ask, from where, and how much a request may carry."""

import asyncio
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

KIND = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


def error_response(
    status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error in the form of OpenAI's API."""
    kind = KIND.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers)


@dataclass(frozen=True, slots=True)
class Guard:
    """Middleware that refuses requests before their handlers see them.

    Attributes:
        app: what it guards.
        api_key: asked for everywhere but at /health; None asks nobody, and takes requests to a loopback address alone,
            so that no page in a browser reaches the server under another name.
        max_json_bytes, max_upload_bytes: largest body, in general and of multipart.
        body_seconds: time for a body to arrive.
    """

    app: ASGIApp
    api_key: str | None
    max_json_bytes: int
    max_upload_bytes: int
    body_seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer by an error, or hand on the request with its body."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._refused(scope["path"], headers)
        if refused is None:
            body = await self._read(headers, receive)
            if isinstance(body, bytes):
                await self.app(scope, _replay(body, receive), send)
                return
            refused = body
        await refused(scope, receive, send)

    def _refused(self, path: str, headers: Headers) -> JSONResponse | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return error_response(403, "requests from pages of other sites are refused", "forbidden_origin")
        if self.api_key is None:
            if _host_name(host) not in LOOPBACK:
                return error_response(403, "without an API key only localhost is served", "forbidden_host")
        elif path != "/health":
            kind, _, key = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(key.strip().encode(), self.api_key.encode())
            if kind.lower() != "bearer" or not right:
                asked, told = {"WWW-Authenticate": "Bearer"}, "send the server's API key as a bearer token"
                return error_response(401, told, "invalid_api_key", headers=asked)
        return None

    async def _read(self, headers: Headers, receive: Receive) -> bytes | JSONResponse:
        multipart = headers.get("content-type", "").lower().startswith("multipart/")
        most = self.max_upload_bytes if multipart else self.max_json_bytes
        too_large = error_response(413, f"the body may have {most} bytes at the most", "body_too_large")
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > most:
            return too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message: Message = await receive()
                    body += message.get("body", b"")
                    if len(body) > most:
                        return too_large
                    if message["type"] != "http.request" or not message.get("more_body"):
                        return bytes(body)
        except TimeoutError:
            return error_response(408, f"no complete body within {self.body_seconds:g} s", "body_timeout")


@dataclass(slots=True)
class Count:
    """Middleware that counts requests, and refuses those that are too many at a time."""

    app: ASGIApp
    active: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on the request, or send its client away for a while."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        service, started, status = scope["app"].state.service, time.monotonic(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self.active += 1
        try:
            if self.active > service.limits.max_requests and scope["method"] == "POST":
                seconds = str(service.batches.wait_seconds())
                busy = error_response(429, f"busy: come back in {seconds} s", "busy", None, {"Retry-After": seconds})
                await busy(scope, receive, counted)
            else:
                await self.app(scope, receive, counted)
        finally:
            self.active -= 1
            endpoint = getattr(scope.get("route"), "path", "other")
            service.metrics.requests.labels(endpoint, str(status)).inc()
            service.metrics.seconds.labels(endpoint).observe(time.monotonic() - started)


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _replay(body: bytes, receive: Receive) -> Receive:
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay

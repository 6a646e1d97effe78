"""What is refused before Gradio sees it, and the cookie that tells visitors apart.

Gradio fetches files from any address that a request names as a file's path. Here nothing is fetched from anywhere, so
such requests are refused; so are uploads when the upload folder is full.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any

from starlette.responses import PlainTextResponse

from dora_diffusion.webapp.visitors import COOKIE, new_cookie, valid_cookie

__all__ = ["MOST_BYTES_A_FILE", "Guard"]

MOST_BYTES_A_FILE = 2 * 1024**3  # an adapter of a large base; pictures have a limit of their own
MOST_BYTES_IN_ALL = 8 * 1024**3
MOST_BYTES_OF_JSON = 8 * 1024**2
YEAR = 365 * 24 * 3600
FOREIGN = re.compile(r"^\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)

Scope = MutableMapping[str, Any]  # as ASGI has them
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI middleware around the whole app."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], uploads: Path) -> None:
        self.app = app
        self.uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refused_address(scope["path"]) or self._refused_upload(scope, headers)
        if refused is None and scope["method"] == "POST" and "json" in headers.get("content-type", ""):
            body = await _read(receive)
            refused = _refused_body(body)
            receive = _again(body, receive)
        if refused is not None:
            await refused(scope, receive, send)
            return
        await self.app(scope, receive, send if _has_cookie(headers) else _with_cookie(send))

    def _refused_address(self, path: str) -> PlainTextResponse | None:
        _, fetched, target = path.partition("/file=")
        if (fetched and FOREIGN.match(target)) or "/proxy=" in path:
            return PlainTextResponse("This server fetches nothing from other addresses.", 403)
        return None

    def _refused_upload(self, scope: Scope, headers: dict[str, str]) -> PlainTextResponse | None:
        if scope["method"] != "POST" or not scope["path"].rstrip("/").endswith("/upload"):
            return None
        length = headers.get("content-length", "")
        if not length.isdigit():
            return PlainTextResponse("Uploads must say how long they are.", 411)
        if int(length) > MOST_BYTES_A_FILE:
            return PlainTextResponse("These files are larger than 2 GB together.", 413)
        if int(length) + _size(self.uploads) > MOST_BYTES_IN_ALL:
            return PlainTextResponse("The upload folder is full. Try again in an hour, when old files are gone.", 507)
        return None


async def _read(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MOST_BYTES_OF_JSON or not message.get("more_body"):
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """The body that was read, once more; then whatever comes, such as the news that the visitor has gone."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _refused_body(body: bytes) -> PlainTextResponse | None:
    if len(body) > MOST_BYTES_OF_JSON:
        return PlainTextResponse("This request is too large.", 413)
    try:
        names_address = _names_address(json.loads(body)) if b"path" in body else False
    except (ValueError, RecursionError):
        return PlainTextResponse("This request is not JSON.", 400)
    return PlainTextResponse("Files must be uploaded; none is fetched.", 403) if names_address else None


def _names_address(value: object) -> bool:
    """Whether a file's path in it is an address of some other place."""
    if isinstance(value, dict):
        path = value.get("path")
        return (isinstance(path, str) and bool(FOREIGN.match(path))) or any(map(_names_address, value.values()))
    return isinstance(value, list) and any(map(_names_address, value))


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # deleted meanwhile
            continue
    return total


def _has_cookie(headers: dict[str, str]) -> bool:
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return False
    return morsel is not None and valid_cookie(morsel.value)


def _with_cookie(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            cookie = f"{COOKIE}={new_cookie()}; Path=/; Max-Age={YEAR}; HttpOnly; SameSite=Strict"
            message = {**message, "headers": [*message.get("headers", []), (b"set-cookie", cookie.encode())]}
        await send(message)

    return sending

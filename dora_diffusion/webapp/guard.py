"""What is refused before Gradio sees it, and the cookie that tells visitors apart.

Gradio reads and fetches what a request names as a file's path, takes uploads from any page, and prints what it cannot
parse. Here a request is parsed first and judged by what it says; what goes on is written anew from that.
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import gradio as gr
from starlette.formparsers import MultiPartException
from starlette.requests import cookie_parser

from dora_diffusion.webapp.arguments import NOT_YOURS, foreign_file, in_words, unfit
from dora_diffusion.webapp.calls import Call, Message, Receive, again, parsed, read, written
from dora_diffusion.webapp.doors import API, Door, Refused, door_of, refuse_foreign_pages
from dora_diffusion.webapp.logins import Logins
from dora_diffusion.webapp.received import Received
from dora_diffusion.webapp.visitors import COOKIE, cookie_for, new_cookie, valid_cookie, visitor_known_by

__all__ = ["MOST_BYTES_A_FILE", "Guard"]

MOST_BYTES_A_FILE = 2 * 1024**3  # an adapter of a large base; pictures have a limit of their own
MOST_BYTES_IN_ALL = 8 * 1024**3
MOST_BYTES_OF_JSON = 8 * 1024**2
MOST_BYTES_OF_LOGIN = 64 * 1024
MOST_SESSIONS = 20_000
LOOK_EVERY = 16 * 1024**2  # bytes of an upload between looks at the folder
FULL = "The upload folder is full. Try again in an hour, when old files are gone."
YEAR = 365 * 24 * 3600

Scope = MutableMapping[str, Any]  # as ASGI has them
Send = Callable[[Message], Awaitable[None]]
log = logging.getLogger(__name__)


class Guard:
    """ASGI middleware around the whole app. `page` has the functions that can be called, `uploads` is their folder."""

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], page: gr.Blocks, uploads: Path, received: Received
    ) -> None:
        self.app = app
        self.page = page
        self.uploads = uploads
        self.received = received
        self.logins = Logins()
        self._sessions: OrderedDict[str, str] = OrderedDict()  # of pages, each with its visitor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = Asked(scope)
        answer = _Answer(send)
        try:
            receive = await self._let_in(asked, receive, answer)
            await self.app(asked.scope, receive, answer)
        except Refused as refused:
            await refused.response()(scope, receive, answer)
        except Exception as error:  # Gradio's own, on a shape of request that nobody foresaw
            log.warning("%s %r was not answered: %s: %s", asked.method, asked.path[:80], type(error).__name__, error)
            await answer.give_up(scope, receive)

    async def _let_in(self, asked: Asked, receive: Receive, answer: _Answer) -> Receive:
        """The body as Gradio is to have it. Raises Refused."""
        if "content-length" in asked.headers and "transfer-encoding" in asked.headers:
            raise Refused(400, "This request says its length twice.")
        refuse_foreign_pages(asked.method, asked.path, asked.headers)
        door = door_of(asked.method, asked.path)
        asked.identify(door)
        answer.cookie = asked.given
        match door:
            case "look":
                self._look(asked)
                return receive
            case "upload":
                return self._upload(asked, receive, answer)
            case "login":
                return await self._login(asked, receive, answer)
        value = parsed(await read(receive, MOST_BYTES_OF_JSON))
        if door == "call":
            value = self._judged(asked, value)
        elif foreign_file(value, asked.visitor(), self.received):
            raise Refused(403, NOT_YOURS)
        body = written(value)
        asked.set_header("content-length", str(len(body)))
        asked.drop_header("transfer-encoding")
        return again(body, receive)

    def _look(self, asked: Asked) -> None:
        _, is_file, target = asked.path.partition(f"{API}file=")
        if is_file and ("://" in target or target.lstrip().startswith("//")):
            raise Refused(403, "This server fetches nothing from other addresses.")
        if is_file and not self.received.may_see(target, asked.visitor()):
            raise Refused(403, NOT_YOURS)
        if asked.session:
            self._refuse_foreign_session(asked.session, asked.visitor(asked.session))

    def _judged(self, asked: Asked, value: Any) -> object:
        if asked.path.rstrip("/").rpartition("/")[2] in ("cancel", "reset"):
            session = str(value.get("session_hash")) if isinstance(value, dict) else ""
            self._refuse_foreign_session(session, asked.visitor(session))
            return value
        call = Call.of(self.page, asked.path, value)
        visitor = asked.visitor(call.session)
        if call.session:
            self._refuse_foreign_session(call.session, visitor)
        if foreign_file(value, visitor, self.received):
            raise Refused(403, NOT_YOURS)
        if wrong := unfit(call.function, call.data):
            listed = [
                {"__type__": "validate", "is_valid": False, "parameter_name": name, "message": what}
                for name, what in wrong.items()
            ]
            raise Refused(422, in_words(wrong), detail=listed)
        if call.session and call.is_pages:
            self._sessions[call.session] = visitor
            self._sessions.move_to_end(call.session)
            if len(self._sessions) > MOST_SESSIONS:
                self._sessions.popitem(last=False)
        return call.body

    def _refuse_foreign_session(self, session: str, visitor: str) -> None:
        """What a page holds is for the visitor who opened it, whoever else knows its session's name."""
        if self._sessions.get(session, visitor) != visitor:
            raise Refused(403, "This page was opened by another visitor. Reload it.")

    async def _login(self, asked: Asked, receive: Receive, answer: _Answer) -> Receive:
        body = await read(receive, MOST_BYTES_OF_LOGIN)
        self.logins.attempt(asked.address)
        answer.when_good = lambda _: self.logins.succeeded(asked.address)
        return again(body, receive)

    def _upload(self, asked: Asked, receive: Receive, answer: _Answer) -> Receive:
        length = asked.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):
            raise Refused(411, "Uploads must say how long they are.")
        if int(length) > MOST_BYTES_A_FILE:
            raise Refused(413, "These files are larger than 2 GB together.")
        if int(length) + _size(self.uploads) > MOST_BYTES_IN_ALL:
            raise Refused(507, FULL)
        owners = {
            asked.visitor(),
            *([] if asked.came_with_cookie else [visitor_known_by(cookie_for(asked.address), "")]),
        }
        answer.when_good = lambda body: self.received.add(json.loads(body), *owners)
        return self._measured(receive)

    def _measured(self, receive: Receive) -> Receive:
        """Counts what arrives. Gradio's parser deletes what it has written when it is told so by its own exception."""
        got = looked = 0

        async def counting() -> Message:
            nonlocal got, looked
            message = await receive()
            if message["type"] == "http.disconnect":
                raise MultiPartException("The upload broke off.")
            got += len(message.get("body", b""))
            if got > MOST_BYTES_A_FILE:
                raise MultiPartException("The maximum allowed size is 2 GB for the files together.")
            if got >= looked + LOOK_EVERY:
                looked = got
                if _size(self.uploads) > MOST_BYTES_IN_ALL:
                    raise MultiPartException(f"The maximum allowed size is reached. {FULL}")
            return message

        return counting


class Asked:
    """One request, and who sent it."""

    def __init__(self, scope: Scope) -> None:
        self.scope: Scope = {**scope, "headers": list(scope["headers"])}
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.address: str = (scope.get("client") or ("unknown",))[0]
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self.cookies = "; ".join(v.decode("latin-1") for n, v in scope["headers"] if n.lower() == b"cookie")
        self.cookie = _cookie_in(self.cookies)
        self.came_with_cookie = self.cookie is not None
        self.given: str | None = None  # the cookie that the answer is to bring

    def identify(self, door: Door) -> None:
        """MCP clients that keep no cookie are known by their address; everybody else is given one to keep."""
        if self.came_with_cookie:
            return
        if door == "mcp":
            self.cookie = cookie_for(self.address)
        else:
            self.given = new_cookie()
            if door == "upload":
                self.cookie = self.given
        if self.cookie:
            self.cookies = "; ".join(filter(None, (self.cookies, f"{COOKIE}={self.cookie}")))
            self.set_header("cookie", self.cookies)

    def visitor(self, session: str | None = None) -> str:
        return visitor_known_by(self.cookie, session)

    @cached_property
    def session(self) -> str | None:
        """The session that a request to look names."""
        inside = self.path.removeprefix(API)
        if inside.startswith("heartbeat/"):
            return inside.partition("/")[2]
        query = parse_qs(self.scope.get("query_string", b"").decode("latin-1"))
        return next(iter(query.get("session_hash", [])), None)

    def set_header(self, name: str, value: str) -> None:
        self.drop_header(name)
        self.scope["headers"].append((name.encode(), value.encode("latin-1")))

    def drop_header(self, name: str) -> None:
        self.scope["headers"] = [each for each in self.scope["headers"] if each[0].lower() != name.encode()]


class _Answer:
    """Sends what the app answers, with a cookie where one is due; tells what a good answer said before it is sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: list[Message] = []
        self.cookie: str | None = None
        self.when_good: Callable[[bytes], None] | None = None
        self.is_begun = self.is_over = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if self.cookie:
                cookie = f"{COOKIE}={self.cookie}; Path=/; Max-Age={YEAR}; HttpOnly; SameSite=Lax"
                message = {**message, "headers": [*message.get("headers", []), (b"set-cookie", cookie.encode())]}
            if message["status"] >= 300:
                self.when_good = None
        if self.when_good is None:
            await self._pass_on(message)
            return
        self._held.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.when_good(b"".join(each.get("body", b"") for each in self._held))
            self.when_good = None
            for each in self._held:
                await self._pass_on(each)

    async def _pass_on(self, message: Message) -> None:
        self.is_begun = True
        self.is_over = message["type"] == "http.response.body" and not message.get("more_body")
        await self._send(message)

    async def give_up(self, scope: Scope, receive: Receive) -> None:
        """End what was begun, or say that it cannot be answered."""
        self.when_good = None
        if not self.is_begun:
            await Refused(400, "This request cannot be answered.").response()(scope, receive, self)
        elif not self.is_over:
            await self({"type": "http.response.body", "body": b"", "more_body": False})


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except OSError:  # deleted meanwhile
            continue
    return total


def _cookie_in(header: str) -> str | None:
    """As Gradio reads it: what other apps of this host leave in the header must not hide ours."""
    value = cookie_parser(header).get(COOKIE)
    return value if valid_cookie(value) else None

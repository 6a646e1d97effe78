"""A request's body, read within a limit and judged as what it says, not as how it is written.

What goes on to Gradio is written anew from what was parsed, so that nobody reads anything else in it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.block_function import BlockFunction

from dora_diffusion.webapp.doors import API, Refused

__all__ = ["Call", "Message", "Receive", "again", "parsed", "read", "written"]

DEEPEST = 32
LARGEST = 2**63  # what seeds are kept in
NEEDED = ("data", "session_hash", "fn_index", "trigger_id")  # what else Gradio reads is for other apps
SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")

Message = MutableMapping[str, Any]  # as ASGI has them
Receive = Callable[[], Awaitable[Message]]


async def read(receive: Receive, most: int) -> bytes:
    """The whole body, whatever its header says of its length. Raises Refused."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Refused(400, "This request broke off.")
        body += message.get("body", b"")
        if len(body) > most:
            raise Refused(413, "This request is too large.")
        if not message.get("more_body"):
            return bytes(body)


def again(body: bytes, receive: Receive) -> Receive:
    """The body once more; then whatever comes, such as the news that the visitor has gone."""
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def parsed(body: bytes) -> Any:
    """The JSON in it. Raises Refused for what is none, or holds what nothing here asks for."""
    try:
        value = json.loads(body)
        trouble = _trouble(value, DEEPEST)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "This request is not JSON.") from error
    if trouble:
        raise Refused(400, f"This request holds {trouble}.")
    return value


def written(value: object) -> bytes:
    return json.dumps(value, allow_nan=False).encode()


def _trouble(value: object, depth: int) -> str:
    if depth == 0:
        return "lists inside lists without end"
    if isinstance(value, str):
        return _trouble_of_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "a number without bounds"
    if isinstance(value, (int, float)) and abs(value) > LARGEST:
        return "a number that is too large"
    inside: list[object] = []
    if isinstance(value, dict):
        inside = [*value, *value.values()]
    elif isinstance(value, list):
        inside = value
    return next((found for each in inside if (found := _trouble(each, depth - 1))), "")


def _trouble_of_text(text: str) -> str:
    if "\0" in text:
        return "text with a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "text that is no Unicode"
    return ""


@dataclass(frozen=True)
class Call:
    """One function of the page, asked for by its name or its number."""

    function: BlockFunction
    data: list[object]
    body: dict[str, object]  # as Gradio is given it
    session: str | None

    @classmethod
    def of(cls, page: gr.Blocks, path: str, value: object) -> Call:
        """Raises Refused for what no function of the page could be called with."""
        if not isinstance(value, dict) or not isinstance(value.get("data"), list):
            raise Refused(400, "This request has no list of data.")
        session, number = value.get("session_hash"), value.get("fn_index")
        if session is not None and not (isinstance(session, str) and SESSION.fullmatch(session)):
            raise Refused(400, "This session's name cannot be used.")
        if session is None and path.rstrip("/").endswith("/queue/join"):
            raise Refused(400, "This request names no session.")
        if number is not None and type(number) is not int:
            raise Refused(400, "fn_index must be a whole number.")
        function = _function(page, path, number)
        data = _filled(function, value["data"])
        body = {key: value[key] for key in NEEDED if key in value} | {"data": data}
        if type(body.get("trigger_id")) is not int:
            body.pop("trigger_id", None)
        return cls(function, data, body, session)

    @property
    def is_pages(self) -> bool:
        """Whether only the page calls it, within a session that holds what the visitor sees."""
        return self.function.api_visibility != "public"


def _function(page: gr.Blocks, path: str, number: int | None) -> BlockFunction:
    function = page.fns.get(number) if number is not None else None
    if number is None:
        name = path.removeprefix(API).rstrip("/").partition("/")[2]
        function = next((each for each in page.fns.values() if each.api_name == name), None)
    if function is None:
        raise Refused(404, "This server has no such function.")
    return function


def _filled(function: BlockFunction, data: list[object]) -> list[object]:
    """An argument for each input; a caller may leave out those that the server keeps itself."""
    fields: list[Any] = list(function.inputs)
    if len(data) != len(fields):
        given = [field for field in fields if not field.skip_api]
        if len(data) != len(given):
            raise Refused(400, f"This function takes {len(given)} arguments, and {len(data)} were given.")
        rest = iter(data)
        data = [None if field.skip_api else next(rest) for field in fields]
    return data

"""Which requests are let in at all: the addresses that the page and its two documented calls need, from this origin.

A closed list, so that whatever else Gradio offers now or later stays shut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from starlette.responses import JSONResponse

__all__ = ["API", "Door", "Refused", "door_of", "refuse_foreign_pages"]

API = "/gradio_api/"
Door = Literal["look", "upload", "login", "call", "mcp"]
ABOUT = ("app_id", "info", "login_check", "openapi.json", "startup-events", "theme.css", "user")
LOOKS = frozenset((*ABOUT, "call", "heartbeat", "mcp", "queue", "upload_progress"))
CALLS = frozenset(("run", "api", "call"))  # each followed by a function's name
CONTROLS = frozenset(("queue/join", "cancel", "reset"))


@dataclass
class Refused(Exception):
    """What a request is answered with that goes no further."""

    status: int
    words: str
    headers: dict[str, str] = field(default_factory=dict)
    detail: object = None  # as Gradio's page and its programs read it; the words where there is nothing more to it

    def response(self) -> JSONResponse:
        return JSONResponse({"detail": self.detail or self.words, "error": self.words}, self.status, self.headers)


def door_of(method: str, path: str) -> Door:
    """Raises Refused where there is none."""
    if method in ("GET", "HEAD", "OPTIONS"):
        inside = path.partition(API)[2] if path.startswith(API) else ""
        if inside and not inside.startswith("file=") and inside.split("/")[0] not in LOOKS:
            raise Refused(404, "There is nothing at this address.")
        return "look"
    if method != "POST":
        raise Refused(405, "This server knows no such method.")
    place = path.rstrip("/")
    if place == "/login":
        return "login"
    inside = place.removeprefix(API) if place.startswith(API) else ""
    first, _, rest = inside.partition("/")
    if inside == "upload":
        return "upload"
    if first == "mcp":
        return "mcp"
    if inside in CONTROLS or (first in CALLS and rest and "/" not in rest):
        return "call"
    raise Refused(404, "There is nothing at this address.")


def refuse_foreign_pages(method: str, path: str, headers: Mapping[str, str]) -> None:
    """Raises Refused for what a page of another origin makes a visitor's browser send.

    Browsers say where a request comes from: `Sec-Fetch-Site` to addresses they trust, `Origin` to all.
    """
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    changes = method not in ("GET", "HEAD") or path.rstrip("/").endswith("/logout")
    if site is not None:
        foreign = site not in ("same-origin", "none") and (changes or origin is not None)
    else:
        foreign = origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
    if foreign:
        raise Refused(403, "This request comes from a page of another address. Open this server's own page.")

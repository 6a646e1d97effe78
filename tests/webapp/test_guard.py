"""What the web app's guard does with every answer, and with every host. test_doors.py asks the real server."""

from __future__ import annotations

from pathlib import Path

import gradio as gr
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from dora_diffusion.webapp.app import _hosts
from dora_diffusion.webapp.guard import Guard
from dora_diffusion.webapp.received import Received
from dora_diffusion.webapp.visitors import COOKIE, valid_cookie


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    """An app behind the guards that says which cookies reached it, or fails."""

    async def echo(request: Request) -> PlainTextResponse:
        if request.url.path == "/broken":
            raise RuntimeError("as Gradio does on shapes that it does not foresee")
        return PlainTextResponse(str(request.cookies))

    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=_hosts("127.0.0.1")),
        Middleware(Guard, page=gr.Blocks(), uploads=tmp_path, received=Received()),
    ]
    routes = [Route("/{rest:path}", echo, methods=["GET", "POST"])]
    return TestClient(Starlette(routes=routes, middleware=middleware), base_url="http://127.0.0.1:7860")


def test_a_foreign_host_is_refused(client: TestClient) -> None:
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"host": "127.0.0.1:7860"}).status_code == 200


def test_each_browser_gets_one_cookie_that_scripts_cannot_read(client: TestClient) -> None:
    first = client.get("/")
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and valid_cookie(first.cookies[COOKIE])
    assert "set-cookie" not in client.get("/").headers  # the client sends it back
    client.cookies.clear()
    client.cookies.set(COOKIE, "made up")
    assert "set-cookie" in client.get("/").headers


def test_other_cookies_stay(client: TestClient) -> None:
    """A login's cookie, beside the one that an MCP client is given by its address."""
    reached = client.post("/gradio_api/mcp/", json={}, headers={"cookie": "access-token=mine"}).text
    assert "'access-token': 'mine'" in reached and COOKIE in reached
    assert client.post("/gradio_api/mcp/", json={}, headers={"cookie": "access-token=mine"}).text == reached


def test_what_fails_inside_is_answered_and_said_in_one_line(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    assert client.get("/broken").status_code == 400
    assert [record.message for record in caplog.records if record.exc_info] == []
    assert "as Gradio does" in caplog.text

"""What the web app's guard lets through to Gradio, and what it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from dora_diffusion.webapp import guard
from dora_diffusion.webapp.app import _hosts
from dora_diffusion.webapp.guard import Guard
from dora_diffusion.webapp.visitors import COOKIE, valid_cookie


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    """An app behind the guards that says what body reached it."""

    async def echo(request: Request) -> PlainTextResponse:
        return PlainTextResponse("reached " + (await request.body()).decode())

    middleware = [
        Middleware(TrustedHostMiddleware, allowed_hosts=_hosts("127.0.0.1")),
        Middleware(Guard, uploads=tmp_path),
    ]
    routes = [Route("/{rest:path}", echo, methods=["GET", "POST"])]
    return TestClient(Starlette(routes=routes, middleware=middleware), base_url="http://127.0.0.1:7860")


def test_a_foreign_host_is_refused(client: TestClient) -> None:
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"host": "127.0.0.1:7860"}).status_code == 200


def test_each_browser_gets_one_cookie_that_scripts_cannot_read(client: TestClient) -> None:
    first = client.get("/")
    cookie = first.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and valid_cookie(first.cookies[COOKIE])
    assert "set-cookie" not in client.get("/").headers  # the client sends it back
    client.cookies.set(COOKIE, "made up")
    assert "set-cookie" in client.get("/").headers


@pytest.mark.parametrize(
    "address",
    ["http://evil.example/x.png", "HTTPS://evil.example", "//evil.example/x", " http://evil.example", "ftp://e.x/y"],
)
def test_nothing_is_fetched_for_anybody(client: TestClient, address: str) -> None:
    assert client.get(f"/gradio_api/file={address}").status_code == 403
    for path in ("/gradio_api/queue/join", "/gradio_api/run/compare", "/gradio_api/mcp/"):
        nested = {"data": [1, {"deep": [{"path": address, "meta": {"_type": "gradio.FileData"}}]}]}
        assert client.post(path, json=nested).status_code == 403
    assert client.get("/gradio_api/proxy=https://x.hf.space/y").status_code == 403


def test_what_is_harmless_arrives_whole(client: TestClient) -> None:
    body = {"data": ["see http://a.b", {"path": "/tmp/cache/a.png", "url": "http://127.0.0.1/file=/tmp/cache/a.png"}]}
    answer = client.post("/gradio_api/queue/join", json=body)
    assert answer.status_code == 200 and json.loads(answer.text.removeprefix("reached ")) == body
    assert client.get("/gradio_api/file=/tmp/cache/a.png").status_code == 200


def test_broken_and_huge_requests_are_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = {"content-type": "application/json"}
    assert client.post("/x", content=b'{"path": ', headers=headers).status_code == 400
    assert client.post("/x", content=b'{"path": ' + b"[" * 100_000, headers=headers).status_code == 400
    monkeypatch.setattr(guard, "MOST_BYTES_OF_JSON", 1000)
    assert client.post("/x", content=b'"' + b"a" * 2000 + b'"', headers=headers).status_code == 413


def test_uploads_are_capped_one_by_one_and_in_all(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"files": ("a.png", b"x" * 500)}
    assert client.post("/gradio_api/upload", files=files).status_code == 200
    monkeypatch.setattr(guard, "MOST_BYTES_A_FILE", 400)
    assert client.post("/gradio_api/upload", files=files).status_code == 413
    monkeypatch.setattr(guard, "MOST_BYTES_A_FILE", 4000)
    monkeypatch.setattr(guard, "MOST_BYTES_IN_ALL", 4000)
    (tmp_path / "old").write_bytes(b"x" * 3800)
    assert client.post("/gradio_api/upload", files=files).status_code == 507

    def chunks():  # without a Content-Length nobody knows how much is to come
        yield b"x"

    assert client.post("/gradio_api/upload", content=chunks()).status_code == 411

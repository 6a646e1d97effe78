"""The real server, asked as a hostile visitor would: other people's files, requests in odd spellings, foreign pages."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from web_helpers import SAMPLES

from dora_diffusion.webapp import guard, logins
from dora_diffusion.webapp.app import open_server
from dora_diffusion.webapp.arguments import NOT_YOURS
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.visitors import COOKIE, visitor_known_by

SECRET = "the caption that nobody else may read"
META = {"_type": "gradio.FileData"}
JSON = {"content-type": "application/json"}


class Visitor(httpx.Client):
    """A browser: keeps its cookie, has a session, and asks as the page does."""

    def __init__(self, address: str) -> None:
        super().__init__(base_url=address, timeout=60)
        self.session = f"session{os.urandom(6).hex()}"
        self.config = self.get("/config").json()

    def upload(self, *files: Path) -> list[str]:
        sent = [("files", (file.name, file.read_bytes())) for file in files]
        answer = self.post("/gradio_api/upload", files=sent)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def join(self, number: int, data: list[object]) -> httpx.Response:
        body = {"data": data, "fn_index": number, "session_hash": self.session}
        return self.post("/gradio_api/queue/join", json=body)

    def result(self, number: int, data: list[object]) -> dict:
        """The last thing that a queued call answers."""
        assert (joined := self.join(number, data)).status_code == 200, joined.text
        with self.stream("GET", "/gradio_api/queue/data", params={"session_hash": self.session}) as events:
            for line in events.iter_lines():
                event = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
                if event.get("msg") == "process_completed":
                    return event
        raise AssertionError("no answer")

    def number(self, name: str) -> int:
        return next(each["id"] for each in self.config["dependencies"] if each["api_name"] == name)


def file(path: object, **more: object) -> dict[str, object]:
    return {"path": path, "meta": META, **more}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """Of the embedded base, which none of this loads."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("server")
        patch.setenv("GRADIO_TEMP_DIR", str(folder))
        studio = Studio.open(folder / "outputs")
        yield studio
        assert studio.jobs.close(60)


def _serve(studio: Studio, **options: object) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url, page = open_server(studio, "127.0.0.1", port, **options)  # type: ignore[arg-type]
    yield url.rstrip("/")
    page.close(verbose=False)


@pytest.fixture(scope="module")
def server(studio: Studio) -> Iterator[str]:
    yield from _serve(studio)


@pytest.fixture
def visitor(server: str) -> Iterator[Visitor]:
    visitor = Visitor(server)
    yield visitor
    visitor.close()


@pytest.fixture
def other(server: str) -> Iterator[Visitor]:
    visitor = Visitor(server)
    yield visitor
    visitor.close()


@pytest.fixture
def no_traceback(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err + caplog.text


@pytest.fixture
def foreign(other: Visitor, tmp_path: Path) -> dict[str, str]:
    """Files that the visitor has not uploaded: of the machine, of another visitor, and the way there by detours."""
    caption = tmp_path / "theirs.txt"
    caption.write_bytes(SECRET.encode() + b"\xff")  # no UTF-8, so that whoever reads it would complain of it
    picture = tmp_path / "theirs.png"
    picture.write_bytes((SAMPLES / "pizza.png").read_bytes())
    theirs = other.upload(picture, caption)
    link = tmp_path / "link.png"
    link.symlink_to(theirs[0])
    folder, name = theirs[0].rsplit("/", 1)
    return {
        "the machine's": "/etc/passwd",
        "outside": str(caption),
        "another visitor's picture": theirs[0],
        "another visitor's caption": theirs[1],
        "by a detour": f"{folder}/../{Path(folder).name}/{name}",
        "by a link": str(link),
        "an address": "http://127.0.0.1:9/x.png",
        "an address without a scheme": "//127.0.0.1:9/x.png",
        "a file URL": f"file://{theirs[0]}",
        "relative": os.path.relpath(theirs[0]),
    }


def _spellings(path: str, own: str) -> list[object]:
    """A file as JSON may name it."""
    return [
        {"path": path},
        file(path),
        file(path, meta={"_type": "other"}),
        file(path, meta="gradio.FileData"),
        file(path, orig_name="mine.png", url=f"/gradio_api/file={own}", is_stream=True),
        file(own, url=path, inside=file(path)),
        [file(own), [file(path)]],
        {"value": {"deep": [{"path": path}]}},
        file([path]),
        file({"path": path}),
        file(None),
        [path],
        path,
    ]


def _harmless(component: dict) -> object:
    if component["type"] == "radio":
        return component["props"]["choices"][0][1]
    values = {"dropdown": "", "slider": 1, "number": 0, "checkbox": False, "checkboxgroup": []}
    values |= {"textbox": "words", "dataframe": {"headers": ["", "a", "b"], "data": []}}
    return values.get(component["type"])


def _places(visitor: Visitor) -> Iterator[tuple[dict, int, dict, bool]]:
    """All of /config: every argument of every function, its field, and whether this field comes for the first time."""
    parts = {each["id"]: each for each in visitor.config["components"]}
    known: set[int] = set()
    for function in visitor.config["dependencies"]:
        for place, field in enumerate(function["inputs"]):
            yield function, place, parts[field], field not in known
            known.add(field)


def _asked_with(visitor: Visitor, function: dict, place: int, value: object) -> httpx.Response:
    """The function with one argument as given, and what is harmless for the others."""
    parts = {each["id"]: each for each in visitor.config["components"]}
    harmless = [_harmless(parts[each]) for each in function["inputs"]]
    return visitor.join(function["id"], [*harmless[:place], value, *harmless[place + 1 :]])


def test_no_endpoint_reads_a_file_that_the_visitor_has_not_uploaded(
    visitor: Visitor, foreign: dict[str, str], no_traceback: None
) -> None:
    """Every argument of all functions once, and every field in each spelling; no answer tells what is in the file."""
    own = visitor.upload(SAMPLES / "cat-face.png")[0]
    theirs = foreign["another visitor's caption"]
    functions = set()
    for function, place, field, is_new in _places(visitor):
        functions.add(function["id"])
        values = [file(theirs)]
        if is_new:
            values += [*_spellings(theirs, own), *map(file, foreign.values())]
        if field["type"] in ("state", "textbox", "dropdown", "api"):  # no file to them, so never opened
            values = [value for value in values if "path" in json.dumps(value)]
        for value in values:
            answer = _asked_with(visitor, function, place, value)
            assert answer.status_code in (403, 422), (function["api_name"], value, answer.text)
            assert SECRET not in answer.text
    assert functions == {each["id"] for each in visitor.config["dependencies"] if each["inputs"]}


@pytest.mark.parametrize(
    ("path", "wrap"),
    [
        ("/gradio_api/queue/join", {"session_hash": "s1", "fn_index": None}),
        ("/gradio_api/run/train", {}),
        ("/gradio_api/api/train", {}),
        ("/gradio_api/run/predict", {"fn_index": None}),
        ("/gradio_api/call/train", {}),
        ("/gradio_api/call/train/", {"session_hash": "s2"}),
    ],
)
def test_train_is_shut_by_every_way_in(
    visitor: Visitor, foreign: dict[str, str], path: str, wrap: dict, no_traceback: None
) -> None:
    number = visitor.number("train")
    parts = {each["id"]: each for each in visitor.config["components"]}
    fields = next(each["inputs"] for each in visitor.config["dependencies"] if each["id"] == number)
    body = {**wrap, "data": [_harmless(parts[field]) for field in fields]}
    if "fn_index" in wrap:
        body["fn_index"] = number
    for named in foreign.values():
        body["data"][0] = [{"path": named}]
        assert visitor.post(path, json=body).status_code == 403
        body["data"][0] = [named]
        assert visitor.post(path, json=body).status_code == 422


def test_the_function_itself_is_told_whose_the_files_are(server: str, studio: Studio, foreign: dict[str, str]) -> None:
    """Where something comes past the guard, as Gradio's own MCP does, the page judges once more."""
    import asyncio

    import gradio as gr
    from web_helpers import page_of

    from dora_diffusion.webapp.app import build

    page = build(studio)
    function = next(each for each in page.fns.values() if each.api_name == "take_dropped")
    for path in foreign.values():
        asked = page.process_api(function, [[file(path)]], request=page_of("s", "A" * 32))
        with pytest.raises(gr.Error, match="not one that you uploaded"):
            asyncio.run(asked)


def test_what_a_visitor_uploads_is_theirs_and_stays_out_of_others_sight(
    visitor: Visitor, other: Visitor, tmp_path: Path, no_traceback: None
) -> None:
    picture = tmp_path / "mine.png"
    picture.write_bytes((SAMPLES / "cat-face.png").read_bytes() + os.urandom(8))
    (path,) = visitor.upload(picture)
    done = visitor.result(visitor.number("take_dropped"), [[file(path)]])
    assert done["success"] and "mine.png" in json.dumps(done["output"])
    assert visitor.get(f"/gradio_api/file={path}").content == picture.read_bytes()
    folder, name = path.rsplit("/", 1)
    for spelled in (path, f"{folder}/./{name}", f"{folder}/../{Path(folder).name}/{name}"):
        assert other.get(f"/gradio_api/file={spelled}").status_code == 403
    refused = other.join(other.number("take_dropped"), [[file(path)]])
    assert refused.status_code == 403 and refused.json()["detail"] == NOT_YOURS
    assert other.upload(picture) == [path]  # who has the same file has a right to it
    assert other.join(other.number("take_dropped"), [[file(path)]]).status_code == 200


def test_a_program_without_a_cookie_gets_one_with_its_upload(server: str, tmp_path: Path) -> None:
    picture = tmp_path / "theirs.png"
    picture.write_bytes((SAMPLES / "cat-face.png").read_bytes() + os.urandom(8))
    functions = httpx.get(f"{server}/config").json()["dependencies"]
    number = next(each["id"] for each in functions if each["api_name"] == "take_dropped")
    with httpx.Client(base_url=server) as program:
        answer = program.post("/gradio_api/upload", files={"files": ("a.png", picture.read_bytes())})
        body = {"data": [[file(answer.json()[0])]], "session_hash": "program", "fn_index": number}
        assert COOKIE in answer.cookies
        assert httpx.post(f"{server}/gradio_api/queue/join", json=body).status_code == 403
        assert program.post("/gradio_api/queue/join", json=body).status_code == 200


@pytest.mark.parametrize("before", ['prefs={"theme":"dark"}', "list[0]=1", "words=a b", 'open="x', "é=1", "bare", "=;"])
def test_cookies_of_other_apps_of_this_host_hide_nobody(visitor: Visitor, before: str, no_traceback: None) -> None:
    """Browsers send a host's cookies to all of its ports."""
    mine = f"{before}; {COOKIE}={'a' * 32}".encode("latin-1")
    picture = {"files": ("cat.png", (SAMPLES / "cat-face.png").read_bytes())}
    with httpx.Client(base_url=visitor.base_url, headers={b"cookie": mine}, timeout=60) as browser:
        uploaded = browser.post("/gradio_api/upload", files=picture)
        assert "set-cookie" not in uploaded.headers
        seen = browser.get(f"/gradio_api/file={uploaded.json()[0]}")
        assert seen.content == picture["files"][1]


def test_names_that_differ_in_case_are_files_of_their_own(visitor: Visitor, other: Visitor, tmp_path: Path) -> None:
    """The same bytes lie in one folder, and some disks tell these names apart."""
    content = (SAMPLES / "cat-face.png").read_bytes() + os.urandom(8)
    for each, name in ((visitor, "Cat.png"), (other, "cat.png"), (visitor, "straße.png"), (visitor, "strasse.png")):
        (tmp_path / name).write_bytes(content)
        path = each.upload(tmp_path / name)[0]
        assert Path(path).name == name
        assert each.get(f"/gradio_api/file={path}").status_code == 200
        assert each.result(each.number("take_pictures"), [[file(path)]])["success"], name
    stranger = Visitor(str(visitor.base_url))
    assert stranger.get(f"/gradio_api/file={path}").status_code == 403
    assert NOT_YOURS in stranger.join(stranger.number("take_pictures"), [[file(path)]]).text
    stranger.close()


def test_a_page_belongs_to_the_visitor_who_opened_it(visitor: Visitor, other: Visitor, no_traceback: None) -> None:
    number = visitor.number("choose")
    assert visitor.join(number, ["Quick"]).status_code == 200
    other.session = visitor.session
    assert other.join(number, ["Quick"]).status_code == 403
    assert other.get("/gradio_api/queue/data", params={"session_hash": visitor.session}).status_code == 403
    assert other.get(f"/gradio_api/heartbeat/{visitor.session}").status_code == 403
    body = {"session_hash": visitor.session, "fn_index": number, "event_id": "x"}
    assert other.post("/gradio_api/cancel", json=body).status_code == 403
    assert httpx.post(f"{visitor.base_url}/gradio_api/cancel", json=body).status_code == 403


ODD = '{"data": [[{"p\\u0061th": "/etc/passwd"}]], "fn_index": %d, "session_hash": "odd"}'
TWICE = '{"data": [[]], "data": [[{"path": "/etc/passwd"}]], "fn_index": %d, "session_hash": "odd"}'


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "application/JSON",
        "Application/Json; charset=utf-7",
        "application/problem+json",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=json",
        "",
        None,
    ],
)
def test_a_request_is_judged_by_what_it_says(visitor: Visitor, kind: str | None, no_traceback: None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    for text in (ODD, TWICE):
        for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32-be"):
            body = (text % visitor.number("take_dropped")).encode(encoding)
            for path in ("/gradio_api/queue/join", "/gradio_api/run/predict", "/gradio_api/queue/join/"):
                assert visitor.post(path, content=body, headers=headers).status_code == 403


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b'{"data": ' + b"[" * 50 + b"]" * 50 + b"}",
        b'{"data": {}}',
        b'{"data": null, "fn_index": 1}',
        b'{"data": [NaN]}',
        b'{"data": [1e999]}',
        b'{"data": [' + b"9" * 5000 + b"]}",
        b'{"data": [' + b"9" * 40 + b"]}",
        b'{"data": ["\\ud800"]}',
        b'{"data": ["\\u0000"]}',
        b'{"data": [], "fn_index": "1"}',
        b'{"data": [], "fn_index": true}',
        b'{"data": [], "fn_index": 1.5}',
        b'{"data": [], "fn_index": 9999}',
        b'{"data": [], "fn_index": -1}',
        b'{"data": [], "fn_index": 1}',
        b'{"data": [""], "fn_index": 1, "session_hash": 5}',
        b'{"data": [""], "fn_index": 1, "session_hash": "../x"}',
        b'{"data": [1, 2, 3, 4], "fn_index": 1, "session_hash": "a"}',
        b'{"data": [], "session_hash": "a"}',
        b"\x00\xff\xfe",
    ],
)
def test_broken_requests_are_answered_and_print_nothing(visitor: Visitor, body: bytes, no_traceback: None) -> None:
    for path in ("queue/join", "run/predict", "call/nothing", "call/train", "cancel", "reset", "upload"):
        answer = visitor.post(f"/gradio_api/{path}", content=body, headers=JSON)
        assert 400 <= answer.status_code < 500 or (path == "reset" and answer.status_code == 200), (path, answer.text)


def test_arguments_of_the_wrong_kind_are_named_and_print_nothing(visitor: Visitor, no_traceback: None) -> None:
    """Every field of the page, given everything that it does not take."""
    takes = {"textbox": str, "dropdown": str, "slider": (int, float), "number": (int, float), "checkbox": bool}
    takes |= {"checkboxgroup": (), "dataframe": (), "file": (), "uploadbutton": (), "radio": ()}
    wrong = [
        "text",
        5,
        1.5,
        True,
        [5],
        [["x"]],
        {"a": 1},
        [{}],
        {"headers": 1, "data": 2},
        {"headers": [1], "data": [[]]},
    ]
    for function, place, field, is_new in _places(visitor):
        for value in wrong if is_new and field["type"] in takes else []:
            if value is None and field["type"] in ("dropdown", "slider", "number", "file", "uploadbutton"):
                continue  # emptied by the visitor
            is_flag = isinstance(value, bool) and field["type"] != "checkbox"
            if is_flag or not isinstance(value, takes[field["type"]]):
                answer = _asked_with(visitor, function, place, value)
                assert answer.status_code == 422, (function["api_name"], place, value, answer.text)
                assert "must be" in json.dumps(answer.json()["detail"])


@pytest.mark.parametrize("name", ["../x", "2026-01-01-000000", "x" * 5000])
def test_a_choice_that_is_not_offered_is_told_so_and_lists_nothing(visitor: Visitor, name: str) -> None:
    answer = visitor.result(visitor.number("remove"), [name])
    assert answer["output"]["error"] == "What was chosen is no longer offered. Choose again from the list."


def test_a_program_reads_in_words_which_argument_is_wrong(server: str, no_traceback: None) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AppError
    from gradio_client.exceptions import ValidationError as Invalid

    client = Client(server, verbose=False)
    with pytest.raises(Invalid, match="seeds: must be a list of which each is a whole number"):
        client.predict("pizza", ["one"], api_name="/compare")
    with pytest.raises(AppError, match="no longer there"):
        client.predict("pizza", [1], "../../etc/passwd", api_name="/compare")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/process_recording"),
        ("POST", "/gradio_api/component_server"),
        ("POST", "/gradio_api/vibe-edit"),
        ("POST", "/gradio_api/call/v2/train"),
        ("POST", "/gradio_api/stream/x"),
        ("POST", "/"),
        ("PUT", "/gradio_api/queue/join"),
        ("DELETE", "/gradio_api/mcp"),
        ("GET", "/gradio_api/proxy=https://x.hf.space/y"),
        ("GET", "/gradio_api/file=http://127.0.0.1:9/x"),
        ("GET", "/gradio_api/file=//127.0.0.1:9/x"),
        ("GET", "/gradio_api/file/etc/passwd"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file=%00"),
        ("GET", "/gradio_api/file=" + "a" * 5000),
        ("GET", "/gradio_api/run-history/records"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/gradio_api/vibe-code"),
        ("GET", "/gradio_api/token"),
        ("GET", "/gradio_api/dev/reload"),
    ],
)
def test_what_nobody_needs_is_shut(visitor: Visitor, method: str, path: str, no_traceback: None) -> None:
    answer = visitor.request(method, path, json={"data": []} if method != "GET" else None)
    assert answer.status_code in (400, 403, 404, 405)


def test_odd_looks_are_answered_and_print_nothing(visitor: Visitor, no_traceback: None) -> None:
    for path in ("queue/data?session_hash=nobody", "queue/data", "call/train/nobody", "upload_progress?upload_id=x"):
        visitor.get(f"/gradio_api/{path}", timeout=20)
    picture = visitor.upload(SAMPLES / "cat-face.png")[0]
    for wanted in ("bytes=9-1", "bytes=a-b", "bytes=-", "bytes=1-2-3", "bytes=99999999-"):
        assert visitor.get(f"/gradio_api/file={picture}", headers={"range": wanted}).status_code < 500


FOREIGN_PAGES = [
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:1"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"origin": "http://evil.example", "sec-fetch-site": "cross-site"},
]


@pytest.mark.parametrize("headers", FOREIGN_PAGES)
def test_a_page_of_another_address_changes_nothing(visitor: Visitor, studio: Studio, headers: dict[str, str]) -> None:
    before = sorted(studio.cache.rglob("*"))
    files = {"files": ("evil.png", os.urandom(64))}
    assert visitor.post("/gradio_api/upload", files=files, headers=headers).status_code == 403
    assert sorted(studio.cache.rglob("*")) == before
    body = {"data": [], "fn_index": visitor.number("take_samples"), "session_hash": "x"}
    for path in ("queue/join", "run/predict", "call/train", "cancel", "reset", "mcp/"):
        assert visitor.post(f"/gradio_api/{path}", json=body, headers=headers).status_code == 403
    assert visitor.post("/login", data={"username": "a", "password": "b"}, headers=headers).status_code == 403
    assert visitor.get("/logout", headers=headers).status_code == 403


def test_this_servers_own_page_may(visitor: Visitor) -> None:
    own = str(visitor.base_url).rstrip("/")
    for headers in ({"origin": own}, {"sec-fetch-site": "same-origin"}, {"sec-fetch-site": "none"}):
        files = {"files": ("mine.png", b"x")}
        assert visitor.post("/gradio_api/upload", files=files, headers=headers).status_code == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert visitor.get("/", headers=link).status_code == 200  # somebody followed a link to it


def raw(server: str, head: list[str], *body: bytes) -> bytes:
    """The answer to a request as no client library would send it."""
    host, port = server.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall("\r\n".join([*head, f"Host: {host}:{port}", "Connection: close", "", ""]).encode())
        try:
            for each in body:
                connection.sendall(each)
        except OSError:  # refused before the end
            pass
        answer = b""
        try:
            while got := connection.recv(65536):
                answer += got
        except ConnectionResetError:
            pass
    return answer


def chunked(*parts: bytes) -> list[bytes]:
    return [*(b"%x\r\n%s\r\n" % (len(part), part) for part in parts), b"0\r\n\r\n"]


MULTIPART = "Content-Type: multipart/form-data; boundary=edge"


def multipart(content: bytes, name: str = "a.png") -> bytes:
    head = f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return head.encode() + content + b"\r\n--edge--\r\n"


@pytest.mark.parametrize("said", [["Content-Length: 5", "Transfer-Encoding: chunked"], ["Transfer-Encoding: chunked"]])
def test_an_upload_that_hides_its_length_is_refused(server: str, studio: Studio, said: list[str], no_traceback) -> None:
    before = sorted(studio.cache.rglob("*"))
    answer = raw(server, ["POST /gradio_api/upload HTTP/1.1", MULTIPART, *said], *chunked(multipart(os.urandom(99))))
    assert answer.split()[1] in (b"400", b"411")
    assert sorted(studio.cache.rglob("*")) == before


@pytest.mark.parametrize(
    "said", ["Content-Length: -1", "Content-Length: +5", "Content-Length: \u00b2", "Content-Length: 1, 2"]
)
def test_a_length_that_is_no_number_is_refused(server: str, said: str, no_traceback: None) -> None:
    answer = raw(server, ["POST /gradio_api/upload HTTP/1.1", MULTIPART, said], multipart(b"x"))
    assert answer.split()[1] in (b"400", b"411")


def test_a_body_is_limited_by_its_own_bytes(server: str, monkeypatch: pytest.MonkeyPatch, no_traceback: None) -> None:
    monkeypatch.setattr(guard, "MOST_BYTES_OF_JSON", 1000)
    parts = chunked(*[b" " * 600] * 4)
    for kind in ("application/json", "application/JSON", "text/plain"):
        head = ["POST /gradio_api/queue/join HTTP/1.1", f"Content-Type: {kind}", "Transfer-Encoding: chunked"]
        assert raw(server, head, *parts).split()[1] == b"413"


def test_uploads_are_counted_as_they_arrive_and_leave_nothing(
    visitor: Visitor, studio: Studio, monkeypatch: pytest.MonkeyPatch, no_traceback: None
) -> None:
    """What a header says is one thing, and what comes another: the limits hold for what comes."""
    import asyncio

    from starlette.formparsers import MultiPartException

    before = sorted(studio.cache.rglob("*"))
    monkeypatch.setattr(guard, "MOST_BYTES_A_FILE", 4000)
    sent = visitor.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 5000)})
    assert sent.status_code == 413
    monkeypatch.setattr(guard, "MOST_BYTES_IN_ALL", 10)
    assert visitor.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 500)}).status_code == 507
    assert sorted(studio.cache.rglob("*")) == before

    async def endless() -> dict[str, object]:
        return {"type": "http.request", "body": b"x" * 1500, "more_body": True}

    async def take(pieces: int) -> None:
        counting = guard.Guard(None, None, studio.cache, studio.received)._measured(endless)  # type: ignore[arg-type]
        for _ in range(pieces):
            await counting()

    asyncio.run(take(2))
    with pytest.raises(MultiPartException, match="maximum allowed size"):
        asyncio.run(take(3))
    monkeypatch.setattr(guard, "LOOK_EVERY", 1)
    (studio.cache / "old").write_bytes(b"x" * 20)
    with pytest.raises(MultiPartException, match="full"):
        asyncio.run(take(1))
    (studio.cache / "old").unlink()


def test_an_upload_that_breaks_off_leaves_nothing(server: str, studio: Studio, no_traceback: None) -> None:
    import time

    before = sorted(studio.cache.rglob("*"))
    host, port = server.removeprefix("http://").split(":")
    head = f"POST /gradio_api/upload HTTP/1.1\r\nHost: {host}:{port}\r\n{MULTIPART}\r\nContent-Length: 999999\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + multipart(b"x" * 5000)[:-10])
        deadline = time.monotonic() + 30
        while sorted(studio.cache.rglob("*")) == before:  # it has begun to write
            assert time.monotonic() < deadline
            time.sleep(0.01)
    while sorted(studio.cache.rglob("*")) != before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--edge",
        b"--edge\r\n\r\nx\r\n--edge--\r\n",
        b'--edge\r\nContent-Disposition: form-data; name="files"\r\n\r\nx\r\n--edge--\r\n',
        multipart(b"x", ".."),
        multipart(b"x", "/etc/passwd"),
        multipart(b"x", "a" * 5000),
        multipart(b"x", "\x00"),
    ],
)
def test_odd_uploads_print_nothing(server: str, body: bytes, no_traceback: None) -> None:
    for path in ("/gradio_api/upload", "/gradio_api/upload?upload_id=x"):
        answer = raw(server, [f"POST {path} HTTP/1.1", MULTIPART, f"Content-Length: {len(body)}"], body)
        assert answer.split()[1] < b"500"


def test_wrong_logins_have_to_wait(studio: Studio, monkeypatch: pytest.MonkeyPatch, no_traceback: None) -> None:
    for server in _serve(studio, login=("me", "right")):
        login = f"{server}/login"
        assert httpx.post(login, data={"username": "me", "password": "right"}).status_code == 200
        for turn in range(logins.MOST_WRONG):
            spoofed = {"x-forwarded-for": f"10.0.0.{turn}"}
            wrong = httpx.post(login, data={"username": "me", "password": str(turn)}, headers=spoofed)
            assert wrong.status_code == 400
        for password in ("wrong", "right"):
            refused = httpx.post(login, data={"username": "me", "password": password})
            assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= logins.SECONDS
            assert "Too many wrong logins" in refused.json()["detail"]
        monkeypatch.setattr(logins, "SECONDS", 0)  # as if it had passed
        assert httpx.post(login, data={"username": "me", "password": "right"}).status_code == 200


def test_addresses_that_log_in_are_forgotten_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = logins.Logins()
    monkeypatch.setattr(logins, "MOST_ADDRESSES", 10)
    for turn in range(500):
        counted.attempt(f"10.0.{turn // 250}.{turn % 250}")
    assert len(counted._tries) == 10
    for turn in range(logins.MOST_WRONG):
        counted.attempt(f"2001:db8::{turn:x}")
    with pytest.raises(logins.Refused):
        counted.attempt("2001:db8::ffff")
    counted.succeeded("2001:db8::1")
    counted.attempt("2001:db8::ffff")


def test_a_visitor_is_the_same_for_the_guard_and_for_the_page() -> None:
    from web_helpers import page_of

    from dora_diffusion.webapp.visitors import visitor_of

    assert visitor_of(page_of("s", "A" * 32)) == visitor_known_by("A" * 32, "other")
    assert visitor_of(page_of("s", "bad")) == visitor_known_by(None, "s")


def test_mcp_clients_reach_their_own_uploads_and_nothing_else(
    studio: Studio, tmp_path: Path, no_traceback: None
) -> None:
    """Gradio's MCP reads files by itself, so it must not get to see a path that is not the caller's."""
    pytest.importorskip("mcp", reason="pip install '.[mcp]'")
    words = tmp_path / "words.txt"
    words.write_text(os.urandom(8).hex())

    def call(client: httpx.Client, images: list[object]) -> httpx.Response:
        wanted = {"name": "train", "arguments": {"images": images, "steps": 1}}
        message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": wanted}
        accepted = {"accept": "application/json, text/event-stream"}
        return client.post("/gradio_api/mcp/", json=message, headers=accepted)

    def upload(client: httpx.Client) -> str:
        files = {"files": (words.name, words.read_bytes())}
        return client.post("/gradio_api/upload", files=files).json()[0]

    for server in _serve(studio, mcp=True):
        browser = Visitor(server)
        theirs = browser.upload(SAMPLES / "cat-face.png")[0]
        with httpx.Client(base_url=server, timeout=60) as program:
            for path in ("/etc/passwd", str(words), theirs, "http://127.0.0.1:9/x"):
                for named in ({"path": path}, file(path), file(path, url=path)):
                    assert call(program, [named]).status_code == 403
            own = upload(program)
            program.cookies.clear()  # it keeps none, and is known by its address
            assert "is no picture" in call(program, [file(own)]).text
            assert call(browser, [file(own)]).status_code == 403
        assert "is no picture" in call(browser, [file(upload(browser))]).text
        browser.close()

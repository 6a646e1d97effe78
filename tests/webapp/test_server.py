"""The running server without a browser: the documented calls, MCP, separation, and many clients at once."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from PIL import Image
from web_helpers import ROOT, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
CLIENTS = 20
SECONDS = float(os.environ.get("DORA_LOAD_SECONDS", "20"))  # for the record: DORA_LOAD_SECONDS=300


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture(scope="module")
def server(outputs: Path) -> Iterator[str]:
    with serving(outputs) as address:
        yield address


def client_of(server: str, tmp_path: Path):
    from gradio_client import Client

    return Client(server, verbose=False, download_files=tmp_path)


def test_the_documented_example_runs(server: str, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "webapp.md").read_text(), re.S)
    assert len(code.strip().splitlines()) <= 10
    exec(code.replace("http://127.0.0.1:7860", server), {})
    lines = [line for line in capsys.readouterr().out.splitlines() if "seed" in line]
    assert len(lines) == 6 and lines[0].startswith("base · seed 1 0.0 ")
    assert "LoRA · rank 2 · strength 1 · seed 1" in lines[1] and "DoRA · rank 2" in lines[5]
    for line in lines:
        with Image.open(line.split()[-1]) as image:
            assert image.size == (64, 64) and "dora_diffusion" in image.text


def test_the_endpoints_say_what_they_take_and_give(server: str, tmp_path: Path) -> None:
    named = client_of(server, tmp_path).view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == {"/compare", "/train"}
    returned = str(named["/compare"]["returns"])
    assert "difference" in returned and "from_cache" in returned
    assert [each["parameter_name"] for each in named["/compare"]["parameters"]][:3] == ["prompt", "seeds", "first"]


def test_a_mistake_raises_with_its_words(server: str, tmp_path: Path) -> None:
    from gradio_client.exceptions import AppError

    client = client_of(server, tmp_path)
    with pytest.raises(AppError, match="no longer there"):
        client.predict("x", [1], "../../etc/passwd", api_name="/compare")
    with pytest.raises(AppError, match="there are no pictures"):
        client.predict([], api_name="/train")


def test_another_clients_adapters_are_out_of_reach(server: str, tmp_path: Path) -> None:
    from gradio_client import handle_file
    from gradio_client.exceptions import AppError

    picture = str(ROOT / "samples" / "openmoji" / "pizza.png")
    owner, other = client_of(server, tmp_path), client_of(server, tmp_path)
    settings = {"kind": "dora", "norm_axis": "input", "steps": 1, "rank": 2, "train_text_encoder": True}
    trained = owner.predict([handle_file(picture)], ["pizza"], **settings, api_name="/train")
    key = trained["adapters"][0]["key"]
    owner.predict("pizza", [1], key, 1.0, "", steps=1, api_name="/compare")
    with pytest.raises(AppError, match="no longer there"):
        other.predict("pizza", [1], key, 1.0, "", steps=1, api_name="/compare")


def test_a_foreign_host_header_is_refused(server: str) -> None:
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(server, headers={"Host": "evil.example"}))
    assert refused.value.code == 400


def test_monitoring_and_run_history_are_off(server: str) -> None:
    for path in ("/monitoring/summary", "/gradio_api/run-history/buckets", "/gradio_api/runs"):
        with pytest.raises(HTTPError) as refused:
            urlopen(server + path)
        assert refused.value.code in (403, 404)


def test_files_outside_are_not_served(server: str, outputs: Path) -> None:
    for path in ("/etc/passwd", str(ROOT / "pyproject.toml"), str(outputs / "web" / "visitors")):
        with pytest.raises(HTTPError) as refused:
            urlopen(f"{server}/gradio_api/file={path}")
        assert refused.value.code in (403, 404)


SPY = """
import os, sys
log = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(what, about):
    os.write(log, f"{{what}} {{about}}\\n".encode())

def spy(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
        if not isinstance(args[0], int):
            note("wrote", os.path.abspath(os.fsdecode(args[0])))
    elif event in ("os.mkdir", "os.rename"):
        note("wrote", os.path.abspath(os.fsdecode(args[1 if event == "os.rename" else 0])))
    elif event in ("socket.connect", "socket.sendto"):
        note("asked", args[1])

sys.addaudithook(spy)
"""


def test_the_server_asks_no_other_host_and_writes_nowhere_else(tmp_path: Path, monkeypatch) -> None:
    """Python itself reports every file that the server opens to write and every address that it connects to."""
    from gradio_client import handle_file

    log, outputs = tmp_path / "spied.txt", tmp_path / "outputs"
    (tmp_path / "spy").mkdir()
    (tmp_path / "spy" / "sitecustomize.py").write_text(SPY.format(log=str(log)))
    outputs.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "spy"))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    with serving(outputs) as address:
        client = client_of(address, tmp_path / "downloads")
        picture = handle_file(str(ROOT / "samples" / "openmoji" / "pizza.png"))
        trained = client.predict([picture], ["pizza"], steps=2, rank=2, api_name="/train")
        lora, dora = (adapter["key"] for adapter in trained["adapters"])
        client.predict("pizza", [1], lora, 1.0, dora, 1.0, steps=2, api_name="/compare")
    lines = log.read_text().splitlines()
    written = {line.removeprefix("wrote ") for line in lines if line.startswith("wrote /")}
    asked = {line for line in lines if line.startswith("asked ")}
    assert any(path.startswith(str(outputs)) for path in written)  # the spy was there
    elsewhere = {path for path in written if not path.startswith((str(outputs), "/dev/", "/proc/"))}
    assert not elsewhere
    assert all("127.0.0.1" in line or "localhost" in line for line in asked), asked


def test_an_mcp_client_finds_and_calls_the_tools(tmp_path: Path) -> None:
    mcp = pytest.importorskip("mcp", reason="pip install '.[mcp]'")
    from mcp.client.streamable_http import streamablehttp_client

    async def talk(address: str) -> tuple[list[str], str]:
        async with (
            streamablehttp_client(f"{address}/gradio_api/mcp/") as (read, write, _),
            mcp.ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = [tool.name for tool in (await session.list_tools()).tools]
            name = next(name for name in tools if name.endswith("compare"))
            answer = await session.call_tool(name, {"prompt": "pizza", "seeds": [1], "steps": 1})
            return tools, str(answer.content)

    (tmp_path / "outputs").mkdir()
    with serving(tmp_path / "outputs", "--mcp") as address:
        tools, answer = asyncio.run(talk(address))
    assert {name.rpartition("_")[2] for name in tools} == {"compare", "train"}
    assert "base · seed 1" in answer and "DoRA · rank 4" in answer


def test_many_clients_at_once_get_pictures_or_are_told_the_queue_is_full(tmp_path: Path) -> None:
    """And the server's memory stays as it was after the first round, within a tenth."""
    (tmp_path / "outputs").mkdir()
    with serving(tmp_path / "outputs") as address:
        drawn, full, wrong = [0] * CLIENTS, [0] * CLIENTS, []
        client_of(address, tmp_path).predict("warm-up", [1], steps=1, api_name="/compare")
        clients = [client_of(address, tmp_path) for _ in range(CLIENTS)]
        deadline = time.monotonic() + SECONDS

        def keep_asking(number: int) -> None:
            turn = 0
            while time.monotonic() < deadline or turn == 0:
                turn += 1
                try:
                    prompt, seed = f"pizza {number}", turn
                    answer = clients[number].predict(prompt, [seed], steps=1, api_name="/compare")
                    assert len(answer["pictures"]) == 3
                    drawn[number] += 1
                except Exception as error:
                    if "queue full" in str(error):
                        full[number] += 1
                        time.sleep(1)
                    else:
                        wrong.append(repr(error))
                        return

        threads = [threading.Thread(target=keep_asking, args=(number,)) for number in range(CLIENTS)]
        for thread in threads:
            thread.start()
        while min(drawn) + min(full) == 0 and not wrong and any(thread.is_alive() for thread in threads):
            time.sleep(0.5)
        before = memory_of(address)
        for thread in threads:
            thread.join()
        after = memory_of(address)
    print(f"{sum(drawn)} comparisons, {sum(full)} times full, {before / 1e6:.0f} MB, then {after / 1e6:.0f} MB")
    assert not wrong, wrong[:5]
    assert sum(drawn) >= CLIENTS and min(drawn) >= 1
    assert after < 1.1 * before


def memory_of(address: str) -> int:
    """Resident bytes of the process that listens there."""
    port = address.rpartition(":")[2]
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (entry / "cmdline").read_bytes().split(b"\0")
            if b"--port" in arguments and port.encode() in arguments and b"app.py" in arguments:
                return int((entry / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            continue
    raise AssertionError("the server is gone")

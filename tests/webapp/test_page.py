"""The page as a whole and the server around it: logins, keys, visitors."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
from web_helpers import page_of
from web_pages import ME

from dora_diffusion.errors import AdapterFileError, ConfigError, TrainingError
from dora_diffusion.webapp.app import _hosts, _login, build, launch
from dora_diffusion.webapp.example import EXAMPLE
from dora_diffusion.webapp.jobs import TrainingJobs
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.visitors import visitor_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:gradio")  # toasts, which no page is there to show


def test_other_hosts_need_a_login():
    assert _login("127.0.0.1", None) is None
    with pytest.raises(ConfigError, match="--auth USER:PASSWORD"):
        _login("0.0.0.0", None)
    with pytest.raises(ConfigError, match="neither of them empty"):
        _login("0.0.0.0", "user:")
    assert _login("0.0.0.0", "me:secret") == ("me", "secret")
    assert _hosts("127.0.0.1") == ["127.0.0.1", "localhost", "127.0.0.1"] and _hosts("0.0.0.0") == ["*"]


def test_the_whole_page_builds_and_keeps_its_cache_private(studio):
    page = build(studio)
    assert page.title == "DoRA Diffusion"
    assert studio.cache.stat().st_mode & 0o077 == 0


def test_the_server_starts_without_torch():
    import subprocess
    import sys

    heavy = "{'torch', 'diffusers', 'transformers'}"
    code = f"import dora_diffusion.webapp.app, sys; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_keys_never_leave_the_outputs_folder(studio):
    for key in ("/etc/passwd", "../x", "web/adapters/../../x", ""):
        with pytest.raises(AdapterFileError):
            studio.shelf.find(key, ME)
        with pytest.raises(TrainingError):
            studio.runs.find(key, ME)


def test_a_visitor_is_a_hash_whatever_the_browser_sends():
    for strange in ("../../x", "a" * 5000, "", "' OR 1=1"):
        name = visitor_of(page_of("a", cookie=strange))
        assert len(name) == 16 and name.isalnum()
        assert name == visitor_of(page_of("a", cookie=strange + "?"))  # known by the session alone
    assert visitor_of(page_of("a", cookie="x" * 32)) == visitor_of(page_of("b", cookie="x" * 32)) != ME


def test_a_job_that_is_not_started_can_be_closed():
    jobs = TrainingJobs(lambda _: None)
    assert jobs.close(0.1)


def test_tools_that_ask_for_no_login_are_not_offered_where_a_login_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--mcp does not go with --auth"):
        launch(outputs=tmp_path, auth="user:password", mcp=True)
    assert not any(tmp_path.iterdir())


def test_folders_that_come_and_go_meanwhile_do_not_stop_the_list_of_adapters(studio: Studio, tmp_path: Path) -> None:
    """As scratch folders of files that are being written do."""
    run, over = studio.outputs / "run", threading.Event()
    run.mkdir()
    shutil.copy(EXAMPLE / "lora.safetensors", run / "kept.safetensors")

    def come_and_go() -> None:
        while not over.is_set():
            (run / "deep" / "deeper").mkdir(parents=True)
            shutil.copy(run / "kept.safetensors", run / "passing.safetensors")
            (run / "passing.safetensors").unlink()
            shutil.rmtree(run / "deep")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(300):
            assert any(shelved.path.name == "kept.safetensors" for shelved in studio.shelf.all(ME))
    finally:
        over.set()
        thread.join()

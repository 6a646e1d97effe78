"""The web app as a whole: the header, the tabs, and a server that keeps to this machine unless told otherwise."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import socket
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dora_diffusion.errors import ConfigError
from dora_diffusion.models.naming import find_base
from dora_diffusion.models.quantising import Packing
from dora_diffusion.stopping import stop_request
from dora_diffusion.webapp import parts
from dora_diffusion.webapp.api import add_endpoints
from dora_diffusion.webapp.compare import CompareTab
from dora_diffusion.webapp.guard import MOST_BYTES_A_FILE, Guard
from dora_diffusion.webapp.header import Header
from dora_diffusion.webapp.history import HistoryTab
from dora_diffusion.webapp.page import Page
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.style import CSS, HEAD, theme
from dora_diffusion.webapp.train import TrainTab
from dora_diffusion.webapp.watch import Watch

__all__ = ["build", "launch", "open_server"]

LOOPBACK = ("127.0.0.1", "localhost")
EVERYWHERE = ("0.0.0.0", "::")
MOST_QUEUED = 256  # events; comparisons and trainings have lines of their own, which are shorter
THREADS = 96  # those who wait for their turn to draw hold one each
SECONDS_FOR_A_CHECKPOINT = 60
LOOK_EVERY = 1.0  # seconds between looks at the training
M_ARENA_MAX = -8  # as <malloc.h> has it


def build(studio: Studio) -> Page:
    """The page. Gradio's own folder must be set before: components remember it."""
    os.environ["GRADIO_TEMP_DIR"] = str(studio.cache)
    header, compare, train = Header(studio), CompareTab(studio), TrainTab(studio)
    history = HistoryTab(studio, compare, train)
    with Page(title="DoRA Diffusion", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        page.received = studio.received
        header.build()
        with gr.Tabs() as tabs:
            with gr.Tab("Compare", id="compare"):
                compare.build()
            with gr.Tab("Train", id="train"):
                train.build()
            with gr.Tab("History", id="history") as history_tab:
                history.build()
        history.connect(history_tab, tabs)
        watch = Watch(studio, header, train.layout, compare)
        look = {"fn": watch.look, "inputs": train.layout.seen, "outputs": watch.outputs, **parts.QUIET}
        page.load(compare.preset, None, compare.on_open, **parts.QUIET).then(**look)
        gr.Timer(LOOK_EVERY).tick(concurrency_limit=None, **look)
        for begun in (train.started, train.resumed, history.resumed):
            begun.then(**look)
        train.layout.look.click(lambda: gr.Tabs(selected="compare"), None, tabs, queue=False, **parts.QUIET)
        add_endpoints(studio)
    page.queue(max_size=MOST_QUEUED, default_concurrency_limit=16)
    return page


def launch(
    *,
    base: str = "emoji",
    packing: Packing | None = None,
    outputs: Path = Path("outputs"),
    host: str | None = None,
    port: int = 7860,
    auth: str | None = None,
    mcp: bool = False,
) -> None:
    """Serve the app until Ctrl-C, SIGTERM or SIGHUP.

    `auth` is USER:PASSWORD, which any host but this machine's own demands.

    Raises ConfigError, and OutputError when nothing can be written to `outputs`.
    """
    if not 1 <= port <= 65535:
        raise ConfigError(f"port is {port}; it must be between 1 and 65535.")
    address = host or LOOPBACK[0]
    _check_address(address)
    login = _login(address, auth)
    if mcp and login is not None:  # Gradio answers MCP clients that have no login, and cannot call for those that have
        raise ConfigError("--mcp does not go with --auth: MCP clients have no login. Start without one of them.")
    if mcp and find_spec("mcp") is None:
        raise ConfigError("--mcp needs a package that is not installed: pip install 'dora-diffusion[mcp]'.")
    base = find_base(base)
    _keep_quiet()
    _share_memory()
    studio = Studio.open(outputs, base, packing)
    url, page = open_server(studio, address, port, login, mcp)
    print(f"DoRA Diffusion is open at {url}  (Ctrl-C ends it; everything is kept in {outputs / 'web'})", flush=True)
    if mcp:
        print(f"Its tools for MCP clients are at {url}gradio_api/mcp/", flush=True)
    studio.painter.warm_up()
    if not _serve_until_asked(page, studio):
        print("The training was ended without a last checkpoint.", flush=True)


def open_server(
    studio: Studio, address: str, port: int, login: tuple[str, str] | None = None, mcp: bool = False
) -> tuple[str, Page]:
    """Serve the page in a thread; its URL. Raises ConfigError where the port cannot be had."""
    # Whoever may say where a request really came from is for the one who puts a proxy before this to name.
    os.environ.setdefault("FORWARDED_ALLOW_IPS", "")
    page = build(studio)
    guards = [
        Middleware(TrustedHostMiddleware, allowed_hosts=_hosts(address)),
        Middleware(Guard, page=page, uploads=studio.cache, received=studio.received),
    ]
    try:
        _, url, _ = page.launch(
            server_name=address,
            server_port=port,
            auth=login,
            theme=theme(),
            css=CSS,
            head=HEAD,
            footer_links=[],
            app_kwargs={"middleware": guards},
            allowed_paths=[str(studio.albums.folder), *example_paths()],
            max_file_size=MOST_BYTES_A_FILE,
            max_threads=THREADS,
            enable_monitoring=False,
            run_history=False,
            mcp_server=mcp,
            share=False,
            ssr_mode=False,
            pwa=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise ConfigError(
            f"port {port} on {address} cannot be opened, or is taken. Choose another with --port."
        ) from error
    return url, page


def _serve_until_asked(page: gr.Blocks, studio: Studio) -> bool:
    """Whether all that was trained when Ctrl-C, SIGTERM or SIGHUP came has a checkpoint."""

    def say(_number: int) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone
            print("\nclosing; a training saves a checkpoint first. Again ends at once.", flush=True)

    with stop_request(say) as asked:
        while not asked():
            time.sleep(0.1)
        studio.jobs.stop_all()
        page.close(verbose=False)
        return studio.jobs.close(SECONDS_FOR_A_CHECKPOINT)


def example_paths() -> list[str]:
    """The packaged pictures, which the page shows first."""
    from dora_diffusion.webapp.example import EXAMPLE

    return [str(path) for path in EXAMPLE.glob("*.png")]


def _login(address: str, auth: str | None) -> tuple[str, str] | None:
    """Raises ConfigError for an address that others can reach without a login."""
    user, _, password = (auth or "").partition(":")
    if auth is not None and not (user and password):
        raise ConfigError("--auth must be USER:PASSWORD, with neither of them empty.")
    if auth is None and address not in LOOPBACK:
        raise ConfigError(f"--host {address} lets others reach this app: give --auth USER:PASSWORD with it.")
    return (user, password) if auth else None


def _check_address(address: str) -> None:
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:  # too long for a name, or empty between dots
        raise ConfigError(f"--host {address[:80]!r} is no address of this machine, such as 127.0.0.1.") from error


def _hosts(address: str) -> list[str]:
    """The Host headers that are answered: a foreign page must not reach a local app under a name of its own."""
    return ["*"] if address in EVERYWHERE else [*LOOPBACK, address]


def _share_memory() -> None:
    """Two heaps for all threads. glibc gives every thread one, and each keeps what drawing once took of it: hundreds of
    megabytes after some hundred comparisons."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(M_ARENA_MAX, 2)


def _keep_quiet() -> None:
    """No telemetry of Gradio or the hub, and no line for every request."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    logging.getLogger("httpx").setLevel(logging.WARNING)

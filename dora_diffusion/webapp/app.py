"""The web app as a whole: the header, the tabs, and a server that keeps to this machine unless told otherwise."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dora_diffusion.errors import ConfigError
from dora_diffusion.models.loading import pick_device
from dora_diffusion.webapp import parts
from dora_diffusion.webapp.compare import CompareTab
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.style import CSS, HEAD, theme
from dora_diffusion.webapp.train import TrainTab

__all__ = ["build", "launch"]

LOOPBACK = ("127.0.0.1", "localhost")
EVERYWHERE = ("0.0.0.0", "::")
LARGEST_UPLOAD = "2gb"  # an adapter of a large base; pictures have a limit of their own
SECONDS_FOR_A_CHECKPOINT = 60


def build(studio: Studio) -> gr.Blocks:
    """The page. Gradio's own folder must be set before: components remember it."""
    os.environ["GRADIO_TEMP_DIR"] = str(studio.cache)
    compare = CompareTab(studio)
    train = TrainTab(studio, compare)
    with gr.Blocks(title="DoRA Diffusion", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        with gr.Row(elem_id="top"):
            gr.HTML(parts.header(studio.base_name, pick_device().type))
            chip = gr.HTML("", elem_id="chip", elem_classes="dd-right")
        with gr.Tabs() as tabs:
            with gr.Tab("Compare", id="compare"):
                compare.build()
            with gr.Tab("Train", id="train"):
                train.build(chip, tabs)
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        opened = page.load(compare.preset, None, [*compare.pickers, compare.grid], **quiet)
        opened.then(train.watch, [train.seen, train.trouble, train.table, train.prompt], train.watched, **quiet)
    return page.queue(max_size=64)


def launch(
    *,
    base: str = "emoji",
    outputs: Path = Path("outputs"),
    host: str | None = None,
    port: int = 7860,
    auth: str | None = None,
) -> None:
    """Serve the app until Ctrl-C. `auth` is USER:PASSWORD, which any host but this machine's own demands.

    Raises ConfigError, and OutputError when nothing can be written to `outputs`.
    """
    address = host or LOOPBACK[0]
    login = _login(address, auth)
    _keep_quiet()
    studio = Studio.open(outputs, base)
    page = build(studio)
    try:
        _, url, _ = page.launch(
            server_name=address,
            server_port=port,
            auth=login,
            theme=theme(),
            css=CSS,
            head=HEAD,
            footer_links=[],
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=_hosts(address))]},
            allowed_paths=[str(studio.pictures)],
            max_file_size=LARGEST_UPLOAD,
            enable_monitoring=False,
            run_history=False,
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
    print(f"DoRA Diffusion is open at {url}  (Ctrl-C ends it; everything is kept in {studio.web})", flush=True)
    page.block_thread()
    if not studio.jobs.close(SECONDS_FOR_A_CHECKPOINT):
        print("The training was ended without a last checkpoint.", flush=True)


def _login(address: str, auth: str | None) -> tuple[str, str] | None:
    """Raises ConfigError for an address that others can reach without a login."""
    user, _, password = (auth or "").partition(":")
    if auth is not None and not (user and password):
        raise ConfigError("--auth must be USER:PASSWORD, with neither of them empty.")
    if auth is None and address not in LOOPBACK:
        raise ConfigError(f"--host {address} lets others reach this app: give --auth USER:PASSWORD with it.")
    return (user, password) if auth else None


def _hosts(address: str) -> list[str]:
    """The Host headers that are answered: a foreign page must not reach a local app under a name of its own."""
    return ["*"] if address in EVERYWHERE else [*LOOPBACK, address]


def _keep_quiet() -> None:
    """No telemetry of Gradio or the hub, and no line for every request."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    logging.getLogger("httpx").setLevel(logging.WARNING)

"""What the suites with and without a browser need: a pair of adapters that do something, and pictures to upload."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import torch

from dora_diffusion import AdapterConfig, inject_adapter, save_adapter
from dora_diffusion.models.loading import Base
from dora_diffusion.webapp.visitors import COOKIE

HANGS = 1500  # seconds; no sign of a slow machine, which gets there too
ROOT = Path(__file__).parent.parent.parent
SAMPLES = ROOT / "samples" / "openmoji"


def make_pair(base: Base, folder: Path, rank: int = 4) -> tuple[Path, Path]:
    """lora.safetensors and dora.safetensors with random values other than zero, as if trained."""
    paths = []
    for kind in ("lora", "dora"):
        torch.manual_seed(0)
        adapter = inject_adapter(base.denoiser, AdapterConfig(kind=kind, rank=rank, alpha=float(rank)))
        with torch.no_grad():
            for name, parameter in adapter.named_parameters().items():
                if name.endswith("lora_B"):
                    parameter.normal_(0, 0.1)
        paths.append(save_adapter(adapter, folder / f"{kind}.safetensors", base_name=base.name))
        adapter.eject()
    return paths[0], paths[1]


@contextmanager
def serving(outputs: Path, *options: str) -> Iterator[str]:
    """The app as a user starts it, in a process of its own; its address. Nothing may have failed in it at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "app.py", "--port", str(port), "--outputs", str(outputs), *options]
    log = outputs.parent / f"server-{port}.log"
    with log.open("w") as written:
        process = subprocess.Popen(command, cwd=ROOT, stdout=written, stderr=subprocess.STDOUT, env=dict(os.environ))
    try:
        deadline = time.monotonic() + HANGS
        while "open at" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.terminate()
        process.wait(HANGS)


def sample_files(pictures: int, captions: bool = True) -> list[Path]:
    chosen = sorted(SAMPLES.glob("*.png"))[:pictures]
    return chosen + ([path.with_suffix(".txt") for path in chosen] if captions else [])


def page_of(session: str, cookie: str | None = None) -> gr.Request:
    """A page of a browser without our cookie, known by its session, or of one that sends this cookie."""
    page = gr.Request(session_hash=session)
    if cookie is not None:
        page.request = SimpleNamespace(cookies={COOKIE: cookie})
    return page

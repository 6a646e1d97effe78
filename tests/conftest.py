"""For every test: no network, quiet libraries, and no more threads than a small machine has cores."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch or diffusers, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["DIFFUSERS_VERBOSITY"] = "error"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# benchmarks/ is not installed; at the end, so that an installed dora_diffusion is the one that is tested.
sys.path.append(str(Path(__file__).parent.parent))

import bases
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image, ImageDraw

from dora_diffusion import cli
from dora_diffusion.adapters.injection import AdapterConfig, inject_adapter
from dora_diffusion.data.store import CACHE_VARIABLE
from dora_diffusion.formats.files import save_adapter
from dora_diffusion.models.loading import Base, load_base


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment_as_it_was() -> Iterator[None]:
    """`web` run in this process moves the folder for temporary files; the next test's browser needs the short path."""
    variables, folder = dict(os.environ), tempfile.tempdir
    yield
    os.environ.clear()
    os.environ.update(variables)
    tempfile.tempdir = folder


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Encodings of the tests, and of the processes they start, stay out of the user's cache."""
    os.environ[CACHE_VARIABLE] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """A small UNet with random weights, in eval mode."""
    return bases.unet()


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion with random weights, saved as a diffusers pipeline; 16 pixel pictures."""
    folder = tmp_path_factory.mktemp("bases") / "sd"
    bases.stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture
def sd_base(sd_folder: Path) -> Base:
    return load_base(str(sd_folder), device="cpu")


@pytest.fixture
def adapter_file(sd_base: Base, tmp_path: Path) -> Path:
    adapter = inject_adapter(sd_base.denoiser, AdapterConfig(rank=2, alpha=2.0), seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    return save_adapter(adapter, tmp_path / "dora.safetensors")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of coloured discs."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(8):
        image = Image.new("RGB", (24, 24), "white")
        ImageDraw.Draw(image).ellipse((3, 3, 20, 20), fill=(30 * i, 255 - 30 * i, 90))
        image.save(folder / f"{i}.png")
    return folder


class Ran:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def flat(self) -> str:
        """Both streams on one line, as a message may be folded anywhere."""
        return " ".join((self.out + self.err).split())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run the command line in this process."""

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["dora-diffusion", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Ran(status, *capsys.readouterr())

    return run

"""A server of one visitor, its tabs, and what is offered there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import bases
import pytest
from web_helpers import make_pair, sample_files
from web_pages import Tabs

from dora_diffusion.models.loading import Base
from dora_diffusion.webapp.studio import Studio


@pytest.fixture
def studio(tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Studio]:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    studio = Studio.open(tmp_path / "outputs", str(sd_folder))
    yield studio
    assert studio.jobs.close(60)


@pytest.fixture
def tabs(studio: Studio) -> Tabs:
    return Tabs(studio)


@pytest.fixture
def pair(studio: Studio) -> tuple[str, str]:
    """The keys of two adapters that do something, made on the command line and so everybody's."""
    make_pair(Base("small", bases.stable_diffusion()), studio.outputs / "run")
    return "run/lora", "run/dora"


@pytest.fixture
def few_pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "few"
    folder.mkdir()
    for path in sample_files(3):
        shutil.copy(path, folder)
    return folder

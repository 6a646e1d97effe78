"""What all tabs and all visitors of one server share: the outputs folder, the base to draw with, the training job."""

from __future__ import annotations

import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.outputs import make_folder
from dora_diffusion.webapp.drawing import Painter
from dora_diffusion.webapp.jobs import TrainingJobs
from dora_diffusion.webapp.shelf import Shelf

__all__ = ["Studio"]

KEPT_COMPARISONS = 200  # the pictures of older ones are deleted, so that the folder does not grow without end


@dataclass(frozen=True)
class Studio:
    """Everything that is written lies under `outputs`: runs and uploads in `web`, and `web/cache` for the server."""

    outputs: Path
    base_name: str
    painter: Painter
    jobs: TrainingJobs
    shelf: Shelf

    @classmethod
    def open(cls, outputs: Path, base_name: str = "emoji") -> Studio:
        """Raises OutputError when nothing can be written there."""
        outputs = make_folder(outputs).resolve()
        return cls(outputs, base_name, Painter(base_name), TrainingJobs(), Shelf(outputs))

    @property
    def web(self) -> Path:
        return self.outputs / "web"

    @property
    def cache(self) -> Path:
        """What browsers upload and Gradio serves; for nobody else on this machine to read."""
        folder = make_folder(self.web / "cache")
        folder.chmod(0o700)
        return folder

    @property
    def pictures(self) -> Path:
        return make_folder(self.web / "pictures")

    def new_pictures(self) -> Path:
        """A folder for one comparison. Its name cannot be guessed: another visitor does not come upon it."""
        made = sorted(self.pictures.iterdir(), key=lambda folder: folder.stat().st_mtime)
        for old in made[: max(0, len(made) - KEPT_COMPARISONS + 1)]:
            shutil.rmtree(old, ignore_errors=True)
        return make_folder(self.pictures / secrets.token_urlsafe(12))

"""What all tabs and all visitors of one server share: the outputs folder, the base to draw with, the training jobs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dora_diffusion.comparison.votes import Votes
from dora_diffusion.models.quantising import Packing, base_label
from dora_diffusion.outputs import clear_left_overs, make_folder
from dora_diffusion.webapp.drawing import Painter
from dora_diffusion.webapp.heavy import ready
from dora_diffusion.webapp.jobs import TrainingJob, TrainingJobs
from dora_diffusion.webapp.pictures import Albums
from dora_diffusion.webapp.received import Received
from dora_diffusion.webapp.runs import Runs
from dora_diffusion.webapp.seen import Seen
from dora_diffusion.webapp.shelf import Shelf

__all__ = ["EMBEDDED_NAME", "Studio"]

EMBEDDED_NAME = "emoji"  # the base that the packaged pair was made for


@dataclass(frozen=True)
class Studio:
    """Everything that is written lies under `outputs/web`: a folder for each visitor, pictures, the server's cache."""

    outputs: Path
    base_name: str
    packing: Packing | None  # of the base's blocks
    painter: Painter
    jobs: TrainingJobs
    shelf: Shelf
    runs: Runs
    albums: Albums
    seen: Seen
    received: Received = field(default_factory=Received)

    @classmethod
    def open(cls, outputs: Path, base_name: str = EMBEDDED_NAME, packing: Packing | None = None) -> Studio:
        """Raises OutputError when nothing can be written there."""
        outputs = make_folder(outputs).resolve()
        visitors = outputs / "web" / "visitors"
        clear_left_overs(outputs / "web", depth=5)  # down to the folders in a run
        painter = Painter(base_name, packing)
        return cls(
            outputs,
            base_name,
            packing,
            painter,
            TrainingJobs(painter.copy),
            Shelf(outputs, visitors, with_samples=base_name == EMBEDDED_NAME),
            Runs(visitors),
            Albums(outputs / "web" / "pictures"),
            Seen(),
        )

    @property
    def base_label(self) -> str:
        """The base as people should read it."""
        return base_label(self.base_name, self.packing)

    def cautions(self) -> tuple[str, ...]:
        """What a training costs here more than people expect of it."""
        if self.packing is None:
            return ()
        ready()
        from dora_diffusion.models.cautions import cautions
        from dora_diffusion.models.loading import pick_device

        return cautions(pick_device(), self.packing, trains=True)

    @property
    def cache(self) -> Path:
        """What browsers upload and Gradio serves; for nobody else on this machine to read."""
        folder = make_folder(self.outputs / "web" / "cache")
        folder.chmod(0o700)
        return folder

    def votes(self, visitor: str) -> Votes:
        return Votes(self.outputs / "web" / "visitors" / visitor / "votes.jsonl")

    def shown_path(self, path: Path) -> Path:
        """A path as a terminal would give it: from the folder that holds the outputs, or from where the server runs."""
        for folder in (self.outputs.parent, Path.cwd()):
            if path.is_relative_to(folder):
                return path.relative_to(folder)
        return path

    def resume(self, name: str, visitor: str) -> TrainingJob:
        """Go on with a run that did not finish; from its start where there is no checkpoint. Raises TrainingError."""
        self.jobs.refuse_if_busy(visitor)
        run = self.runs.find(name, visitor)
        return self.jobs.start(run.name, run.train_config(), visitor, self.albums.new(), resume=run.has_progress)

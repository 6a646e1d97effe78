"""What a run looks like in a terminal: progress bars with loss and time left, and notes between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID
from rich.text import Text

from dora_diffusion.adapters.labels import adapter_label
from dora_diffusion.comparison.compare import Cell, CompareRequest
from dora_diffusion.screen import PlainColumn, Screen, Words, printable
from dora_diffusion.stopping import say_no_more
from dora_diffusion.training.events import (
    Event,
    Finished,
    Measured,
    Preparing,
    Previewed,
    Resumed,
    Saved,
    Settled,
    Stopped,
)
from dora_diffusion.training.loop import Step

__all__ = ["clock", "show_cells", "show_training"]


class TimeLeft(ProgressColumn):
    """Seconds left, as the one who does the work estimates them."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        return Text("" if left is None else f"{clock(left)} left", style="cyan")


def clock(seconds: float) -> str:
    """7 as 0:07, 3725 as 1:02:05."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _bars(console: Screen) -> Progress:
    return Progress(
        PlainColumn(width=12),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        PlainColumn("note"),
        TimeLeft(),
        console=console,
    )


class TrainingDisplay:
    """Shows each event; one bar for each kind of adapter."""

    def __init__(self, console: Screen, progress: Progress) -> None:
        self.console = console
        self.progress = progress
        self.label: Callable[[str], str] = adapter_label  # of a kind
        self.bars: dict[str, TaskID] = {}
        self.smoothed: dict[str, float] = {}
        self.held_out: dict[str, dict[int, float]] = {}  # by kind and step
        self.saved: dict[str, dict[int, Path]] = {}
        # Without a terminal, bars are not drawn: then a line now and then says how far it is.
        self.plain = not console.is_terminal

    def _say(self, *words: Words) -> None:
        # Between bars that are drawn in place, a line may not be longer than the terminal is wide.
        self.console.say(*words, soft_wrap=self.plain)

    def show(self, event: Event) -> None:
        match event:
            case Preparing():
                self._prepare(event)
            case Settled(config):
                self.label = config.label
            case Resumed(kind, step, total):
                self._say(f"{self.label(kind)}: going on after step {step} of {total}")
            case Measured(kind, step, loss):
                self.held_out.setdefault(kind, {})[step] = loss
                if step == 0:
                    self._say(f"{self.label(kind)}: held-out loss of the base {loss:.4f}")
            case Step():
                self._step(event)
            case Previewed(kind, _, paths):
                self._say((f"{self.label(kind)}: preview {printable(paths[-1])}", "dim"))
            case Saved(kind, step, path):
                self.saved.setdefault(kind, {})[step] = path
                self._say((f"{self.label(kind)} after {step} steps: {printable(path)}", "dim"))
            case Stopped(kind, step, total, checkpoint):
                stopped = f"stopped at step {step} of {total} of the {self.label(kind)}, checkpoint saved:"
                self._say((stopped, "yellow"), f" {printable(checkpoint)}")
            case Finished(kind, path, base_loss, loss):
                losses = "" if loss is None or base_loss is None else f", held-out loss {base_loss:.4f} → {loss:.4f}"
                self._say((f"{self.label(kind)} finished", "green"), f": {printable(path)}{losses}")
                if earlier := self._was_better(kind):
                    self._say(earlier)

    def _prepare(self, event: Preparing) -> None:
        text, done, total = event.text, event.done, event.total
        if total == 0 or done in (0, total):
            self._say((f"{text}{f' ({done} of {total})' if total else ''}", "dim"))
        if done == total and text in self.bars:
            self.progress.remove_task(self.bars.pop(text))
        elif 0 < done < total:
            if text not in self.bars:
                self.bars[text] = self.progress.add_task(text, total=total, note="", left=None)
            self.progress.update(self.bars[text], completed=done, left=event.seconds_left)

    def _was_better(self, kind: str) -> str:
        """Where the held-out loss was lower than at the end: what came after was learning the pictures by heart."""
        losses = self.held_out.get(kind, {})
        best = min(losses, key=lambda step: losses[step], default=0)
        if best == 0 or losses[best] == losses[max(losses)]:
            return ""
        kept = self.saved.get(kind, {}).get(best)
        where = f": {printable(kept)}" if kept else " (save_every keeps the adapters on the way)"
        return f"Its held-out loss was lowest after {best} steps, {losses[best]:.4f}{where}"

    def _step(self, step: Step) -> None:
        before = self.smoothed.get(step.kind, step.loss)
        self.smoothed[step.kind] = loss = 0.95 * before + 0.05 * step.loss
        note = f"loss {loss:.4f}"
        if step.kind in self.held_out:
            note += f", held out {next(reversed(self.held_out[step.kind].values())):.4f}"
        if step.kind not in self.bars:
            self.bars[step.kind] = self.progress.add_task(self.label(step.kind), total=step.total, note="", left=None)
        left = step.seconds_left
        self.progress.update(self.bars[step.kind], completed=step.step, note=note, left=left)
        if self.plain and (step.step % max(1, step.total // 20) == 0 or step.step == step.total):
            label = self.label(step.kind)
            self._say(f"{label} {step.step}/{step.total}  {note}  {clock(left)} left")


def show_training(events: Iterable[Event], console: Screen) -> list[Event]:
    """Run the events to the end on the screen; returns all but the steps."""
    kept: list[Event] = []
    with _bars(console) as progress:
        progress.live.auto_refresh = console.is_terminal
        display = TrainingDisplay(console, progress)
        for event in events:
            try:
                display.show(event)
            except OSError:  # the terminal is gone, and the training is not
                say_no_more(console)
            if not isinstance(event, Step):
                kept.append(event)
    return kept


def show_cells(cells: Iterable[Cell], request: CompareRequest, console: Screen) -> Iterator[Cell]:
    """Pass the cells on, with a bar."""
    total = len(request.rows) * len(request.columns)
    with _bars(console) as progress:
        bar = progress.add_task("drawing", total=total, note="", left=None)
        spent = 0.0
        for done, cell in enumerate(cells, 1):
            spent += cell.seconds
            progress.update(bar, completed=done, note=cell.caption, left=spent / done * (total - done))
            if not console.is_terminal:
                console.say(f"drawing {done}/{total}  {printable(cell.prompt)}, {printable(cell.caption)}")
            yield cell

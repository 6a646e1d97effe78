"""Training in the background: one job at a time, in a thread that no page owns.

A page may close, reload or be another tab's: all of a visitor's pages ask for the same job's state and see the same
thing. Its folder says how it stands, so that a new server can go on with it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dora_diffusion.comparison.curves import Curve, read_curves
from dora_diffusion.errors import DoraDiffusionError, TrainingError
from dora_diffusion.webapp.heavy import ready
from dora_diffusion.webapp.pictures import Album
from dora_diffusion.webapp.runs import write_status
from dora_diffusion.webapp.turns import Turns

if TYPE_CHECKING:
    from dora_diffusion.models.loading import Base
    from dora_diffusion.training.config import TrainConfig
    from dora_diffusion.training.events import Event
    from dora_diffusion.training.loop import Step

__all__ = ["JobState", "TrainingJob", "TrainingJobs", "earlier_previews"]

BaseOf = Callable[[Callable[[str], None]], "Base"]  # a base of one's own; calls back while it makes one wait
Phase = Literal["waiting", "preparing", "training", "finished", "stopped", "failed"]
MOST_WAITING = 8
LOG_LINES = 200


@dataclass(frozen=True)
class JobState:
    """A job at one moment. `text` is what people read: how far it is, or how it really ended."""

    name: str
    phase: Phase
    text: str
    step: int = 0
    done: float = 0.0  # 0 to 1, over all kinds
    error: DoraDiffusionError | None = None
    adapters: tuple[Path, ...] = ()
    stopping: bool = False
    version: int = 0

    @property
    def is_over(self) -> bool:
        return self.phase in ("finished", "stopped", "failed")


class _Stop(Exception):
    """Raised while waiting for the turn when the job was asked to stop."""


@dataclass
class TrainingJob:
    """One run of `train`. Read `snapshot`, `curves`, `previews` and `log`; only the job's own thread writes them."""

    name: str
    config: TrainConfig
    owner: str
    turns: Turns
    album: Album
    base_of: BaseOf
    resume: bool = False
    state: JobState = field(init=False)
    curves: dict[str, Curve] = field(default_factory=dict)
    previews: list[tuple[str, int, Path]] = field(default_factory=list)  # kind, step, picture
    log: list[str] = field(default_factory=list)
    config_file: Path | None = None

    def __post_init__(self) -> None:
        self.state = JobState(self.name, "waiting", "waiting for its turn")
        if self.resume:
            self.curves = read_curves(Path(self.config.out) / "log.jsonl")
            self.previews = earlier_previews(Path(self.config.out), self.album)
        self._stop = threading.Event()
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._run, name=f"training {self.name}", daemon=True)

    def start(self) -> None:
        """Raises OutputError."""
        self._save()
        self.config_file = self.album.add_text(self._config_to_take_away().to_toml(), "toml")
        self._thread.start()

    def _config_to_take_away(self) -> TrainConfig:
        """With the folders as they would be beside the file, and not as they lie on this server."""
        places = {"images": "images", "out": f"outputs/{self.name}"}
        if self.config.start_from:
            places["start_from"] = Path(self.config.start_from).name
        return self.config.model_copy(update=places)

    def stop(self) -> None:
        """Ask for a stop; the step at hand is finished first and a checkpoint saved."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether the job was over before the time ran out."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def snapshot(self) -> JobState:
        state = self.state
        return replace(state, stopping=self._stop.is_set() and not state.is_over)

    def _run(self) -> None:
        try:
            with self.turns.turn(self._wait):
                self._began = time.monotonic()
                self._train()
        except _Stop:
            self._over("stopped", f"stopped before its turn came; {self._nothing_done}")
        except DoraDiffusionError as error:
            self._fail(error)
        except Exception as error:
            logging.getLogger(__name__).exception("the training job failed")
            self._fail(TrainingError(f"something unforeseen went wrong ({type(error).__name__}: {error})."))

    def _give_up_if_stopped(self, _why: str = "") -> None:
        if self._stop.is_set():
            raise _Stop

    @property
    def _nothing_done(self) -> str:
        return "what was trained before is kept" if self.resume or self.state.adapters else "nothing was trained"

    def _wait(self, before: int) -> None:
        self._give_up_if_stopped()
        text = f"waiting: {before} {'training' if before == 1 else 'trainings'} before this one"
        if text != self.state.text:
            self._set(text=text)

    def _train(self) -> None:
        ready()
        from dora_diffusion.console import clock
        from dora_diffusion.training.events import Preparing
        from dora_diffusion.training.run import train

        self._set(phase="preparing", text="loading the base model")
        self._save()  # that it is under way; how far it came its log says (runs.py)
        base = self.base_of(self._give_up_if_stopped)
        events = train(
            self.config, resume=self.resume, overwrite=not self.resume, base=base, should_stop=self._stop.is_set
        )
        for event in events:
            self._take(event)
            if self._stop.is_set() and isinstance(event, Preparing):
                self._over("stopped", f"stopped before the first step; {self._nothing_done}")
                return
        if not self.state.is_over:
            kinds = " and ".join(self.config.label(kind) for kind in self.config.kinds)
            spent = clock(time.monotonic() - self._began)
            self._over("finished", f"finished: {kinds}, {self.config.steps} steps each, in {spent}")

    def _take(self, event: Event) -> None:
        ready()
        from dora_diffusion.console import clock
        from dora_diffusion.training.events import (
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

        match event:
            case Settled(config):  # what is gone on from says what it is
                parametrisation = {key: getattr(config, key) for key in ("parametrisation", "factor", "full_matrix")}
                self.config = self.config.model_copy(update=parametrisation)
                self._save()
            case Preparing(text, done, total, left):
                line = text + (f" ({done} of {total})" if total else "")
                if total == 0 or done in (0, total):
                    self._say(line)
                self._set(phase="preparing", text=line + (f", {clock(left)} left" if left else ""))
            case Resumed(kind, step, total):
                self._say(f"{self.config.label(kind)}: goes on after step {step} of {total}")
                self._set(step=step)
                self.previews = [each for each in self.previews if each[0] != kind or each[1] <= step]
                curve = self.curves.setdefault(kind, Curve())
                del curve.loss[step:]
                curve.held_out = [measured for measured in curve.held_out if measured[0] <= step]
            case Measured(kind, step, loss):
                self._say(f"{self.config.label(kind)}: held-out loss {loss:.4f} after {step} steps")
                if (step, loss) not in self.curves.setdefault(kind, Curve()).held_out:
                    self.curves[kind].held_out.append((step, loss))
            case Step():
                self._step(event)
            case Previewed(kind, step, paths):
                self.previews += [(kind, step, self.album.add_plain(path)) for path in paths]
                self._set()
            case Saved(kind, step, _):
                self._say(f"{self.config.label(kind)}: kept as it is after {step} steps")
            case Stopped(kind, step, total, _):
                self._set(step=step)
                self._over("stopped", f"stopped at {step} of {total} ({self.config.label(kind)}), checkpoint saved")
            case Finished(kind, path, _, _):
                self._say(f"{self.config.label(kind)}: saved")
                self._set(adapters=(*self.state.adapters, path))

    def _step(self, step: Step) -> None:
        ready()
        from dora_diffusion.console import clock

        self.curves.setdefault(step.kind, Curve()).loss.append(step.loss)
        kinds = self.config.kinds
        after = len(kinds) - 1 - kinds.index(step.kind)  # kinds still to come, which take about as long as this one
        per_step = step.seconds_left / max(1, step.total - step.step)
        left = clock(step.seconds_left + after * per_step * step.total)
        if step.step % max(1, step.total // 20) == 0 or step.step == step.total:
            self._say(f"{self.config.label(step.kind)} {step.step}/{step.total}, loss {step.loss:.4f}")
        self._set(
            phase="training",
            text=f"{self.config.label(step.kind)} {step.step}/{step.total}, {left} left",
            step=step.step,
            done=(kinds.index(step.kind) + step.step / step.total) / len(kinds),
        )

    def _fail(self, error: DoraDiffusionError) -> None:
        where = f" at step {self.state.step}" if self.state.step else ""
        self._set(error=error)
        self._over("failed", f"failed{where}")

    def _over(self, phase: Phase, text: str) -> None:
        self._say(text)
        over = replace(self.state, phase=phase, text=text, done=1.0 if phase == "finished" else self.state.done)
        self._save(over)  # before it shows: who sees that the job is over looks into the folder for how it ended
        self.state = replace(over, version=self.state.version + 1)

    def _save(self, state: JobState | None = None) -> None:
        """The run's folder says how it stands; a disk that is full must not end the training."""
        state = state or self.state
        try:
            write_status(Path(self.config.out), state.phase, state.text, str(state.error or ""), self.config)
        except DoraDiffusionError as error:
            self._say(str(error))

    def _say(self, line: str) -> None:
        if not self.log or self.log[-1] != line:
            self.log.append(line)
            del self.log[:-LOG_LINES]

    def _set(self, **changes: object) -> None:
        self.state = replace(self.state, version=self.state.version + 1, **changes)  # type: ignore[arg-type]


def earlier_previews(run: Path, album: Album) -> list[tuple[str, int, Path]]:
    """The pictures of the first prompt and seed that a run has drawn, as (kind, step, copy in the album)."""
    found: list[tuple[str, int, Path]] = []
    for path in sorted((run / "previews").glob("*-prompt1-*.png")):
        kind, _, rest = path.stem.partition("-")
        step = rest.partition("-")[0]
        if step.isdigit() and (kind, int(step)) not in {each[:2] for each in found}:
            with contextlib.suppress(OSError, DoraDiffusionError):  # one that is damaged is not shown
                found.append((kind, int(step), album.add_plain(path)))
    return found


class TrainingJobs:
    """The jobs of one server: at most one runs, a few wait, and each visitor's last one stays to be looked at."""

    def __init__(self, base_of: BaseOf) -> None:
        self.base_of = base_of
        self.turns = Turns(MOST_WAITING)
        self._lock = threading.Lock()
        self._last: dict[str, TrainingJob] = {}

    def start(self, name: str, config: TrainConfig, owner: str, album: Album, resume: bool = False) -> TrainingJob:
        """Raises TrainingError while another job of this visitor waits or runs."""
        with self._lock:
            self.refuse_if_busy(owner)
            job = self._last[owner] = TrainingJob(name, config, owner, self.turns, album, self.base_of, resume)
            job.start()
            return job

    def of(self, owner: str) -> TrainingJob | None:
        return self._last.get(owner)

    def refuse_if_busy(self, owner: str) -> None:
        job = self._last.get(owner)
        if job is not None and not job.state.is_over:
            raise TrainingError("your other training is not over yet. Wait until it ends, or stop it first.")

    def stop(self, owner: str) -> None:
        if job := self._last.get(owner):
            job.stop()

    def stop_all(self) -> list[TrainingJob]:
        """Ask all that run or wait for a stop; returns them."""
        jobs = [job for job in self._last.values() if not job.state.is_over]
        for job in jobs:
            job.stop()
        return jobs

    def close(self, seconds: float) -> bool:
        """Stop what runs and wait for its checkpoint; whether it came in time."""
        jobs = self.stop_all()
        deadline = time.monotonic() + seconds
        return all([job.wait(max(0.0, deadline - time.monotonic())) for job in jobs])

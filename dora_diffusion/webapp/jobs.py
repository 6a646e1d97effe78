"""Training in the background: one job at a time, in a thread that no page owns.

A page may close, reload or be another browser's: all of them ask for the same job's state and see the same thing.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from dora_diffusion.comparison.curves import Curve
from dora_diffusion.console import clock
from dora_diffusion.errors import DoraDiffusionError, TrainingError
from dora_diffusion.injection import KIND_LABEL
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.loop import Step
from dora_diffusion.training.run import Event, Finished, Measured, Preparing, Stopped, train

__all__ = ["JobState", "TrainingJob", "TrainingJobs"]

Phase = Literal["preparing", "training", "finished", "stopped", "failed"]


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


@dataclass
class TrainingJob:
    """One run of `train`. Read `snapshot`, `curves` and `log`; only the job's own thread writes them."""

    name: str
    config: TrainConfig
    state: JobState = field(init=False)
    curves: dict[str, Curve] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state = JobState(self.name, "preparing", "preparing")
        self._stop = threading.Event()
        self._began = time.monotonic()
        self._kind_began = self._began
        self._thread = threading.Thread(target=self._run, name=f"training {self.name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

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
            events = train(self.config, should_stop=self._stop.is_set)
            for event in events:
                self._take(event)
                if self._stop.is_set() and isinstance(event, Preparing):
                    self._over("stopped", "stopped before the first step; nothing was trained")
                    return
            if not self.state.is_over:
                kinds = " and ".join(KIND_LABEL[kind] for kind in self.config.kinds)
                spent = clock(time.monotonic() - self._began)
                self._over("finished", f"finished: {kinds}, {self.config.steps} steps each, in {spent}")
        except DoraDiffusionError as error:
            self._fail(error)
        except Exception as error:
            logging.getLogger(__name__).exception("the training job failed")
            self._fail(TrainingError(f"something unforeseen went wrong ({type(error).__name__}: {error})."))

    def _take(self, event: Event) -> None:
        match event:
            case Preparing(text, done, total):
                self._say(text + (f" ({done} of {total})" if total else ""))
                self._set(phase="preparing", text=self.log[-1])
            case Measured(kind, step, loss):
                self._say(f"{KIND_LABEL[kind]}: held-out loss {loss:.4f} after {step} steps")
                self.curves.setdefault(kind, Curve()).held_out.append((step, loss))
            case Step():
                self._step(event)
            case Stopped(kind, step, total, _):
                self._say(f"go on in a terminal: dora-diffusion train {self.config.out}/config.toml --resume")
                self._set(step=step)
                self._over("stopped", f"stopped at step {step} of {total} ({KIND_LABEL[kind]}), checkpoint saved")
            case Finished(kind, path, _, _):
                self._say(f"{KIND_LABEL[kind]}: saved {path}")
                self._set(adapters=(*self.state.adapters, path))

    def _step(self, step: Step) -> None:
        self.curves.setdefault(step.kind, Curve()).loss.append(step.loss)
        kinds = self.config.kinds
        after = len(kinds) - 1 - kinds.index(step.kind)  # kinds still to come, which take about as long as this one
        if step.step == 1:
            self._kind_began = time.monotonic() - step.seconds_left / max(1, step.total - 1)
        whole = time.monotonic() - self._kind_began + step.seconds_left
        left = clock(step.seconds_left + after * whole)
        if step.step % max(1, step.total // 20) == 0 or step.step == step.total:
            self._say(f"{KIND_LABEL[step.kind]} {step.step}/{step.total}, loss {step.loss:.4f}")
        self._set(
            phase="training",
            text=f"{KIND_LABEL[step.kind]} {step.step}/{step.total}, {left} left",
            step=step.step,
            done=(kinds.index(step.kind) + step.step / step.total) / len(kinds),
        )

    def _fail(self, error: DoraDiffusionError) -> None:
        where = f" at step {self.state.step}" if self.state.step else ""
        self._set(error=error)
        self._over("failed", f"failed{where}")

    def _over(self, phase: Phase, text: str) -> None:
        self._say(text)
        self._set(phase=phase, text=text, done=1.0 if phase == "finished" else self.state.done)

    def _say(self, line: str) -> None:
        if not self.log or self.log[-1] != line:
            self.log.append(line)

    def _set(self, **changes: object) -> None:
        self.state = replace(self.state, version=self.state.version + 1, **changes)  # type: ignore[arg-type]


class TrainingJobs:
    """The jobs of one server: at most one runs, and the last one stays to be looked at."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.last: TrainingJob | None = None

    def start(self, name: str, config: TrainConfig) -> TrainingJob:
        """Raises TrainingError while another job runs."""
        with self._lock:
            self.refuse_if_busy()
            job = self.last = TrainingJob(name, config)
            job.start()
            return job

    def refuse_if_busy(self) -> None:
        if self.last is not None and not self.last.state.is_over:
            raise TrainingError("another training is running on this server. Wait until it ends, or stop it first.")

    def stop(self) -> None:
        if self.last is not None:
            self.last.stop()

    def close(self, seconds: float) -> bool:
        """Stop what runs and wait for its checkpoint; whether it came in time."""
        if self.last is None or self.last.state.is_over:
            return True
        self.last.stop()
        return self.last.wait(seconds)

"""Comparisons for several browsers on one base: drawn one at a time, each in a thread of its own.

The thread, and not the page's callback, holds the turn on the base: a page that closes in the middle leaves a callback
that nobody finishes, and a turn in it would never be given back.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.comparison.cache import PictureCache
from dora_diffusion.comparison.request import Cell, CompareRequest
from dora_diffusion.errors import BaseModelError, DoraDiffusionError
from dora_diffusion.models.quantising import Packing
from dora_diffusion.webapp.heavy import ready
from dora_diffusion.webapp.turns import QueueFullError, Turns

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dora_diffusion.formats.files import Fit
    from dora_diffusion.models.loading import Base

__all__ = ["Drawing", "Painter", "Progress"]

MOST_WAITING = 24
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Progress:
    """What is being done now; `done` of `total` denoising steps of the picture at hand."""

    text: str
    done: int = 0
    total: int = 0


def _copy(base: Base) -> Base:
    ready()
    from dora_diffusion.memory import within_memory

    task = "for a second copy of the base, which is trained while this one draws"
    packed = base.device.type != "cpu" and base.packing is None
    ways = (
        *(["the app started with --quantise nf4"] if packed else []),
        "the training on the command line, with the app closed",
    )
    return within_memory(lambda: replace(base, pipe=copy.deepcopy(base.pipe)), task, base.device, ways)


class _Stop(Exception):
    """Raised between denoising steps when the drawing was asked to stop."""


class Drawing:
    """One comparison under way. Iterating yields Progress and Cells and raises what went wrong."""

    def __init__(self, painter: Painter, request: CompareRequest, owner: str) -> None:
        self.request = request
        self.owner = owner
        self._painter = painter
        self._events: queue.SimpleQueue[Cell | Progress | DoraDiffusionError | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self.was_stopped = False

    def stop(self) -> None:
        self._stopping.set()

    def __iter__(self) -> Iterator[Cell | Progress]:
        threading.Thread(target=self._run, name="drawing", daemon=True).start()
        try:
            while (event := self._events.get()) is not None:
                if isinstance(event, DoraDiffusionError):
                    raise event
                yield event
        finally:
            self.stop()

    def _run(self) -> None:
        try:
            with self._painter.turn(self._wait) as base:
                for cell in self._painter.draw(base, self.request, self.owner, self._on_step):
                    self._events.put(cell)
        except _Stop:
            self.was_stopped = True
        except DoraDiffusionError as error:
            self._events.put(error)
        except Exception as error:
            logging.getLogger(__name__).exception("a comparison failed")
            self._events.put(DoraDiffusionError(f"something unforeseen went wrong ({type(error).__name__}: {error})."))
        finally:
            self._events.put(None)

    def _wait(self, why: str) -> None:
        if self._stopping.is_set():
            raise _Stop
        self._events.put(Progress(why))

    def _on_step(self, done: int, total: int) -> None:
        if self._stopping.is_set():
            raise _Stop
        self._events.put(Progress("", done, total))


class Painter:
    """The base that comparisons draw with: loaded at the first need, kept, and used by one drawing at a time."""

    def __init__(self, base_name: str, packing: Packing | None = None) -> None:
        self.base_name, self.packing = base_name, packing
        self.cache = PictureCache()
        self.device: str | None = None  # known when the base is loaded
        self.seconds_per_step: float | None = None  # of a picture, as lately measured
        self._turns = Turns(MOST_WAITING)
        self._base: Base | None = None
        self._reader: DiffusionPipeline | None = None  # tokenizers alone
        self._loading = False
        self._drawings: dict[str, Drawing] = {}

    def begin(self, page: str, request: CompareRequest, owner: str = "") -> Drawing:
        """The drawing of one page; an earlier one of the same page is stopped."""
        self.stop(page)
        drawing = self._drawings[page] = Drawing(self, request, owner)
        return drawing

    def end(self, page: str, drawing: Drawing) -> bool:
        """Whether the page still waited for this one, and not for a later one."""
        drawing.stop()
        if self._drawings.get(page) is not drawing:
            return False
        del self._drawings[page]
        return True

    def stop(self, page: str) -> None:
        if drawing := self._drawings.get(page):
            drawing.stop()

    def reader(self) -> DiffusionPipeline | None:
        """What knows how the base reads prompts: the base, or its tokenizers while it is not loaded.

        None where these cannot be had alone: then it is known with the base.
        """
        if self._base is not None:
            return self._base.pipe
        if self._reader is None:
            ready()
            from dora_diffusion.models.reading import load_tokenizers

            with contextlib.suppress(BaseModelError):
                self._reader = load_tokenizers(self.base_name)
        return self._reader

    @property
    def size(self) -> int | None:
        """The side of the pictures that the base was made for, in pixels; None while it is not loaded."""
        return self._base.size if self._base is not None else None

    def warm_up(self) -> None:
        """Load the base and draw a few steps in a thread, so that the first comparison finds it ready."""
        threading.Thread(target=self._warm_up, name="warm-up", daemon=True).start()

    @contextmanager
    def turn(self, wait: Callable[[str], None]) -> Iterator[Base]:
        """The base, when its turn has come; `wait` is told what for, again and again, and may raise to give up.

        Raises QueueFullError and BaseModelError.
        """

        def say(before: int) -> None:
            loading = self._loading and before == 1
            wait("loading the base model" if loading else f"waiting: {before} before this one")

        with self._turns.turn(say):
            if self._base is None:
                wait("loading the base model")
                self._load()
            assert self._base is not None
            yield self._base

    def copy(self, wait: Callable[[str], None]) -> Base:
        """A base of its own for a training. Raises BaseModelError, and what `wait` raises to give up.

        It is copied and not loaded: while one thread loads a model, the libraries put every module that another thread
        makes on the meta device. So a server loads once, and nobody has a base to work on before.
        """
        while True:
            try:
                with self.turn(wait) as base:
                    return _copy(base)
            except QueueFullError:  # of comparisons: a training may wait longer
                wait("waiting for the base model")
                time.sleep(1)

    def draw(
        self, base: Base, request: CompareRequest, owner: str, on_step: Callable[[int, int], None]
    ) -> Iterator[Cell]:
        """The comparison on a base whose turn it is; what was drawn for this owner before is not drawn again."""
        ready()
        from dora_diffusion.comparison.compare import compare

        for cell in compare(base, request, on_step, cache=self.cache, owner=owner, tolerant=True):
            if not cell.cached and cell.fits:
                lately = cell.seconds / request.num_inference_steps
                before = self.seconds_per_step or lately
                self.seconds_per_step = 0.7 * before + 0.3 * lately
            yield cell

    def fit(self, path: Path) -> Fit | None:
        """How an adapter fits the base; None while it is not loaded. Raises AdapterFileError."""
        ready()
        from dora_diffusion.formats.files import fit_of, read_what_fits

        return fit_of(self._base, read_what_fits(path)) if self._base is not None else None

    def seconds_for(self, pictures: int, steps: int) -> float | None:
        """How long these pictures take; None before anything was measured."""
        return pictures * steps * self.seconds_per_step if self.seconds_per_step else None

    def _load(self) -> None:
        self._loading = True
        try:
            ready()
            from dora_diffusion.models.loading import load_base

            self._base = load_base(self.base_name, packing=self.packing)
            self.device = self._base.pipe.device.type
        finally:
            self._loading = False

    def _warm_up(self) -> None:
        self._loading = True  # said to whoever comes meanwhile
        try:
            with self.turn(lambda _: None) as base:
                self._loading = True
                ready()
                from dora_diffusion.generation import GenerationRequest, generate

                began = time.monotonic()
                generate(base, GenerationRequest("warm-up", num_inference_steps=WARM_UP_STEPS))
                self.seconds_per_step = (time.monotonic() - began) / WARM_UP_STEPS
        except Exception as error:  # shown to the first who compares
            logging.getLogger(__name__).warning("the base model is not ready: %s", error)
        finally:
            self._loading = False

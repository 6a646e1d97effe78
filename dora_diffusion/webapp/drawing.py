"""Comparisons for several browsers on one base: drawn one at a time, each in a thread of its own.

The thread, and not the page's callback, holds the lock on the base: a page that closes in the middle leaves a callback
that nobody finishes, and a lock in it would never be given back.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from dora_diffusion.comparison.compare import Cell, CompareRequest, compare
from dora_diffusion.errors import DoraDiffusionError
from dora_diffusion.models.loading import Base, load_base

__all__ = ["Drawing", "Painter", "Progress"]


@dataclass(frozen=True)
class Progress:
    """What is being done now; `done` of `total` denoising steps of the picture at hand."""

    text: str
    done: int = 0
    total: int = 0


class _Stop(Exception):
    """Raised between denoising steps when the drawing was asked to stop."""


class Drawing:
    """One comparison under way. Iterating yields Progress and Cells and raises what went wrong."""

    def __init__(self, painter: Painter, request: CompareRequest) -> None:
        self.request = request
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
                for cell in compare(base, self.request, self._on_step):
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

    def __init__(self, base_name: str) -> None:
        self.base_name = base_name
        self._turn = threading.Lock()
        self._base: Base | None = None
        self._drawings: dict[str, Drawing] = {}

    def begin(self, page: str, request: CompareRequest) -> Drawing:
        """The drawing of one page; an earlier one of the same page is stopped."""
        self.stop(page)
        drawing = self._drawings[page] = Drawing(self, request)
        return drawing

    def end(self, page: str, drawing: Drawing) -> None:
        drawing.stop()
        if self._drawings.get(page) is drawing:
            del self._drawings[page]

    def stop(self, page: str) -> None:
        if drawing := self._drawings.get(page):
            drawing.stop()

    @contextmanager
    def turn(self, wait: Callable[[str], None]) -> Iterator[Base]:
        """The base, when its turn has come; `wait` is told what for, again and again, and may raise to give up."""
        while not self._turn.acquire(timeout=0.3):
            wait("waiting for another comparison to end")
        try:
            if self._base is None:
                wait("loading the base model")
                self._base = load_base(self.base_name)
            yield self._base
        finally:
            self._turn.release()

"""A line that people stand in: first come, first served, with everybody's place known and a limit to its length."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dora_diffusion.errors import DoraDiffusionError

__all__ = ["QueueFullError", "Turns"]

TELL_EVERY = 0.3  # seconds


class QueueFullError(DoraDiffusionError):
    """Too many are waiting already."""


class Turns:
    """One holds the turn, at most `most` wait for it."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    @property
    def length(self) -> int:
        """Those who wait, and the one whose turn it is."""
        with self._changed:
            return len(self._line)

    @contextmanager
    def turn(self, wait: Callable[[int], None]) -> Iterator[None]:
        """The turn. Until it comes `wait` is told again and again how many are before, and may raise to give up.

        Raises QueueFullError.
        """
        ticket = object()
        with self._changed:
            if len(self._line) > self.most:
                raise QueueFullError(f"queue full: {self.most} are waiting already. Try again in a minute.")
            self._line.append(ticket)
        try:
            while (before := self._before(ticket)) > 0:
                wait(before)
            yield
        finally:
            with self._changed:
                self._line.remove(ticket)
                self._changed.notify_all()

    @contextmanager
    def turn_if_free(self) -> Iterator[bool]:
        """The turn if nobody has it; whether it was got."""
        ticket = object()
        with self._changed:
            free = not self._line
            if free:
                self._line.append(ticket)
        try:
            yield free
        finally:
            if free:
                with self._changed:
                    self._line.remove(ticket)
                    self._changed.notify_all()

    def _before(self, ticket: object) -> int:
        with self._changed:
            if self._line[0] is not ticket:
                self._changed.wait(TELL_EVERY)
            return self._line.index(ticket)

"""What asks a process to end (Ctrl-C, SIGTERM of a scheduler or a service, SIGHUP of a terminal that closes): asked
once it ends well, asked again it ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dora_diffusion.screen import Screen

__all__ = ["StopRequest", "say_no_more", "stop_request"]

NAMES = (
    "SIGINT",
    "SIGTERM",
    "SIGHUP",
    "SIGBREAK",
)  # those that this system has; Windows has no SIGHUP, others no BREAK
# Launchers pass on what the terminal has sent to the whole group already, and a shell that hangs up sends it twice.
AT_ONCE = 0.5  # seconds within which a second signal is the first one's echo


class StopRequest:
    """Call it to know whether the process was asked to end."""

    def __init__(self, say: Callable[[int], None]) -> None:
        self._say = say
        self._asked: float | None = None
        self._signal = signal.SIGINT

    def __call__(self) -> bool:
        return self._asked is not None

    @property
    def exit_code(self) -> int:
        """128 and the signal's number, as shells and schedulers know it; 130 when another process was asked."""
        return 128 + self._signal

    def take(self, number: int, _frame: object = None) -> None:
        """A signal's handler. Raises SystemExit for a second signal."""
        now = time.monotonic()
        if self._asked is not None:
            if now - self._asked > AT_ONCE:
                raise SystemExit(128 + number)
            return
        self._asked, self._signal = now, signal.Signals(number)
        self._say(number)


@contextmanager
def stop_request(say: Callable[[int], None]) -> Iterator[StopRequest]:
    """Take the signals while the block runs; `say` is told the first one's number. In the main thread only.

    A hang-up that was to be ignored, as under nohup, stays so.
    """
    request = StopRequest(say)
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    taken = [number for number in numbers if number == signal.SIGINT or before[number] != signal.SIG_IGN]
    for number in taken:
        signal.signal(number, request.take)
    try:
        yield request
    finally:
        for number in taken:
            signal.signal(number, before[number] or signal.SIG_DFL)


def say_no_more(console: Screen) -> None:
    """For a stream that nobody reads any more: its terminal was closed, or the program behind the pipe has ended."""
    console.quiet = True
    with contextlib.suppress(OSError), open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), console.file.fileno())  # else Python fails at its end, with what is left in a buffer

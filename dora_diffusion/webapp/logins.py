"""Wrong logins: counted for each address, so that nobody can try passwords without end."""

from __future__ import annotations

import ipaddress
import math
import threading
import time
from collections import OrderedDict

from dora_diffusion.webapp.doors import Refused

__all__ = ["Logins"]

MOST_WRONG = 10  # attempts in SECONDS, then none until they have passed
SECONDS = 300
MOST_ADDRESSES = 4096


class Logins:
    def __init__(self) -> None:
        self._tries: OrderedDict[str, tuple[float, int]] = OrderedDict()  # network to when the first was, and how many
        self._lock = threading.Lock()

    def attempt(self, address: str) -> None:
        """Count an attempt as wrong until `succeeded` is told. Raises Refused when there were too many."""
        network, now = _network(address), time.monotonic()
        with self._lock:
            began, count = self._tries.pop(network, (now, 0))
            if now - began >= SECONDS:
                began, count = now, 0
            self._tries[network] = began, min(count + 1, MOST_WRONG + 1)
            if len(self._tries) > MOST_ADDRESSES:
                self._tries.popitem(last=False)
        if count >= MOST_WRONG:
            wait = max(1, math.ceil(began + SECONDS - now))
            raise Refused(429, f"Too many wrong logins. Try again in {wait} seconds.", {"Retry-After": str(wait)})

    def succeeded(self, address: str) -> None:
        with self._lock:
            self._tries.pop(_network(address), None)


def _network(address: str) -> str:
    """One household's addresses count as one: an IPv6 user has 2^64 of them."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return str(ipaddress.ip_network((ip, 64), strict=False)) if ip.version == 6 else str(ip)

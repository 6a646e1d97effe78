"""`cache`: how much room the encoded pictures and captions take, and away with them."""

from __future__ import annotations

import math
import time
from typing import Annotated

import typer

from dora_diffusion.cli.terminal import command, console
from dora_diffusion.errors import ConfigError
from dora_diffusion.screen import printable


@command("cache")
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete what was not used lately (--older-than).")] = False,
    older_than: Annotated[
        int | None, typer.Option(min=0, metavar="DAYS", help="With --clear: unused for so long.")
    ] = None,
) -> None:
    """Show what encoded pictures and captions take on disk, or delete them; runs encode anew what they miss."""
    from dora_diffusion.data.store import Store

    if older_than is not None and not clear:
        raise ConfigError("--older-than says what --clear deletes: give both.")
    store = Store()
    if clear:
        size, count = store.clear(time.time() - older_than * 86400 if older_than else math.inf)
        console.say(
            f"deleted {count:,} encoded pictures and captions, {size / 1e6:,.1f} MB, of {printable(store.folder)}"
        )
        return
    kept = store.contents()
    console.say(f"{printable(store.folder)}: {len(kept):,} encoded pictures and captions", end="")
    if not kept:
        console.say("")
        return
    days = [(time.time() - used) / 86400 for _, used in kept]
    size = sum(size for size, _ in kept)
    console.say(f", {size / 1e6:,.1f} MB, last used {max(0, min(days)):.0f} to {max(0, max(days)):.0f} days ago")

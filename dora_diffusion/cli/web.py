"""`app`, the web app's server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dora_diffusion.cli.terminal import BaseOption, QuantiseOption, command, path_option, say_cautions


@command("app")
def web_app(
    base: BaseOption = "emoji",
    quantise: QuantiseOption = None,
    outputs: Annotated[Path, path_option("--outputs", help="Where runs and pictures are kept.")] = Path("outputs"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen at.")] = 7860,
    host: Annotated[str | None, typer.Option(help="Another address to listen at; needs --auth.")] = None,
    auth: Annotated[str | None, typer.Option(help="USER:PASSWORD for everybody who opens it.")] = None,
    mcp: Annotated[
        bool, typer.Option("--mcp", help="Offer compare and train as tools to MCP clients too; not with --auth.")
    ] = False,
) -> None:
    """Open the web app, on this machine only unless --host and --auth say otherwise."""
    from dora_diffusion.webapp.folders import keep_inside

    keep_inside(outputs)
    from dora_diffusion.webapp.app import launch

    say_cautions(quantise.value if quantise else None)
    launch(
        base=base,
        packing=quantise.value if quantise else None,
        outputs=outputs,
        host=host,
        port=port,
        auth=auth,
        mcp=mcp,
    )

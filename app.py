"""The web app: `python app.py`, then open the address it prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dora_diffusion.errors import DoraDiffusionError
from dora_diffusion.webapp.app import launch


def main() -> None:
    parser = argparse.ArgumentParser(description="Train DoRA and LoRA adapters and compare them, in the browser.")
    parser.add_argument("--base", default="emoji", help="emoji (embedded), a folder, a .safetensors file or a hub id")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), help="where runs and pictures are kept")
    parser.add_argument("--host", help="an address others can reach; needs --auth (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask visitors to log in")
    try:
        launch(**vars(parser.parse_args()))
    except DoraDiffusionError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

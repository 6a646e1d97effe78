"""The web app: `python app.py`, then open the address it prints. The same as `dora-diffusion app`."""

from __future__ import annotations

import sys

from dora_diffusion.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "app")
    main()

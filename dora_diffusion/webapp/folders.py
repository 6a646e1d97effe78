"""Where libraries put what they write aside: below the outputs folder, and nowhere else on the machine."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from dora_diffusion.outputs import make_folder

__all__ = ["keep_inside"]


def keep_inside(outputs: Path) -> None:
    """Call it before Gradio and torch are imported: both make folders for temporary files then. Raises OutputError."""
    folder = make_folder(outputs / "web" / "tmp").resolve()
    folder.chmod(0o700)
    for variable in ("TMPDIR", "MPLCONFIGDIR", "GRADIO_TEMP_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ[variable] = str(folder)
    tempfile.tempdir = str(folder)

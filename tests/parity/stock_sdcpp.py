"""Run by a Python that has stable-diffusion-cpp-python: what stable-diffusion.cpp draws, without this project.

    python stock_sdcpp.py FOLDER

FOLDER/jobs.json is a list of {"model", "file"}: a diffusers folder or checkpoint, and an adapter file or "". The n-th
picture is written to FOLDER/n.png.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stable_diffusion_cpp import StableDiffusion


def main() -> None:
    folder = Path(sys.argv[1])
    model, loaded = None, ""
    for n, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        if job["model"] != loaded:
            model, loaded = StableDiffusion(model_path=job["model"], wtype="f32"), job["model"]
        adapter = f"<lora:{job['file']}:1>" if job["file"] else ""
        pictures = model.generate_image(
            "a cat" + adapter, width=64, height=64, cfg_scale=1, sample_method="euler", sample_steps=2, seed=1
        )
        pictures[0].save(folder / f"{n}.png")


if __name__ == "__main__":
    main()

"""Makes dora_diffusion/webapp/example/: the pair of adapters the web app opens with, and the pictures it shows first.

Run it again whenever the embedded base changes: python docs/make_example.py   (some minutes on two cores)
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from dora_diffusion.comparison.compare import CompareRequest, columns_of, compare
from dora_diffusion.comparison.export import metadata_of, record_of
from dora_diffusion.demo import sample_folder
from dora_diffusion.models.loading import load_base
from dora_diffusion.outputs import save_png
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run import train
from dora_diffusion.webapp.example import EXAMPLE

PROMPT = "frog, openmoji style"
SEEDS = (1, 2)
RANK = 4
STEPS = 400
LEARNING_RATE = 4e-4  # twice the usual: a small rank learns slowly


def main() -> None:
    base = load_base("emoji", device="cpu")
    images = sample_folder()
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            images=str(images),
            validation_images=str(images / "held-out"),
            out=folder,
            kind="both",
            rank=RANK,
            alpha=float(RANK),
            steps=STEPS,
            batch_size=8,
            learning_rate=LEARNING_RATE,
        )
        for event in train(config, base=base):
            print(event, flush=True)
        EXAMPLE.mkdir(exist_ok=True)
        for kind in ("lora", "dora"):
            shutil.copyfile(Path(folder) / f"{kind}.safetensors", EXAMPLE / f"{kind}.safetensors")
    request = CompareRequest((PROMPT,), SEEDS, columns_of([EXAMPLE / "lora.safetensors", EXAMPLE / "dora.safetensors"]))
    for cell in compare(base, request):
        name = EXAMPLE / f"row{cell.row + 1}-column{cell.column + 1}.png"
        print(save_png(cell.image, name, metadata_of(record_of(request, base.name), cell)))


if __name__ == "__main__":
    main()

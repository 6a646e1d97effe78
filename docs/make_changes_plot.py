"""Draws docs/changes.png: what a LoRA, a DoRA and full fine-tuning change in the embedded base (the paper's figure 2).

All three train the attention projections on samples/openmoji for as many steps.
python docs/make_changes_plot.py     (some minutes on two cores)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from dora_diffusion.adapters.injection import adaptable_layers
from dora_diffusion.demo import sample_folder
from dora_diffusion.inspection.look import comparable, look_at
from dora_diffusion.inspection.plots import draw_analyses
from dora_diffusion.models.loading import load_base
from dora_diffusion.outputs import save_png
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.loop import conditioning_for, make_accelerator, prepare, squared_error
from dora_diffusion.training.run import train

PLOT = Path(__file__).parent / "changes.png"
STEPS = 150
FULL_LEARNING_RATE = 1e-4
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(images=str(sample_folder()), out=folder, kind="both", steps=STEPS, batch_size=8)
        for event in train(config, base=load_base("emoji", device="cpu")):
            print(event, flush=True)
        tuned = Path(folder) / "full"
        fine_tune(config, tuned)
        found = look_at(
            [*(Path(folder) / f"{kind}.safetensors" for kind in ("lora", "dora")), tuned], load_base("emoji")
        )
        analyses = comparable([analysis for _, analysis in found if analysis is not None])
        for analysis in analyses:
            print(analysis.name, "correlation", analysis.correlation)
        print(save_png(draw_analyses(analyses), PLOT))


def fine_tune(config: TrainConfig, out: Path) -> None:
    """Train the attention projections whole, and save the UNet."""
    base = load_base("emoji", device="cpu")
    training = prepare(config, base, make_accelerator(config))
    base.denoiser.requires_grad_(False)
    layers = [name for name in adaptable_layers(base.denoiser) if name.endswith(TARGETS)]
    weights = [base.denoiser.get_parameter(f"{name}.weight") for name in layers]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=FULL_LEARNING_RATE, weight_decay=0.0)
    draw = torch.Generator().manual_seed(config.seed)
    (images,) = training.instances
    for _ in range(config.steps):
        index = torch.randint(len(images), (config.batch_size,), generator=draw)
        x0 = images.latents(index, torch.randn(len(index), *images.shape, generator=draw))
        eps = torch.randn(x0.shape, generator=draw)
        t = training.objective.timesteps(len(index), draw)
        loss = squared_error(training, x0, eps, t, conditioning_for(training, images, index)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    base.denoiser.save_pretrained(out)  # type: ignore[operator]


if __name__ == "__main__":
    main()

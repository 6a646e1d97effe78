"""Run as its own process: what stock diffusers makes of adapter files, without this project.

    python stock_diffusers.py FOLDER

For each job in FOLDER/jobs.json: load the base from its folder, load the file the way the job says, save the output.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file


def pipeline_around(model: torch.nn.Module) -> StableDiffusionPipeline | StableDiffusion3Pipeline:
    """A pipeline with nothing in it but the denoiser."""
    if isinstance(model, UNet2DConditionModel):
        return StableDiffusionPipeline(
            vae=None,
            text_encoder=None,
            tokenizer=None,
            unet=model,
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    encoders = dict.fromkeys(
        ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    )
    return StableDiffusion3Pipeline(
        vae=None, transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **encoders
    )


def main(folder: Path) -> None:
    outputs = {}
    for job in json.loads((folder / "jobs.json").read_text()):
        model_class = UNet2DConditionModel if job["base"] == "unet" else SD3Transformer2DModel
        model = model_class.from_pretrained(folder / job["base"]).eval()
        file = str(folder / job["file"])
        if job["how"] == "pipeline":
            pipeline_around(model).load_lora_weights(file)
        else:
            # Without use_safetensors this call reads no header, and takes alpha = rank (diffusers 0.42).
            model.load_lora_adapter(file, prefix="transformer", use_safetensors=True)
        inputs = load_file(folder / f"{job['base']}_inputs.safetensors")
        with torch.no_grad():
            outputs[job["name"]] = model(**inputs, return_dict=False)[0].contiguous()
    save_file(outputs, folder / "outputs.safetensors")
    imported = [name for name in sys.modules if name.split(".")[0] == "dora_diffusion"]
    assert not imported, f"this process must not know the project, and it imported {imported}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))

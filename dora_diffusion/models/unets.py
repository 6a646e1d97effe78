"""How prompts are encoded for the UNets of Stable Diffusion 1, 2 and XL, and how these are called."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dora_diffusion.models.conditioning import Conditioning

__all__ = ["encode_sd", "encode_sdxl", "predict_sd", "predict_sdxl"]


def encode_sd(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    embeds, _ = pipe.encode_prompt(prompts, pipe.device, 1, False)
    return Conditioning({"encoder_hidden_states": embeds})


def predict_sd(unet: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    return unet(x, t, **conditioning.tensors).sample


def encode_sdxl(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, None, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return Conditioning({"encoder_hidden_states": embeds, "text_embeds": pooled})


def predict_sdxl(unet: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    # SDXL is told the original size, the crop's corner and the target size, in pixels; pictures here are cropped to
    # the target size before they are encoded. Its autoencoder reduces by 8.
    height, width = x.shape[-2] * 8, x.shape[-1] * 8
    sizes = torch.tensor([height, width, 0, 0, height, width], device=x.device, dtype=x.dtype)
    embeds = conditioning.tensors["encoder_hidden_states"]
    added = {"text_embeds": conditioning.tensors["text_embeds"], "time_ids": sizes.expand(len(x), -1)}
    return unet(x, t, encoder_hidden_states=embeds, added_cond_kwargs=added).sample

"""The model families that can be trained, one row each: how prompts are encoded, how the denoiser is called.

Adding a family is adding a row to FAMILIES. Drawing pictures needs no row: that is the pipeline's own work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor, nn

from dora_diffusion.errors import BaseModelError
from dora_diffusion.injection import ATTENTION_TARGETS

__all__ = ["FAMILIES", "Conditioning", "Family", "family_of"]


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told beside x and t; every tensor's first axis is the batch."""

    tensors: Mapping[str, Tensor]

    def __getitem__(self, index: Tensor | list[int]) -> Conditioning:
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device, dtype: torch.dtype) -> Conditioning:
        return Conditioning({name: tensor.to(device, dtype) for name, tensor in self.tensors.items()})

    @staticmethod
    def stack(parts: list[Conditioning]) -> Conditioning:
        return Conditioning({name: torch.cat([p.tensors[name] for p in parts]) for name in parts[0].tensors})


Encode = Callable[[DiffusionPipeline, list[str]], Conditioning]
Predict = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True)
class Family:
    """One row: the pipeline class it stands for, which part is adapted and where, and the two calls training makes.

    `encode(pipe, prompts)` gives the conditioning of a batch of prompts; `predict(denoiser, x, t, conditioning)` the
    denoiser's output for noisy latents x [batch, channels, height, width] at timesteps t [batch]. `text_encoders` are
    those that can be trained too: CLIP's, not T5. `packs` is the side of the square of latents that the pipeline makes
    one token.
    """

    name: str
    pipeline: str
    denoiser: str
    encode: Encode
    predict: Predict
    target_modules: tuple[str, ...] = ATTENTION_TARGETS
    text_encoders: tuple[str, ...] = ("text_encoder",)
    guidance_scale: float = 7.5
    learning_rate: float = 1e-4
    packs: int = 1


def _encode_sd(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    embeds, _ = pipe.encode_prompt(prompts, pipe.device, 1, False)
    return Conditioning({"encoder_hidden_states": embeds})


def _predict_sd(unet: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    return unet(x, t, **conditioning.tensors).sample


def _encode_pooled(pipe: DiffusionPipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, None, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return embeds, pooled


def _encode_sdxl(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    embeds, pooled = _encode_pooled(pipe, prompts)
    return Conditioning({"encoder_hidden_states": embeds, "text_embeds": pooled})


def _predict_sdxl(unet: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    # SDXL is told the original size, the crop's corner and the target size, in pixels; pictures here are cropped to
    # the target size before they are encoded. Its autoencoder reduces by 8.
    height, width = x.shape[-2] * 8, x.shape[-1] * 8
    sizes = torch.tensor([height, width, 0, 0, height, width], device=x.device, dtype=x.dtype)
    embeds = conditioning.tensors["encoder_hidden_states"]
    added = {"text_embeds": conditioning.tensors["text_embeds"], "time_ids": sizes.expand(len(x), -1)}
    return unet(x, t, encoder_hidden_states=embeds, added_cond_kwargs=added).sample


def _encode_sd3(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})


def _predict_sd3(transformer: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    return transformer(hidden_states=x, timestep=t, **conditioning.tensors).sample


def _encode_flux(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    embeds, pooled, _ = pipe.encode_prompt(prompts, None, device=pipe.device, num_images_per_prompt=1)
    return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})


def _predict_flux(transformer: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    # Squares of 2 x 2 latents are one token, whose place is said beside it; those of the text have none.
    n, channels, height, width = x.shape
    places = FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, x.device, x.dtype)
    tokens = conditioning.tensors["encoder_hidden_states"].shape[1]
    # FLUX.1 dev is told a guidance scale, which was distilled into it; 1 is what plain flow matching asks for.
    guidance = torch.ones(n, device=x.device) if transformer.config.guidance_embeds else None  # type: ignore[union-attr]
    packed = transformer(
        hidden_states=FluxPipeline._pack_latents(x, n, channels, height, width),
        timestep=t / 1000,
        guidance=guidance,
        img_ids=places,
        txt_ids=torch.zeros(tokens, 3, device=x.device, dtype=x.dtype),
        **conditioning.tensors,
    ).sample
    return FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)


_JOINT_TARGETS = (*ATTENTION_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

FAMILIES = (
    Family("Stable Diffusion 1 and 2", "StableDiffusionPipeline", "unet", _encode_sd, _predict_sd),
    Family(
        "Stable Diffusion XL",
        "StableDiffusionXLPipeline",
        "unet",
        _encode_sdxl,
        _predict_sdxl,
        text_encoders=("text_encoder", "text_encoder_2"),
        guidance_scale=5.0,
    ),
    Family(
        "Stable Diffusion 3",
        "StableDiffusion3Pipeline",
        "transformer",
        _encode_sd3,
        _predict_sd3,
        target_modules=_JOINT_TARGETS,
        text_encoders=("text_encoder", "text_encoder_2"),
        guidance_scale=4.5,
    ),
    Family(
        "FLUX.1",
        "FluxPipeline",
        "transformer",
        _encode_flux,
        _predict_flux,
        target_modules=_JOINT_TARGETS,
        guidance_scale=3.5,
        packs=2,
    ),
)


def family_of(pipe: DiffusionPipeline) -> Family:
    """The row of this pipeline's class. Raises BaseModelError."""
    name = type(pipe).__name__
    for family in FAMILIES:
        if family.pipeline == name:
            return family
    known = ", ".join(family.pipeline for family in FAMILIES)
    raise BaseModelError(f"cannot train a {name} yet; bases of these pipelines can be trained: {known}.")

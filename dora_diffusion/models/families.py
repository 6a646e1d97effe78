"""The model families that can be trained, one row each: how prompts and pictures are encoded, how the denoiser is
called.

Adding a family is adding a row to FAMILIES. Drawing pictures needs no row: that is the pipeline's own work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from dora_diffusion.adapters.injection import ATTENTION_TARGETS, FEED_FORWARD_TARGETS
from dora_diffusion.errors import BaseModelError
from dora_diffusion.models import dits, unets
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.latents import flux2_posterior, kl_posterior, qwen_posterior

__all__ = ["FAMILIES", "Family", "family_of"]

Encode = Callable[[DiffusionPipeline, list[str]], Conditioning]
EncodeAgain = Callable[[DiffusionPipeline, list[str], Conditioning], Conditioning]
Posterior = Callable[[DiffusionPipeline, Tensor], tuple[Tensor, Tensor]]
Predict = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True)
class Family:
    """One row: the pipeline class it stands for, where it is adapted, and the three calls training makes.

    `encode(pipe, prompts)` gives the conditioning of a batch of prompts; `posterior(pipe, pixels)` mean and standard
    deviation of the latents of pictures; `predict(denoiser, x, t, conditioning)` the denoiser's output for noisy
    latents x [batch, channels, height, width] at timesteps t [batch]. `text_encoders` are those that can be trained
    too: CLIP's, not T5 or a language model; where others are beside them, `encode_trained(pipe, prompts, before)` runs
    these alone and takes the others' part from the conditioning as it was. `packs` is the side of the square of
    latents that the pipeline makes one token.
    """

    name: str
    pipeline: str
    encode: Encode
    predict: Predict
    posterior: Posterior = kl_posterior
    target_modules: tuple[str, ...] = ATTENTION_TARGETS
    feed_forward: tuple[str, ...] = FEED_FORWARD_TARGETS
    convolutions: tuple[str, ...] = ()
    text_encoders: tuple[str, ...] = ("text_encoder",)
    encode_trained: EncodeAgain | None = None
    guidance_scale: float = 7.5
    learning_rate: float = 1e-4
    packs: int = 1


_CONVOLUTIONS = (r".+\.resnets\.\d+\.conv[12]",)  # of the residual blocks, which no attention reaches
_JOINT_TARGETS = (*ATTENTION_TARGETS, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

FAMILIES = (
    Family(
        "Stable Diffusion 1 and 2",
        "StableDiffusionPipeline",
        unets.encode_sd,
        unets.predict_sd,
        convolutions=_CONVOLUTIONS,
    ),
    Family(
        "Stable Diffusion XL",
        "StableDiffusionXLPipeline",
        unets.encode_sdxl,
        unets.predict_sdxl,
        convolutions=_CONVOLUTIONS,
        text_encoders=("text_encoder", "text_encoder_2"),
        guidance_scale=5.0,
    ),
    Family(
        "Stable Diffusion 3",
        "StableDiffusion3Pipeline",
        dits.encode_sd3,
        dits.predict_sd3,
        target_modules=_JOINT_TARGETS,
        text_encoders=("text_encoder", "text_encoder_2"),
        encode_trained=dits.encode_clip_of_sd3,
        guidance_scale=4.5,
    ),
    Family(
        "FLUX.1",
        "FluxPipeline",
        dits.encode_flux,
        dits.predict_flux,
        target_modules=_JOINT_TARGETS,
        encode_trained=dits.encode_clip_of_flux,
        guidance_scale=3.5,
        packs=2,
    ),
    Family(
        "Chroma",
        "ChromaPipeline",
        dits.encode_chroma,
        dits.predict_chroma,
        target_modules=_JOINT_TARGETS,
        text_encoders=(),
        guidance_scale=5.0,
        packs=2,
    ),
    Family(
        "FLUX.2 klein",
        "Flux2KleinPipeline",
        dits.encode_flux2,
        dits.predict_flux2,
        posterior=flux2_posterior,
        # Its single blocks have attention and feed-forward layers in one: `to_qkv_mlp_proj` and a `to_out` of its own.
        target_modules=(*_JOINT_TARGETS, "to_qkv_mlp_proj", r"single_transformer_blocks\.\d+\.attn\.to_out"),
        feed_forward=("ff.linear_in", "ff.linear_out"),
        text_encoders=(),
        guidance_scale=4.0,
        packs=2,
    ),
    Family(
        "Qwen-Image",
        "QwenImagePipeline",
        dits.encode_qwen,
        dits.predict_qwen,
        posterior=qwen_posterior,
        target_modules=_JOINT_TARGETS,
        feed_forward=("img_mlp.net.0.proj", "img_mlp.net.2"),
        text_encoders=(),
        guidance_scale=4.0,
    ),
    Family(
        "Z-Image",
        "ZImagePipeline",
        dits.encode_z_image,
        dits.predict_z_image,
        feed_forward=("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
        text_encoders=(),
        guidance_scale=4.0,
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

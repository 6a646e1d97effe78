"""How prompts are encoded for the diffusion transformers, and how these are called.

x [batch, channels, height, width] are noisy latents, t [batch] timesteps from 0 to 1000; every function here returns
what flow matching asks for, noise less picture, in x's shape.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, Flux2KleinPipeline, FluxPipeline, QwenImagePipeline
from torch import Tensor, nn

from dora_diffusion.models.conditioning import Conditioning

__all__ = [
    "encode_chroma",
    "encode_clip_of_flux",
    "encode_clip_of_sd3",
    "encode_flux",
    "encode_flux2",
    "encode_qwen",
    "encode_sd3",
    "encode_z_image",
    "predict_chroma",
    "predict_flux",
    "predict_flux2",
    "predict_qwen",
    "predict_sd3",
    "predict_z_image",
]


def encode_sd3(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompts, None, None, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})


def encode_clip_of_sd3(pipe: DiffusionPipeline, prompts: list[str], before: Conditioning) -> Conditioning:
    """CLIP's tokens anew, T5's, which come after them, as they were."""
    if pipe.text_encoder_3 is None:
        return encode_sd3(pipe, prompts)
    found = [pipe._get_clip_prompt_embeds(prompts, device=pipe.device, clip_model_index=i) for i in (0, 1)]
    clip, pooled = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
    whole = before.tensors["encoder_hidden_states"].to(clip)
    clip = F.pad(clip, (0, whole.shape[-1] - clip.shape[-1]))
    embeds = torch.cat([clip, whole[:, clip.shape[1] :]], 1)
    return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})


def predict_sd3(transformer: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    return transformer(hidden_states=x, timestep=t, **conditioning.tensors).sample


def encode_flux(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    embeds, pooled, _ = pipe.encode_prompt(prompts, None, device=pipe.device, num_images_per_prompt=1)
    return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})


def encode_clip_of_flux(pipe: DiffusionPipeline, prompts: list[str], before: Conditioning) -> Conditioning:
    """What CLIP says of the whole text anew, T5's tokens as they were."""
    pooled = pipe._get_clip_prompt_embeds(prompts, device=pipe.device)
    embeds = before.tensors["encoder_hidden_states"].to(pooled)
    return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled})


def predict_flux(transformer: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    # FLUX.1 dev is told a guidance scale, which was distilled into it; 1 is what plain flow matching asks for.
    guidance = torch.ones(len(x), device=x.device) if transformer.config.guidance_embeds else None  # type: ignore[union-attr]
    return _packed(transformer, x, t, guidance=guidance, **conditioning.tensors)


def encode_chroma(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    embeds, _, mask, *_ = pipe.encode_prompt(prompts, device=pipe.device, do_classifier_free_guidance=False)
    return Conditioning({"encoder_hidden_states": embeds, "mask": mask})


def predict_chroma(transformer: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    # The mask goes on over the picture's tokens, none of which is masked.
    embeds, mask = conditioning.tensors["encoder_hidden_states"], conditioning.tensors["mask"]
    mask = torch.cat([mask, mask.new_ones(len(x), x.shape[-2] // 2 * (x.shape[-1] // 2))], 1)
    with _checkpointed_with(transformer, attention_mask=mask):
        return _packed(transformer, x, t, encoder_hidden_states=embeds, attention_mask=mask)


@contextmanager
def _checkpointed_with(transformer: nn.Module, **told: Tensor) -> Iterator[None]:
    """Gradient checkpointing that tells every block this too, unless it is told already.

    diffusers 0.42 leaves the mask out of its calls of Chroma's single blocks, where they are checkpointed. The blocks
    are computed again in the backward pass, so what they are told stays with each call.
    """
    plain = getattr(transformer, "_gradient_checkpointing_func", None)
    if plain is None:
        yield
        return

    def telling(block: nn.Module, *given: object) -> object:
        known = inspect.signature(block.forward).bind(*given).arguments
        return plain(
            functools.partial(block, **{name: value for name, value in told.items() if name not in known}), *given
        )

    transformer._gradient_checkpointing_func = telling  # type: ignore[assignment]
    try:
        yield
    finally:
        transformer._gradient_checkpointing_func = plain


def _packed(
    transformer: nn.Module, x: Tensor, t: Tensor, *, encoder_hidden_states: Tensor, **more: Tensor | None
) -> Tensor:
    """Squares of 2 x 2 latents are one token, whose place is said beside it; those of the text have none."""
    n, channels, height, width = x.shape
    packed = transformer(
        hidden_states=FluxPipeline._pack_latents(x, n, channels, height, width),
        timestep=t / 1000,
        img_ids=FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, x.device, x.dtype),
        txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3, device=x.device, dtype=x.dtype),
        encoder_hidden_states=encoder_hidden_states,
        **more,
    ).sample
    return FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)


def encode_flux2(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    embeds, _ = pipe.encode_prompt(prompts, device=pipe.device)
    return Conditioning({"encoder_hidden_states": embeds})


def predict_flux2(transformer: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    # The latents come with squares of 2 x 2 as channels already: each place is one token.
    embeds = conditioning.tensors["encoder_hidden_states"]
    packed = transformer(
        hidden_states=Flux2KleinPipeline._pack_latents(x),
        timestep=t / 1000,
        guidance=None,
        encoder_hidden_states=embeds,
        txt_ids=Flux2KleinPipeline._prepare_text_ids(embeds).to(x.device),
        img_ids=Flux2KleinPipeline._prepare_latent_ids(x).to(x.device),
    ).sample
    return packed.transpose(1, 2).reshape(x.shape)


def encode_qwen(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    embeds, mask = pipe.encode_prompt(prompts, device=pipe.device)
    mask = embeds.new_ones(embeds.shape[:2]) if mask is None else mask
    return Conditioning({"encoder_hidden_states": embeds, "mask": mask})


def predict_qwen(transformer: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    n, channels, height, width = x.shape
    packed = transformer(
        hidden_states=QwenImagePipeline._pack_latents(x, n, channels, height, width),
        timestep=t / 1000,
        guidance=None,
        encoder_hidden_states=conditioning.tensors["encoder_hidden_states"],
        encoder_hidden_states_mask=conditioning.tensors["mask"].bool(),
        img_shapes=[[(1, height // 2, width // 2)]] * n,
    ).sample
    return QwenImagePipeline._unpack_latents(packed, height, width, vae_scale_factor=1).squeeze(2)


def encode_z_image(pipe: DiffusionPipeline, prompts: list[str]) -> Conditioning:
    # A list of its own: the pipeline writes its chat template into the one it is given.
    embeds, _ = pipe.encode_prompt(list(prompts), pipe.device, do_classifier_free_guidance=False)
    rows = [{"encoder_hidden_states": row[None], "mask": row.new_ones(1, len(row))} for row in embeds]
    return Conditioning.stack([Conditioning(row) for row in rows])


def predict_z_image(transformer: nn.Module, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    # It takes lists, its time runs from noise (0) to picture (1), and it predicts picture less noise.
    embeds, mask = conditioning.tensors["encoder_hidden_states"], conditioning.tensors["mask"].bool()
    texts = [row[kept] for row, kept in zip(embeds, mask, strict=True)]
    found = transformer(list(x.unsqueeze(2).unbind(0)), 1 - t / 1000, texts).sample
    return -torch.stack(list(found)).squeeze(2)

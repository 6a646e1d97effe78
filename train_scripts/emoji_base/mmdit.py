"""The base "emoji-dit": Stable Diffusion 3's transformer, small, with two CLIP text encoders and flow matching."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from .autoencoder import LATENT_CHANNELS
from .denoiser import LATENT_SIZE, Denoiser
from .text import spread_embeddings, text_config

TEXT_WIDTH = 96  # of each encoder
WIDTH, HEADS, DEPTH = 192, 6, 6
# The stock pipeline sets this many zeros behind the words where SD3 has its third text encoder.
PADDING = 256


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Straight paths from picture to noise, evenly spaced steps."""
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def new_transformer() -> SD3Transformer2DModel:
    """About eight million parameters; patches of 2 x 2 latents, 64 of them at 64 pixels."""
    model = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=DEPTH,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )
    # adaLN-Zero (Peebles and Xie 2023): every block begins as the identity.
    for name, parameter in model.named_parameters():
        if ".linear." in name or name.startswith("proj_out"):
            nn.init.zeros_(parameter)
    return model


class CountedPadding:
    """SD3's joint attention where the last text token stands for PADDING equal ones.

    All-zero tokens without positions stay equal to each other through every layer, so one of them, counted PADDING
    times in each softmax, gives what the pipeline's PADDING give, at a quarter of the cost.
    """

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: None = None
    ) -> tuple[Tensor, Tensor]:
        n, pixels, width = hidden_states.shape

        def heads(x: Tensor) -> Tensor:
            return x.view(n, -1, attn.heads, width // attn.heads).transpose(1, 2)

        query = attn.norm_q(heads(attn.to_q(hidden_states)))
        key = attn.norm_k(heads(attn.to_k(hidden_states)))
        added_query = attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))
        added_key = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))
        query, key = torch.cat([query, added_query], 2), torch.cat([key, added_key], 2)
        value = heads(torch.cat([attn.to_v(hidden_states), attn.add_v_proj(encoder_hidden_states)], 1))
        count = F.pad(query.new_zeros(key.shape[2] - 1), (0, 1), value=math.log(PADDING))
        # Plain products: PyTorch's fused attention is slow backward on a CPU.
        weights = (query @ key.mT * (width // attn.heads) ** -0.5 + count).softmax(-1)
        joined = (weights.to(value.dtype) @ value).transpose(1, 2).reshape(n, -1, width)
        pictures, words = joined.split([pixels, joined.shape[1] - pixels], 1)
        return attn.to_out[0](pictures), words if attn.context_pre_only else attn.to_add_out(words)


class MMDiTDenoiser(Denoiser):
    """Noisy latents, time and tokens to the flow from picture to noise."""

    ends = ("transformer.pos_embed", "transformer.proj_out")
    parts = ("text_encoder", "text_encoder_2", "transformer")
    summary = "`StableDiffusion3Pipeline` (flow matching, no third text encoder)"
    sampler = "Euler"
    absent = ("text_encoder_3", "tokenizer_3")

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        config = text_config(tokenizer, TEXT_WIDTH, heads=4)
        self.text_encoder = spread_embeddings(CLIPTextModelWithProjection(config))
        self.text_encoder_2 = spread_embeddings(CLIPTextModelWithProjection(config))
        self.transformer = new_transformer()
        self.transformer.set_attn_processor(CountedPadding())

    def noised(self, x0: Tensor, eps: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = share.view(-1, 1, 1, 1)
        return (1 - s) * x0 + s * eps, share * 1000, eps - x0

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        both = [encoder(tokens, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        words = torch.cat([told.hidden_states[-2] for told in both], -1)  # [N, tokens, joint width]
        pooled = torch.cat([told.text_embeds for told in both], -1)
        return self.transformer(noisy, F.pad(words, (0, 0, 0, 1)), pooled, t, return_dict=False)[0]

    def pipeline(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
        self.transformer.set_attn_processor(JointAttnProcessor2_0())
        vae.register_to_config(shift_factor=0.0)  # the pipeline wants a number
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=new_scheduler(),
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=tokenizer,
            **dict.fromkeys(self.absent),
        )

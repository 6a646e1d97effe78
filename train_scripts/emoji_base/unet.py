"""The base "emoji": a Stable Diffusion UNet and one CLIP text encoder, velocity prediction."""

from __future__ import annotations

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from .autoencoder import LATENT_CHANNELS
from .denoiser import LATENT_SIZE, Denoiser
from .text import spread_embeddings, text_config

TEXT_WIDTH = 192


def new_scheduler() -> DDIMScheduler:
    """Velocity prediction down to no signal at all, so that white backgrounds are really white."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=True,
    )


def new_unet() -> UNet2DConditionModel:
    """About eight million parameters, with attention at every level for adapters to work on."""
    levels = (64, 128, 144)
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * len(levels),
        up_block_types=("CrossAttnUpBlock2D",) * len(levels),
        block_out_channels=levels,
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        # Heads per level, whatever diffusers calls it; one where attention costs most.
        attention_head_dim=(1, 4, 4),
        norm_num_groups=16,
    )


class UNetDenoiser(Denoiser):
    """Noisy latents, time and tokens to velocity."""

    ends = ("unet.conv_in", "unet.conv_out", "unet.conv_norm_out")
    parts = ("text_encoder", "unet")
    summary = "`StableDiffusionPipeline` (velocity prediction, zero terminal SNR)"
    sampler = "DDIM"

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder = spread_embeddings(CLIPTextModel(text_config(tokenizer, TEXT_WIDTH, heads=6)))
        self.unet = new_unet()
        self._signal = new_scheduler().alphas_cumprod

    def quicken(self) -> None:
        # Plain products are twice as quick as PyTorch's fused attention backward on a CPU.
        self.unet.set_attn_processor(AttnProcessor())

    def noised(self, x0: Tensor, eps: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = (share * 1000).long().clamp(max=999)
        a = self._signal[t].sqrt().view(-1, 1, 1, 1)
        s = (1 - self._signal[t]).sqrt().view(-1, 1, 1, 1)
        return a * x0 + s * eps, t, a * eps - s * x0

    def forward(self, noisy: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        words = self.text_encoder(tokens).last_hidden_state  # [N, tokens, width]
        return self.unet(noisy, t, words, return_dict=False)[0]

    def pipeline(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=tokenizer,
            unet=self.unet,
            scheduler=new_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

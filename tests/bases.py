"""Small real models with random weights, made on the spot: one of each family that can be trained."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

TOKENIZER = Path(__file__).parent.parent / "dora_diffusion" / "assets" / "emoji" / "tokenizer"


def unet(seed: int = 0, **overrides: object) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    config = {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**config, **overrides}).eval()


def sd3_transformer(seed: int = 0, joint_attention_dim: int = 32) -> SD3Transformer2DModel:
    torch.manual_seed(seed)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=joint_attention_dim,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    ).eval()


def flux_transformer(seed: int = 0, in_channels: int = 4, guidance_embeds: bool = False) -> FluxTransformer2DModel:
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        guidance_embeds=guidance_embeds,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ).eval()


VAE = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 16,
}


def vae(shift_factor: float | None = None) -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(**VAE, shift_factor=shift_factor).eval()


def _text_config(projection: int = 32) -> CLIPTextConfig:
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def stable_diffusion(prediction_type: str = "epsilon") -> DiffusionPipeline:
    torch.manual_seed(2)
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(_text_config()).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=unet(),
        scheduler=DDIMScheduler(prediction_type=prediction_type, clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl() -> DiffusionPipeline:
    torch.manual_seed(3)
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(_text_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config()).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER),
        unet=unet(
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 6 * 8,
            transformer_layers_per_block=(1, 2),
        ),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(CLIPTokenizer.from_pretrained(TOKENIZER)),
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
    )
    return T5EncoderModel(config).eval()


def stable_diffusion_3(with_t5: bool = False) -> DiffusionPipeline:
    torch.manual_seed(4)
    return StableDiffusion3Pipeline(
        vae=vae(shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(_text_config()).eval(),
        text_encoder_2=CLIPTextModelWithProjection(_text_config()).eval(),
        text_encoder_3=t5(64) if with_t5 else None,
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER),
        tokenizer_3=CLIPTokenizer.from_pretrained(TOKENIZER) if with_t5 else None,
        transformer=sd3_transformer(joint_attention_dim=64),  # the two CLIP embeddings side by side
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(guidance_embeds: bool = True) -> DiffusionPipeline:
    torch.manual_seed(5)
    return FluxPipeline(
        vae=vae(shift_factor=0.1),
        text_encoder=CLIPTextModel(_text_config()).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        text_encoder_2=t5(32),
        tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER),
        transformer=flux_transformer(in_channels=16, guidance_embeds=guidance_embeds),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def chroma_transformer(seed: int = 0) -> ChromaTransformer2DModel:
    torch.manual_seed(seed)
    return ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()


def chroma() -> DiffusionPipeline:
    parts = flux()
    return ChromaPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder_2,
        tokenizer=parts.tokenizer_2,
        transformer=chroma_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if not enable_thinking | default(true) %}<think>

</think>

{% endif %}{% endif %}"""


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes as tokens, with Qwen's chat template in short."""
    letters = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[], model_max_length=4096)
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    tokenizer.chat_template = CHAT
    return tokenizer


def _qwen3_config(layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(qwen_tokenizer()),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
    )


def flux2_transformer(seed: int = 0) -> Flux2Transformer2DModel:
    torch.manual_seed(seed)
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).eval()


def flux2_klein() -> DiffusionPipeline:
    torch.manual_seed(6)
    vae = AutoencoderKLFlux2(**VAE, patch_size=(2, 2)).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        vae=vae,
        text_encoder=Qwen3ForCausalLM(_qwen3_config(27)).eval(),  # the pipeline reads layers 9, 18 and 27
        tokenizer=qwen_tokenizer(),
        transformer=flux2_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def qwen_transformer(seed: int = 0) -> QwenImageTransformer2DModel:
    torch.manual_seed(seed)
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    ).eval()


def qwen_image() -> DiffusionPipeline:
    torch.manual_seed(7)
    tokenizer = qwen_tokenizer()
    vae = AutoencoderKLQwenImage(
        base_dim=16,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    ).eval()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16}
    return QwenImagePipeline(
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision)
        ).eval(),
        tokenizer=tokenizer,
        transformer=qwen_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def z_image_transformer(seed: int = 0) -> ZImageTransformer2DModel:
    torch.manual_seed(seed)
    model = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
    )
    for name, parameter in model.named_parameters():
        if name.endswith("pad_token"):
            nn.init.normal_(parameter)
    return model.eval()


def z_image() -> DiffusionPipeline:
    torch.manual_seed(8)
    return ZImagePipeline(
        vae=vae(shift_factor=0.1),
        text_encoder=Qwen3Model(_qwen3_config(2)).eval(),
        tokenizer=qwen_tokenizer(),
        transformer=z_image_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


TRANSFORMERS = (stable_diffusion_3, flux, chroma, flux2_klein, qwen_image, z_image)

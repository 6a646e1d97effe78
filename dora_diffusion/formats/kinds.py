"""What files are that people take for an adapter of an image model, by their keys: whose they are, and where they go.

A row for each kind. `file_of` knows files that hold no adapter at all, `model_of_names` adapters of models that no base
here is, and `advice` what to do about a method that is not read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

__all__ = ["FIRST_LAYERS", "Kind", "advice", "file_of", "model_of_names", "wider_base"]


@dataclass(frozen=True)
class Kind:
    """What it is, who writes it, and the way out, each as it stands in a sentence; `keys` are what it is told by."""

    what: str
    writer: str
    way_out: str
    keys: str
    beside_adapters: bool = False  # it is this whatever else the file holds

    def said(self) -> str:
        """As the rest of a sentence that begins with the file's name."""
        return f"is {self.what}, as {self.writer} writes it. {self.way_out}"


BESIDE = "It stands beside the base, not in its weights, so that it is no LoRA or DoRA: "
A_BASE = (
    "Of Stable Diffusion 1, 2 and XL it is a base here: --base FILE. What it changed in its own base, dora-diffusion "
    "inspect FILE --base BASE says; LyCORIS and sd-scripts extract an adapter from the difference."
)
FILES = (
    Kind(
        "an IP-Adapter",
        "tencent-ailab, XLabs or InstantX",
        BESIDE + "load it with pipe.load_ip_adapter of diffusers, or as an IP-Adapter in ComfyUI.",
        r"(?:image_proj|ip_adapter|image_proj_model|ip_adapter_proj_model)\..+|.+\.ip_adapter_\w+\..+",
        beside_adapters=True,
    ),
    Kind(
        "a Control-LoRA",
        "Stability AI",
        "It makes a ControlNet of its base: load it as a ControlNet in ComfyUI or Forge.",
        r"lora_controlnet",
        beside_adapters=True,
    ),
    Kind(
        "a ControlNet-LLLite",
        "kohya's sd-scripts",
        "It is given with a control picture: load it in sd-scripts' image generator or in ComfyUI's node for it.",
        r"lllite_\w+\..+",
        beside_adapters=True,
    ),
    Kind(
        "a ControlNet",
        "lllyasviel, diffusers, XLabs or InstantX",
        BESIDE + "load it with ControlNetModel (from_pretrained, from_single_file) of diffusers, or as one in ComfyUI.",
        r"(?:control_model|input_hint_block|zero_convs|middle_block_out)\..+"
        r"|(?:controlnet|control)_(?:cond_embedding|down_blocks|mid_block|blocks|single_blocks|x_embedder|layers"
        r"|noise_refiner|all_x_embedder|mode_embedder|context_embedder)\..+|pos_embed_input\..+",
    ),
    Kind(
        "a T2I-Adapter",
        "TencentARC",
        BESIDE + "load it with T2IAdapter.from_pretrained of diffusers, or as a ControlNet in ComfyUI.",
        r"adapter\.(?:body|conv_in|channel_extender)\..+|body\.\d+\.(?:block[12]|in_conv|resnets)\..+",
    ),
    Kind(
        "a motion module",
        "AnimateDiff",
        BESIDE + "load it with MotionAdapter and AnimateDiffPipeline of diffusers, or with AnimateDiff in ComfyUI.",
        r"(?:.+\.)?motion_modules\..+",
    ),
    Kind(
        "a hypernetwork",
        "A1111",
        "No base takes one here: load it in A1111 or ComfyUI.",
        r"(?:320|640|768|1024|1280|2048)[._][01][._]linear[._].+",
    ),
    Kind(
        "an embedding (textual inversion)",
        "A1111, sd-scripts, OneTrainer or diffusers",
        "It is a new word, no change of layers: load it with pipe.load_textual_inversion(FILE, token=WORD) of "
        "diffusers, or put it into embeddings/ of ComfyUI, Forge or A1111.",
        r"emb_params|string_to_param(?:\..+)?|(?:clip_[lgh]|t5|t5xxl|llama|qwen)(?:_out)?|bundle_emb\..+|<[^>.]+>",
    ),
    Kind(
        "a base that nunchaku packed (SVDQuant)",
        "nunchaku (DeepCompressor)",
        "Load it in nunchaku, and give adapters for the base that it was made from.",
        r".+\.(?:qweight|wscales|wtscale|smooth_factor|smooth_factor_orig)",
    ),
    Kind(
        "a whole checkpoint",
        "sd-scripts, ComfyUI, OneTrainer or a merge",
        A_BASE,
        r"model\.diffusion_model\..+\.(?:weight|bias)|(?:cond_stage_model|conditioner)\..+",
    ),
    Kind(
        "an autoencoder (VAE)",
        "diffusers, Stability AI or ComfyUI",
        "A base has its own: pipe.vae = AutoencoderKL.from_single_file(FILE) puts another one into a pipeline.",
        r"(?:first_stage_model|vae)\..+|(?:encoder|decoder)\.(?:conv_in|conv_out|down|up|mid|down_blocks|up_blocks"
        r"|mid_block|middle|downsamples|upsamples)\..+",
    ),
    Kind(
        "an upscaler",
        "ESRGAN and its kin",
        "It works on pictures: load it as an upscale model in ComfyUI, Forge or A1111.",
        r"(?:model\.\d+\.sub|body)\.\d+\.(?:RDB|rdb)\d\..+|(?:conv_first|conv_up1|HRconv|conv_hr)\..+",
    ),
    Kind(
        "the denoiser of a model, whole",
        "diffusers, ComfyUI or a fine-tuning",
        A_BASE,
        r"(?:diffusion_model\.|transformer\.|unet\.|net\.)?(?:down_blocks|up_blocks|mid_block|input_blocks|output_blocks"
        r"|middle_block|double_blocks|single_blocks|joint_blocks|transformer_blocks|single_transformer_blocks|layers"
        r"|noise_refiner|context_refiner|blocks)\.(?:\d+\.)?\w.*(?<!lora_A)(?<!lora_B)(?<!lora_down)(?<!lora_up)"
        r"\.(?:weight|bias|scale)",
    ),
    Kind(
        "a text encoder, whole",
        "transformers or ComfyUI",
        "A base has its own: pipe.text_encoder takes another one of the same class.",
        r"(?:text_model\.|transformer\.)?(?:text_model\.encoder|encoder\.layers|encoder\.block|resblocks|model\.layers"
        r"|model\.language_model|shared)\..+|text_projection|logit_scale|lm_head\.weight",
    ),
    Kind(
        "an image encoder",
        "OpenAI's CLIP, OpenCLIP or SigLIP",
        "It belongs to an IP-Adapter or a style model: load it where these are loaded.",
        r"(?:vision_model|visual)\..+",
    ),
)


@dataclass(frozen=True)
class ForeignModel:
    """A model that no base here is: what it is, where its adapters go, and the names of its layers."""

    what: str
    way_out: str
    names: str


VIDEO = "a model for video"
MODELS = (
    ForeignModel(f"Cosmos or Anima, {VIDEO} or pictures", "ComfyUI", r"blocks\.\d+\.(?:self|cross)_attn\.\w+_proj"),
    ForeignModel(
        f"Wan, {VIDEO}",
        "diffusers' WanPipeline or ComfyUI",
        r"blocks\.\d+\.(?:(?:self|cross)_attn\.(?:q|k|v|o|k_img|v_img)|attn[12]\..+|ffn\..+)|_?blocks_\d+_(?:self_attn|cross_attn|ffn)_.+",
    ),
    ForeignModel(
        f"HunyuanVideo, {VIDEO}",
        "diffusers' HunyuanVideoPipeline or ComfyUI",
        r"(?:double|single)_blocks\.\d+\.(?:(?:img|txt)_attn_(?:qkv|proj)|(?:img|txt)_mlp\.fc\d|\w+\.linear)"
        r"|(?:txt_in\.|context_embedder\.token_refiner\.|txt_in_)?(?:individual_token_refiner|refiner_blocks).+",
    ),
    ForeignModel(
        f"LTX-2, {VIDEO} and sound",
        "diffusers' LTX2Pipeline or ComfyUI",
        r".*(?:audio_attn|audio_ff|_to_audio_|_to_video_).*",
    ),
    ForeignModel(
        "LTX-Video, CogVideoX, PixArt or Sana",
        "the pipeline of its model in diffusers, or ComfyUI",
        r"transformer_blocks[._]\d+[._]attn[12][._].+",
    ),
    ForeignModel(
        f"Mochi, {VIDEO}", "diffusers' MochiPipeline or ComfyUI", r"blocks\.\d+\.attn\.(?:qkv_[xy]|proj_[xy])"
    ),
    ForeignModel("AnimateDiff (a motion LoRA)", "diffusers' AnimateDiffPipeline or ComfyUI", r".*motion_modules.*"),
    ForeignModel(
        "ACE-Step, a model for music",
        "diffusers' AceStepPipeline or ComfyUI",
        r".*(?:lyric_encoder|speaker_embedder|genre_embedder|transformer_blocks\.\d+\.cross_attn).*",
    ),
    ForeignModel("HiDream", "diffusers' HiDreamImagePipeline or ComfyUI", r"(?:double|single)_stream_blocks[._].+"),
    ForeignModel("AuraFlow", "diffusers' AuraFlowPipeline or ComfyUI", r"joint_transformer_blocks[._].+"),
    ForeignModel(
        "Hunyuan-DiT",
        "diffusers' HunyuanDiTPipeline or ComfyUI",
        r"blocks\.\d+\.attn[12]\.(?:Wqkv|[qk]v?_proj|kv_proj)",
    ),
    ForeignModel("Stable Cascade", "diffusers' StableCascadePriorPipeline or ComfyUI", r"lora_prior_.+"),
)
# What stands in a key of an adapter, of a method that is read or not.
_OF_ADAPTERS = re.compile(
    r"lora|hada_|lokr_|oft_|vera_|ia3_|hra_|fourierft|dora_scale|magnitude|wdecomp|\.(?:diff|diff_b|w_norm|b_norm|"
    r"set_weight|reshape_weight|on_input|[ab][12]\.weight)$"
)
IN_PEFT = (
    "PEFT reads it: load it there, merge_and_unload(), and save_pretrained the model, which is a base here. Or train a "
    "LoRA, DoRA, LoHa or LoKr, which every program takes"
)
IN_LYCORIS = "LyCORIS reads it: merge it into its base there; the merged model is a base here"
# By what leaves.py calls a method, and modules.py a module.
ADVICE = {
    "PEFT's OFT": IN_PEFT,
    "PEFT's BOFT": IN_PEFT,
    "PEFT's IA3": IN_PEFT,
    "PEFT's VeRA": IN_PEFT,
    "PEFT's AdaLoRA": IN_PEFT,
    "PEFT's FourierFT": IN_PEFT,
    "PEFT's HRA": IN_PEFT,
    "PEFT's MiSS or Bone": IN_PEFT,
    "PEFT's RandLoRA": IN_PEFT,
    "PEFT's VB-LoRA": IN_PEFT,
    "PEFT's LN tuning": IN_PEFT,
    "PEFT's embedding LoRA": "PEFT reads it: a change of the token embedding, which no program for pictures loads",
    "LyCORIS GLoRA with a core": IN_LYCORIS,
    "LyCORIS T-LoRA, which is relative to values that its file lacks": IN_LYCORIS,
    "a LoKr with a core in its first factor, which no program writes": "train it again without the core",
    "kohya's OFT": "sd-scripts reads it (networks/merge_lora.py merges it into its base, which is a base here then)",
    "a weight that ComfyUI replaces whole": "ComfyUI reads it; it is no change of a weight, and has no strength",
    "a LoRA as nunchaku keeps it": "its rows stand in the order of nunchaku's kernels: give the file it was made from",
    "an update of convolutions along one axis or three, as models for sound and video have them": (
        "its model's own pipeline in diffusers, or ComfyUI, loads it"
    ),
}


FIRST_LAYERS = ("conv_in", "x_embedder", "img_in", "pos_embed.proj", "all_x_embedder.2-1")  # what takes the latents


def wider_base(own: int, theirs: int) -> str:
    """What an adapter is whose first layer takes more inputs than the base's."""
    return (
        f"; it takes a second picture (depth, edges, a mask, a picture to edit) beside the noise, as BFL's control and "
        f"fill adapters do, and its base has {theirs} inputs there, not {own}. Load it into a base made so "
        "(black-forest-labs/FLUX.1-Depth-dev, -Canny-dev or -Fill-dev, an inpainting UNet), or into diffusers' "
        "FluxControlPipeline, which widens its own"
    )


def advice(kind: str) -> str:
    """What to do about a method that is not read; empty where there is nothing to say but its name."""
    return ADVICE.get(kind, "")


def file_of(keys: Collection[str]) -> Kind | None:
    """What a file with these keys is that is no adapter; None for one that is, or that no row knows."""
    has_adapter = any(_OF_ADAPTERS.search(key) for key in keys)
    for kind in FILES:
        if (kind.beside_adapters or not has_adapter) and any(re.fullmatch(kind.keys, key) for key in keys):
            return kind
    return None


def model_of_names(names: Iterable[str]) -> ForeignModel | None:
    """The model that most of these layers belong to, without what stands before their names; None where none does."""
    names = list(names)
    counts = {model: sum(re.fullmatch(model.names, name) is not None for name in names) for model in MODELS}
    most = max(MODELS, key=lambda model: counts[model])
    return most if 2 * counts[most] >= len(names) > 0 else None

"""What other programs make of adapter files, as data: one row per program, with the source it was read from.

A row says which module names and which keys the program reads, and the formula it puts them into. They change: when a
program does, its row is mended, and docs/parity.md with it. `formula.py` computes what a row says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dora_diffusion.errors import ConfigError, nearest
from dora_diffusion.formats.anatomy import MODELS, Model

__all__ = ["PROGRAMS", "Program", "Spelling", "program_named"]

Part = Literal["down", "up", "core", "alpha", "magnitude", "difference"]
EVERY: tuple[Model, ...] = MODELS
FIRST: tuple[Model, ...] = ("unet", "sd3", "flux")
FLOAT32_EPSILON = 2.0**-23

# How a flat name of an original checkpoint goes on after its prefix.
ORIGINAL = (
    "(?:input_blocks|middle_block|output_blocks|time_embed_[02]|label_emb|out_2"
    "|joint_blocks|x_embedder_proj|context_embedder|[ty]_embedder"
    "|double_blocks|single_blocks|img_in|txt_in|time_in|vector_in|guidance_in|final_layer)"
)
CLIP = r"text_model[._]encoder[._]layers[._]\d+[._](?:self_attn[._](?:[qkv]|out)_proj|mlp[._]fc[12])"
# The layers of diffusers' transformers that ComfyUI finds by these names (flux_to_diffusers and mmdit_to_diffusers of
# its comfy/utils.py); Chroma has FLUX.1's, so that its guidance layer is known by the checkpoint's own names alone.
_BLOCKS = (
    r"attn\.(?:to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
    r"|norm1(?:_context)?\.linear|ff(?:_context)?\.net\.(?:0\.proj|2)"
)
_OUTSIDE = (
    r"context_embedder|time_text_embed\.(?:timestep|text|guidance)_embedder\.linear_[12]|norm_out\.linear|proj_out"
)
FLUX_LAYERS = (
    rf"(?:transformer_blocks\.\d+\.(?:{_BLOCKS})|{_OUTSIDE}|x_embedder"
    r"|single_transformer_blocks\.\d+\.(?:attn\.to_[qkv]|proj_mlp|norm\.linear|proj_out))"
)
SD3_LAYERS = rf"(?:transformer_blocks\.\d+\.(?:{_BLOCKS}|attn2\.(?:to_[qkv]|to_out\.0))|{_OUTSIDE}|pos_embed\.proj)"


@dataclass(frozen=True)
class Spelling:
    """Module names that a program looks up, as a regular expression for the whole name, and for which models.

    `lost` are endings that it expects but does not find under these names: a magnitude then stays at its start, ||W0||.
    """

    pattern: str
    models: tuple[Model, ...] = EVERY
    lost: tuple[str, ...] = ()


def _own_names(layers: str, models: tuple[Model, ...]) -> Spelling:
    """These layers by diffusers' names, with their dots or flat."""
    flat = layers.replace(r"\.", "_")
    return Spelling(rf"transformer\.{layers}|(?:lycoris|lora_transformer)_{flat}", models)


@dataclass(frozen=True)
class Program:
    """One program's rules. W0 is the base's weight, V = W0 + s B A.

    knows        the models whose names for layers these rules have
    asked        whether the program itself, installed here, says what it reads (`stock.py`), and not `spellings`
    parts        the keys' endings that it reads, and what it takes them for; all other keys are dropped
    scale        s: from the header ("lora_adapter_metadata"), from `.alpha` / rank, or 1 where there is none
    axis         which way a norm runs: over each output's row, over each input's column, or told from the magnitude's
                 shape: by output if its first axis has as many entries as the layer has outputs
    output_norm  whether the norm of a row is that of V, as it should be, or that of W0; the norm of a column is V's
    magnitude    which shapes it takes: "peft" exactly [out], a convolution's [1, out, 1, 1]; "copied" what can be
                 copied into [out, 1, ...]; "broadcast" whatever torch broadcasts, rightly or not
    strength     w: "difference" W0 + w (W' - W0); "low rank" w scales s inside V; "ratio" V (1 + w (m / n - 1))
    on_error     what a shape that does not fit leads to: the layer is left out, or nothing is loaded
    swaps        layers, by their names in diffusers, whose two halves have changed places in the checkpoint: B A is
                 brought into its order, a magnitude by output is not (where the file has the checkpoint's name, all is)
    strict       module names (a pattern) for which one key that it does not know makes it refuse the file
    bias         what happens to the layer's bias
    """

    name: str
    label: str
    version: str
    sources: tuple[str, ...]
    read_on: str
    spellings: tuple[Spelling, ...] = ()
    asked: bool = False
    knows: tuple[Model, ...] = EVERY
    parts: Mapping[str, Part] = field(default_factory=dict)
    header: bool = False
    needs_alpha: bool = False
    axis: Literal["output", "input", "shape"] = "output"
    output_norm: Literal["V", "W0"] = "V"
    epsilon: float = 0.0
    magnitude: Literal["peft", "copied", "broadcast"] = "broadcast"
    strength: Literal["difference", "low rank", "ratio"] = "difference"
    on_error: Literal["skip", "stop"] = "stop"
    swaps: Mapping[Model, tuple[str, ...]] = field(default_factory=dict)
    strict: str = ""
    bias: str = "left as it is"


_KOHYA: dict[str, Part] = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_mid.weight": "core",
    "alpha": "alpha",
    "dora_scale": "magnitude",
    "diff": "difference",
}
_PEFT: dict[str, Part] = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_CHECKPOINTS_NAMES = Spelling(  # diffusers' are not found behind this
    r"diffusion_model\.(?!(?:single_)?transformer_blocks\.|(?:down|up)_blocks\.|mid_block\.|norm_out\.).+",
    ("unet", "sd3", "flux", "chroma", "flux2"),
)
_COMFY_SPELLINGS = (
    Spelling("lora_unet_.+", ("unet",)),
    Spelling(f"lora_unet_{ORIGINAL}.*", ("flux", "sd3", "chroma", "flux2")),
    Spelling(r"lora_unet_distilled_guidance_layer_(?:in|out)_proj", ("chroma",)),
    Spelling("lycoris_.+", ("unet", "qwen", "z-image")),
    _own_names(FLUX_LAYERS, ("flux", "chroma")),
    _own_names(SD3_LAYERS, ("sd3",)),
    # FLUX.2's modulation, which no block has of its own, is found by the checkpoint's name alone.
    Spelling(r"(?:lycoris_|lora_transformer_|transformer\.)(?:single_)?transformer_blocks[._].+", ("flux2",)),
    # Behind this the checkpoint's own names are found: Qwen-Image's are diffusers', Z-Image has q, k and v in one.
    Spelling("lora_unet_.+", ("qwen",)),
    Spelling(r"lora_unet_.+_(?:attention_(?:qkv|out)|feed_forward_w[123])", ("z-image",)),
    Spelling(r"transformer\..+|(?:transformer_blocks|layers|noise_refiner|context_refiner)\..+", ("qwen", "z-image")),
    # The attention's layers have a `processor.` before their names, as in diffusers' files of old; others have not.
    Spelling(r"(?:unet\.)?.+\.processor\..+", ("unet",)),
    Spelling(
        r"(?:unet\.)?(?!.*\.to_)(?:(?:down|up)_blocks\.|mid_block\.|time_embedding\.|add_embedding\.|conv_(?:in|out)$).*",
        ("unet",),
    ),
    Spelling(r"diffusion_model\..+", ("qwen", "z-image", "other")),
    _CHECKPOINTS_NAMES,
    Spelling(f"lora_te[12]?_{CLIP}"),
    Spelling(rf"text_encoder(?:_2)?\.{CLIP}"),
)
_COMFY_KEYS: dict[str, Part] = {
    **_KOHYA,
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
}
# {last} is the number of the last block.
_SWAPPED: dict[Model, tuple[str, ...]] = {
    "flux": ("norm_out.linear",),
    "sd3": ("norm_out.linear", "transformer_blocks.{last}.norm1_context.linear"),
}

PROGRAMS = (
    Program(
        name="diffusers",
        label="diffusers",
        version="0.42.1 (transformers 5.23)",
        sources=(
            "https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/loaders/lora_pipeline.py",
            "https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/loaders/lora_conversion_utils.py",
            "https://github.com/huggingface/diffusers/blob/v0.42.1/src/diffusers/utils/peft_utils.py",
        ),
        read_on="2026-11-23",
        asked=True,
        header=True,
        magnitude="peft",
        strength="low rank",
        bias="left as it is",
    ),
    Program(
        name="peft",
        label="PEFT",
        version="0.21.2",
        sources=("https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/dora.py",),
        read_on="2026-11-23",
        spellings=(Spelling(r"(?:base_model\.model|unet|transformer|text_encoder(?:_2)?)\..+"),),
        parts=_PEFT,
        header=True,
        magnitude="peft",
        strength="low rank",
    ),
    Program(
        name="comfyui",
        label="ComfyUI",
        version="commit 9c0cf36 (base.py), 6f98b15 (lora.py), ec93dca (keys)",
        sources=(
            "https://github.com/Comfy-Org/ComfyUI/blob/9c0cf36cd7964978850fd40f8cf76ac2cf9f9e15/comfy/weight_adapter/base.py",
            "https://github.com/Comfy-Org/ComfyUI/blob/6f98b150e065f1ffc788558574a887835068bd40/comfy/weight_adapter/lora.py",
            "https://github.com/Comfy-Org/ComfyUI/blob/ec93dcacb96b922f7cb1417b3ba22bccb082df32/comfy/lora.py",
        ),
        read_on="2026-11-23",
        spellings=_COMFY_SPELLINGS,
        knows=(*FIRST, "chroma", "flux2", "qwen", "z-image"),
        parts={**_COMFY_KEYS, "lora_A": "down", "lora_B": "up"},
        axis="shape",
        output_norm="W0",
        epsilon=FLOAT32_EPSILON,
        on_error="skip",
        swaps=_SWAPPED,
    ),
    Program(
        name="forge",
        label="Forge",
        version="commit cea9f37 (merge), 5e1dcd3 (keys)",
        sources=(
            "https://github.com/lllyasviel/stable-diffusion-webui-forge/blob/cea9f37fa5fd5b4c372b95bd46635f4241f60d26/backend/patcher/lora.py",
            "https://github.com/lllyasviel/stable-diffusion-webui-forge/blob/5e1dcd35a8535564884a4116f6bbb37dbb8dfc46/packages_3rdparty/comfyui_lora_collection/lora.py",
        ),
        read_on="2026-11-23",
        spellings=(
            *(s for s in _COMFY_SPELLINGS if s.models in (("unet",), EVERY)),
            _CHECKPOINTS_NAMES,
            Spelling(f"lora_unet_{ORIGINAL}.*", ("flux", "sd3")),
            Spelling("lycoris_.+", ("unet",)),
            _own_names(FLUX_LAYERS, ("flux",)),
        ),
        knows=FIRST,
        parts=_COMFY_KEYS,
        axis="shape",
        output_norm="W0",
        epsilon=FLOAT32_EPSILON,
        on_error="stop",
        swaps=_SWAPPED,
    ),
    Program(
        name="a1111",
        label="A1111",
        version="1.10 (pull request 16151 included)",
        sources=(
            "https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/v1.10.1/extensions-builtin/Lora/network.py",
            "https://github.com/AUTOMATIC1111/stable-diffusion-webui/blob/v1.10.1/extensions-builtin/Lora/networks.py",
            "https://github.com/AUTOMATIC1111/stable-diffusion-webui/pull/16151",
            "https://github.com/lllyasviel/stable-diffusion-webui-forge/blob/bed7d60a7e15ee3520f13f81227575cbb8f9b28c/packages_3rdparty/webui_lora_collection/network.py",
        ),
        read_on="2026-11-23",
        spellings=(
            Spelling("lora_unet_.+", ("unet",)),
            Spelling(f"lora_te[12]?_{CLIP}", ("unet",)),
            Spelling(r"transformer\..+", ("sd3",)),
        ),
        knows=FIRST,
        parts={**_KOHYA, "lora_A.weight": "down", "lora_B.weight": "up"},
        axis="input",
        on_error="skip",
    ),
    Program(
        name="invokeai",
        label="InvokeAI",
        version="6.14.2",
        sources=(
            "https://github.com/invoke-ai/InvokeAI/blob/v6.14.2/invokeai/backend/patches/layers/dora_layer.py",
            "https://github.com/invoke-ai/InvokeAI/blob/v6.14.2/invokeai/backend/patches/lora_conversions/sd_lora_conversion_utils.py",
            "https://github.com/invoke-ai/InvokeAI/blob/v6.14.2/invokeai/backend/model_manager/load/model_loaders/lora.py",
        ),
        read_on="2026-11-25",
        spellings=(
            Spelling("lora_unet_.+", ("unet",)),
            Spelling(f"lora_te[12]?_{CLIP}", ("unet",)),
            Spelling("lora_unet_(?:double|single)_blocks_.+", ("flux",)),
            Spelling("lora_transformer_(?:single_)?transformer_blocks_.+", ("flux",)),
            Spelling(r"(?:transformer|base_model\.model)\..+", ("flux",)),
            Spelling(f"lora_te1_{CLIP}", ("flux",)),
        ),
        knows=("unet", "flux"),
        parts={**_KOHYA, "lora_A.weight": "down", "lora_B.weight": "up"},
        axis="input",
        # A UNet's keys are grouped by what comes before their first dot; FLUX's in PEFT's names must be A and B alone.
        strict="(?!lora_).+",
    ),
    Program(
        name="stable-diffusion.cpp",
        label="sd.cpp",
        version="stable-diffusion-cpp-python 0.4.7",
        sources=(
            "https://github.com/leejet/stable-diffusion.cpp/blob/master/src/lora.hpp",
            "https://github.com/leejet/stable-diffusion.cpp/blob/master/src/name_conversion.cpp",
        ),
        read_on="2026-11-25",
        spellings=(
            Spelling("(?:lora_unet|lycoris)_.+", ("unet",)),
            Spelling(r"(?:unet|diffusion_model)\..+", ("unet",)),
            Spelling(f"lora_te[12]?_{CLIP}", ("unet",)),
        ),
        knows=("unet",),
        parts={key: part for key, part in _COMFY_KEYS.items() if part != "magnitude"},
    ),
    Program(
        name="lycoris",
        label="LyCORIS",
        version="4.1.3",
        sources=(
            "https://github.com/KohakuBlueleaf/LyCORIS/blob/v4.1.3/lycoris/modules/locon.py",
            "https://github.com/KohakuBlueleaf/LyCORIS/blob/v4.1.3/lycoris/functional/general.py",
        ),
        read_on="2026-11-23",
        spellings=(Spelling("(?:lora_unet|lora_te[123]?|lycoris)_.+"),),
        parts=_KOHYA,
        needs_alpha=True,
        axis="output",
        epsilon=FLOAT32_EPSILON,
        magnitude="copied",
        strength="ratio",
    ),
)


def program_named(name: str) -> Program:
    """The row of this name. Raises ConfigError."""
    for program in PROGRAMS:
        if name.lower() in (program.name, program.label.lower()):
            return program
    names = [program.name for program in PROGRAMS]
    near = nearest(name.lower(), names, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"no rules are known for a program {name!r}; there are rules for {', '.join(names)}.{hint}")

"""What other programs make of adapter files, as data: one row per program, with the source it was read from.

A row says which module names and which keys the program reads, and the formula it puts them into. They change: when a
program does, its row is mended, and docs/parity.md with it. `formula.py` computes what a row says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from dora_diffusion.errors import ConfigError, nearest
from dora_diffusion.formats.anatomy import Model
from dora_diffusion.inspection.comfyui_names import CHECKPOINT, CLIP_NAMES, DIFFUSERS_OF, FLAT_CLIP, UNET
from dora_diffusion.inspection.directions import ENDINGS
from dora_diffusion.inspection.spelling import EVERY, Spelling

__all__ = ["PROGRAMS", "Program", "Spelling", "program_named"]

Part = str  # down, up, core, alpha, magnitude (by output), difference; a form's tensors by their endings
FIRST: tuple[Model, ...] = ("unet", "sd3", "flux")
FLOAT32_EPSILON = 2.0**-23


@dataclass(frozen=True)
class Program:
    """One program's rules. W0 is the base's weight, V = W0 + s B A, or W0 and the direction of another form.

    knows        the models whose names for layers these rules have
    asked        whether the program itself, installed here, says what it reads (`stock.py`), and not `spellings`
    parts        the keys' endings that it reads, and what it takes them for; all other keys are dropped
    scale        s: from the header ("lora_adapter_metadata"), from `.alpha` / rank, or 1 where there is none
    axis         which way a norm runs: over each output's row, over each input's column, or told from the magnitude's
                 shape: by output if its first axis has as many entries as the layer has outputs; "whole shape": if
                 it is [out, 1, ...], or [out] where there are not as many inputs
    output_norm  whether the norm of a row is that of V, as it should be, or that of W0; the norm of a column is V's
    magnitude    which shapes it takes: "peft" exactly [out], a convolution's [1, out, 1, 1]; "copied" what can be
                 copied into [out, 1, ...]; "broadcast" whatever torch broadcasts, rightly or not
    strength     w: "difference" W0 + w (W' - W0); "low rank" w scales s inside V; "ratio" V (1 + w (m / n - 1))
    on_error     what a shape that does not fit leads to: the layer is left out, or nothing is loaded
    swaps        layers, by their names in diffusers, whose two halves have changed places in the checkpoint: B A is
                 brought into its order, a magnitude by output is not (where the file has the checkpoint's name, all is)
    forms        the forms that it reads beside LoRA and differences, and how it computes each (`directions.py`)
    decomposes   the forms whose magnitudes it reads; a file of another one with magnitudes is refused
    vectors      the endings of changes of biases and of normalisation layers that it reads; None where it is not known
    vectors_of   the models for which that is known
    loses_biases_of_parts   whether biases are lost of parts of a fused layer, and of halves that changed places, where
                 they go by diffusers' names
    biases_of_differences   whether it reads a bias beside a whole difference alone, and no difference of a norm
    cuts         whether it has fused layers in parts, and leaves out one with a norm by input, which has none
    unturned     whether it leaves the halves of a final layer as the checkpoint has them, where its model has others
    strict       module names (a pattern) for which one key that it does not know makes it refuse the file
    alone        a prefix that all keys have to have where one has it, or the file is refused
    least        the share of a file's keys that it has to find to take any
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
    axis: Literal["output", "input", "shape", "whole shape"] = "output"
    output_norm: Literal["V", "W0"] = "V"
    epsilon: float = 0.0
    magnitude: Literal["peft", "copied", "broadcast"] = "broadcast"
    strength: Literal["difference", "low rank", "ratio"] = "difference"
    on_error: Literal["skip", "stop"] = "stop"
    swaps: Mapping[Model, tuple[str, ...]] = field(default_factory=dict)
    forms: Mapping[str, str] = field(default_factory=dict)
    decomposes: tuple[str, ...] = ("lora", "loha", "lokr", "glora", "oft", "boft")
    vectors: Mapping[str, Part] | None = None
    vectors_of: tuple[Model, ...] = EVERY
    loses_biases_of_parts: bool = False
    biases_of_differences: bool = False
    cuts: bool = False
    unturned: bool = False
    strict: str = ""
    alone: str = ""
    least: float = 0.0
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


def _forms(**others: str) -> dict[str, str]:
    """Every form as LyCORIS computes it, but for these; "" for one that is not read."""
    return {form: how for form in ENDINGS if (how := others.get(form, form))}


def _keys_of(*forms: str) -> dict[str, Part]:
    return {ending: ending for form in forms for ending in ENDINGS[form]}


_COMFY_SPELLINGS = (*UNET, CHECKPOINT, *DIFFUSERS_OF.values(), *CLIP_NAMES)
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
    **_keys_of("loha", "lokr", "glora"),
}
_VECTORS: dict[str, Part] = {"diff_b": "bias", "w_norm": "norm", "b_norm": "norm_bias"}
_COMFY_FORMS = _forms(lokr="lokr of ComfyUI", oft="oft of ComfyUI", boft="boft of ComfyUI", ia3="")
# {last} is the number of the last block.
_SWAPPED: dict[Model, tuple[str, ...]] = {
    "flux": ("norm_out.linear",),
    "flux2": ("norm_out.linear",),
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
        spellings=(Spelling(("base_model.model.", "unet.", "transformer.", "text_encoder.", "text_encoder_2.")),),
        parts=_PEFT,
        vectors={"lora_B.bias": "scaled_bias"},
        header=True,
        magnitude="peft",
        strength="low rank",
    ),
    Program(
        name="comfyui",
        label="ComfyUI",
        version="0.33.0 (commit 783545f)",
        sources=(
            "https://github.com/Comfy-Org/ComfyUI/blob/783545f689a0af730065994b46b382ae24844c99/comfy/lora.py",
            "https://github.com/Comfy-Org/ComfyUI/blob/783545f689a0af730065994b46b382ae24844c99/comfy/utils.py",
            "https://github.com/Comfy-Org/ComfyUI/tree/783545f689a0af730065994b46b382ae24844c99/comfy/weight_adapter",
        ),
        read_on="2026-11-27",
        spellings=_COMFY_SPELLINGS,
        knows=(*FIRST, "chroma", "flux2", "qwen", "z-image"),
        parts={
            **_COMFY_KEYS,
            **_keys_of("oft"),
            **{"lora_A": "down", "lora_B": "up"},
            **{"lora_A.default.weight": "down", "lora_B.default.weight": "up"},
        },
        axis="shape",
        output_norm="W0",
        epsilon=FLOAT32_EPSILON,
        on_error="skip",
        swaps=_SWAPPED,
        forms=_COMFY_FORMS,
        vectors={**_VECTORS, "set_weight": "replacement"},
        loses_biases_of_parts=True,
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
            *UNET,
            CHECKPOINT,
            replace(DIFFUSERS_OF["flux"], prefixes=("transformer.", "lora_transformer_", "lycoris_")),
            *CLIP_NAMES,
        ),
        knows=FIRST,
        parts=_COMFY_KEYS,
        axis="shape",
        output_norm="W0",
        epsilon=FLOAT32_EPSILON,
        on_error="stop",
        swaps=_SWAPPED,
        forms=_forms(lokr="lokr of ComfyUI", oft="", boft="", ia3=""),
        vectors=_VECTORS,
        vectors_of=("unet", "sd3"),  # FLUX's norms are called otherwise in its model
        loses_biases_of_parts=True,
    ),
    Program(
        name="forge-neo",
        label="Forge Neo",
        version="commit 0cc5e9e (keys), 419825e (merge), 19cc879 (matching)",
        sources=(
            "https://github.com/Haoming02/sd-webui-forge-classic/blob/0cc5e9ea6256271a30f12ca6f102469fd32506e4/modules_forge/packages/comfy/lora.py",
            "https://github.com/Haoming02/sd-webui-forge-classic/blob/419825e77c7b28810a7607458bc7ea8a2e1405b1/backend/patcher/lora.py",
            "https://github.com/Haoming02/sd-webui-forge-classic/blob/19cc8799e8fc1fba08bee8bc5ea0adc8b2b641f8/extensions-builtin/sd_forge_lora/networks.py",
        ),
        read_on="2026-11-27",
        spellings=(
            *UNET,
            CHECKPOINT,
            replace(DIFFUSERS_OF["flux"], prefixes=("transformer.", "lora_transformer_", "lycoris_")),
            DIFFUSERS_OF["qwen"],
            replace(DIFFUSERS_OF["z-image"], prefixes=("diffusion_model.", "lycoris_")),
            *CLIP_NAMES,
        ),
        knows=("unet", "flux", "chroma", "flux2", "qwen", "z-image"),
        parts={
            **_COMFY_KEYS,
            **_keys_of("oft"),
            **{"lora_A": "down", "lora_B": "up"},
            **{"lora_A.default.weight": "down", "lora_B.default.weight": "up"},
        },
        axis="shape",
        output_norm="W0",
        epsilon=FLOAT32_EPSILON,
        on_error="skip",
        swaps=_SWAPPED,
        forms=_COMFY_FORMS,
        least=0.5,
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
            Spelling(("lora_unet_",), models=("unet",)),
            Spelling(("lora_te_", "lora_te1_", "lora_te2_"), models=("unet",), layers=FLAT_CLIP),
            Spelling(("transformer.",), models=("sd3",)),
        ),
        knows=FIRST,
        parts={**_KOHYA, **_keys_of(*ENDINGS), "lora_A.weight": "down", "lora_B.weight": "up"},
        axis="input",
        on_error="skip",
        forms=_forms(glora="glora of old", ia3="ia3 of A1111"),
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
            Spelling(("lora_unet_",), models=("unet",)),
            Spelling(("lora_te_", "lora_te1_", "lora_te2_"), models=("unet",), layers=FLAT_CLIP),
            Spelling(("lora_unet_",), models=("flux",), layers="(?:double|single)_blocks_.+"),
            Spelling(("lora_transformer_",), models=("flux",), layers="(?:single_)?transformer_blocks_.+"),
            Spelling(("transformer.", "base_model.model."), models=("flux",)),
            Spelling(("diffusion_model.",), "checkpoint", ("flux",)),
            Spelling(("lora_te1_",), models=("flux",), layers=FLAT_CLIP),
        ),
        knows=("unet", "flux"),
        parts={**_KOHYA, **_keys_of("loha", "lokr", "ia3"), "lora_A.weight": "down", "lora_B.weight": "up"},
        axis="input",
        forms=_forms(glora="", oft="", boft="", ia3="ia3 of A1111"),
        decomposes=("lora",),
        alone="diffusion_model.",
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
            Spelling(("lora_unet_", "lycoris_", "unet.", "diffusion_model."), models=("unet",)),
            Spelling(("lora_te_", "lora_te1_", "lora_te2_"), models=("unet",), layers=FLAT_CLIP),
        ),
        knows=("unet",),
        parts={key: part for key, part in _COMFY_KEYS.items() if part != "magnitude" and key not in ENDINGS["glora"]},
        forms={"loha": "loha", "lokr": "lokr of sd.cpp"},
    ),
    Program(
        name="sdnext",
        label="SD.Next",
        version="dev of 2026-07-24 (commit d11a619)",
        sources=(
            "https://github.com/vladmandic/sdnext/blob/d11a619a643e6dbce0e0bf3cd0a56cfdf0588140/modules/lora/lora_load.py",
            "https://github.com/vladmandic/sdnext/blob/d11a619a643e6dbce0e0bf3cd0a56cfdf0588140/modules/lora/network.py",
            "https://github.com/vladmandic/sdnext/blob/d11a619a643e6dbce0e0bf3cd0a56cfdf0588140/modules/lora/native_adapter.py",
            "https://github.com/vladmandic/sdnext/blob/d11a619a643e6dbce0e0bf3cd0a56cfdf0588140/pipelines/chroma/chroma_lora.py",
            "https://github.com/vladmandic/sdnext/blob/d11a619a643e6dbce0e0bf3cd0a56cfdf0588140/pipelines/flux/flux2_lora.py",
            "https://github.com/vladmandic/sdnext/blob/d11a619a643e6dbce0e0bf3cd0a56cfdf0588140/pipelines/z_image/zimage_lora.py",
        ),
        read_on="2026-11-27",
        spellings=(
            Spelling(("lora_unet_",), "diffusers", ("unet",)),
            Spelling(("lora_unet_",), "checkpoint", ("unet",)),
            Spelling(("lora_te_", "lora_te1_", "lora_te2_"), models=("unet",), layers=FLAT_CLIP),
            Spelling(("lora_unet_", "diffusion_model."), "checkpoint", ("chroma", "flux2", "z-image")),
            Spelling(("transformer.", "lora_transformer_", "lycoris_"), "diffusers", ("chroma", "flux2", "z-image")),
            Spelling(("lora_unet_", "diffusion_model."), "diffusers", ("z-image",)),
        ),
        knows=("unet", "chroma", "flux2", "z-image"),
        parts={
            **_KOHYA,
            **_keys_of(*ENDINGS),
            **{"lora_A.weight": "down", "lora_B.weight": "up"},
            **dict.fromkeys(("magnitude", "lora_magnitude_vector"), "magnitude by output"),
        },
        axis="whole shape",
        on_error="skip",
        cuts=True,
        unturned=True,
        forms=_forms(glora="glora of old", oft="oft of SD.Next", ia3="ia3 of A1111"),
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
        spellings=(Spelling(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "lycoris_")),),
        parts={**_KOHYA, **_keys_of(*ENDINGS)},
        forms=_forms(),
        vectors=_VECTORS,
        biases_of_differences=True,
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

"""What the files call a module, and what diffusers calls it.

Dialects write a module's path with dots behind a prefix ("unet.", "text_encoder."), or flat, with underscores
("lora_unet_down_blocks_0_..."); some name the blocks as the original checkpoints did ("input_blocks", "double_blocks").
`locate` leads all of them to one form: the path in diffusers' model, a text encoder's behind "text_encoder.". Flat
names are taken apart by a vocabulary of names with underscores in them; one that has an unknown word stays flat, and a
model with its real paths can still tell (`loading.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from dora_diffusion.formats import original
from dora_diffusion.formats.original import WHOLE, Part

__all__ = ["FLAT_PREFIXES", "TEXT_ENCODERS", "Located", "denoiser_prefix", "is_flux", "locate", "unflatten"]

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
DOTTED_PREFIXES = {"unet.": "", "transformer.": "", "diffusion_model.": "", **{f"{t}.": t for t in TEXT_ENCODERS}}
FLAT_PREFIXES = {
    "lora_unet_": "",
    "lora_transformer_": "",
    "lycoris_": "",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
PEFT_FOLDER = "base_model.model."
# Names with underscores in diffusers' and the original models; every other word stands alone.
COMPOUNDS: list[str] = re.findall(
    r"\w+",
    """
    down_blocks mid_block up_blocks transformer_blocks single_transformer_blocks to_q to_k to_v to_out add_q_proj
    add_k_proj add_v_proj to_add_out proj_in proj_out proj_mlp time_emb_proj time_embedding add_embedding linear_1
    linear_2 conv_in conv_out conv_shortcut norm1_context ff_context norm_out context_embedder x_embedder
    time_text_embed timestep_embedder text_embedder guidance_embedder pos_embed text_model self_attn q_proj k_proj
    v_proj out_proj text_projection wi_0 wi_1 input_blocks middle_block output_blocks in_layers out_layers emb_layers
    skip_connection time_embed label_emb double_blocks single_blocks img_attn txt_attn img_mlp txt_mlp img_mod txt_mod
    joint_blocks x_block context_block t_embedder y_embedder
    to_qkv_mlp_proj linear_in linear_out time_guidance_embed single_stream_modulation double_stream_modulation_img
    double_stream_modulation_txt noise_refiner context_refiner feed_forward cap_embedder all_x_embedder
    all_final_layer distilled_guidance_layer in_proj
    final_layer adaLN_modulation guidance_in img_in txt_in time_in vector_in in_layer out_layer
    """,
)
WORDS: list[str] = re.findall(
    r"\w+",
    """
    attentions resnets downsamplers upsamplers conv conv1 conv2 op attn attn1 attn2 ff net proj linear linear1 linear2
    norm norm1 encoder layers layer mlp fc1 fc2 block SelfAttention DenseReluDense q k v o wo wi out lin qkv modulation
    attention w1 w2 w3
    """,
)
_TOKEN = re.compile("(" + "|".join(sorted([*COMPOUNDS, *WORDS], key=len, reverse=True)) + r"|\d+)(?:_|$)")


@dataclass(frozen=True)
class Located:
    """Where a file's module lies: its parts by diffusers' names, and whether the name could not be taken apart."""

    parts: tuple[Part, ...]
    flat: bool = False


def locate(module: str, *, flux: bool = False, flux2: bool = False, layers_per_block: int = 2) -> Located:
    """Where a module lies that a file names so; the rest says what model the file is for."""
    name = module.removeprefix(PEFT_FOLDER)
    for prefix, component in (DOTTED_PREFIXES | FLAT_PREFIXES).items():
        if name.startswith(prefix):
            flat = prefix in FLAT_PREFIXES
            if component == "text_encoder_3" and flux and flat:
                component = (
                    "text_encoder_2"  # the T5 is the third text encoder in sd-scripts, the second in the pipeline
                )
            return _inside(name.removeprefix(prefix), component, flat, layers_per_block, flux2)
    return _inside(name, "", False, layers_per_block, flux2)


def _inside(name: str, component: str, flat: bool, layers_per_block: int, flux2: bool) -> Located:
    start = f"{component}." if component else ""
    path = unflatten(name) if flat else name
    if path is None:
        return Located((Part(start + name, WHOLE),), flat=True)
    if component:
        return Located((Part(start + _text_encoder_path(path), WHOLE),))
    flux = original.FLUX2 if flux2 else original.FLUX
    return Located(original.to_diffusers(_without_processor(path), layers_per_block, flux))


def _text_encoder_path(path: str) -> str:
    """transformers 5 has a CLIPTextModel without `text_model`; files name it all the same."""
    return f"text_model.{path}" if path.startswith("encoder.layers.") else path


def _without_processor(path: str) -> str:
    """The names of diffusers before it used PEFT: `attn1.processor.to_out` for `attn1.to_out.0`."""
    path = path.replace(".processor.", ".")
    # FLUX.2's single blocks have a `to_out` that is the layer itself.
    return path + ".0" if path.endswith(".to_out") and not path.startswith("single_transformer_blocks.") else path


def unflatten(name: str) -> str | None:
    """`down_blocks_0_attentions_1_to_q` with its dots again, or None where a word is not known."""
    words, at = [], 0
    while at < len(name):
        token = _TOKEN.match(name, at)
        if token is None:
            return None
        words.append(token[1])
        at = token.end()
    return ".".join(words) if words and not name.endswith("_") else None


def is_flux(modules: Iterable[str]) -> bool:
    return any(
        mark in module for module in modules for mark in ("single_blocks", "double_blocks", "single_transformer")
    )


def denoiser_prefix(modules: Iterable[str], layers: Iterable[str]) -> str:
    """ "unet" or "transformer", for files that do not say it themselves."""
    for module in modules:
        for prefix in ("unet", "transformer"):
            if module.removeprefix(PEFT_FOLDER).startswith(prefix + "."):
                return prefix
    diffusion = re.compile(r"((single_)?transformer_blocks|layers|(noise|context)_refiner)\.")
    return "transformer" if any(diffusion.match(layer) for layer in layers) else "unet"

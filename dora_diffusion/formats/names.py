"""What the files call a module, and what diffusers calls it.

Dialects write a module's path with dots behind a prefix ("unet.", "text_encoder."), or flat, with underscores
("lora_unet_down_blocks_0_..."); some name the blocks as the original checkpoints did ("input_blocks", "double_blocks"),
and ComfyUI the text encoders by what they are ("text_encoders.clip_l.transformer.").
`locate` leads all of them to one form: the path in diffusers' model, a text encoder's behind "text_encoder.". What a
name means depends on the model: its own names come first, then the original ones of its family. Where no model is
there, the names themselves tell the family, as far as they do (`models_of`), and flat ones are taken apart by a
vocabulary of names with underscores in them; one that has an unknown word stays flat.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from dora_diffusion.formats.aliases import plain_name
from dora_diffusion.formats.anatomy import MODELS, Anatomy, Model, model_of
from dora_diffusion.formats.norm_names import NORM_WORDS
from dora_diffusion.formats.original import WHOLE, Part, is_flux1, is_flux2

__all__ = [
    "DOTTED_PREFIXES",
    "TEXT_ENCODERS",
    "Located",
    "denoiser_prefix",
    "dotted",
    "encoder_named",
    "locate",
    "models_of",
    "one_spelling",
    "unflatten",
]

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
DOTTED_PREFIXES = {
    **{prefix: "" for prefix in ("unet.", "transformer.", "diffusion_model.", "model.diffusion_model.", "pipe.dit.")},
    **{f"{encoder}.": encoder for encoder in TEXT_ENCODERS},
}
FLAT_PREFIXES = {
    "lora_unet_": "",
    "lora_transformer_": "",
    "lycoris_": "",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
}
# ComfyUI's and OneTrainer's name of a text encoder, and which one of a pipeline that is. A T5 has another place in each
# family; those not named here, language models, are alone in theirs.
COMFYS_ENCODER = re.compile(r"text_encoders\.(\w+)\.(?:transformer\.)?")
BY_KIND = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
T5 = "t5xxl"
PLACE_OF_T5: dict[Model, str] = {"flux": "text_encoder_2", "chroma": "text_encoder"}
# What stands before a text encoder's layers in one release of transformers, or in one class, and not in the next.
HEADS = ("", "text_model.", "model.language_model.", "model.", "language_model.", "transformer.")
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
    to_qkv_mlp_proj to_qkv to_added_qkv to_kv linear1_qkv sformer_blocks
    linear_in linear_out time_guidance_embed single_stream_modulation double_stream_modulation_img
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
_TOKEN = re.compile(
    "(" + "|".join(sorted([*COMPOUNDS, *WORDS, *NORM_WORDS], key=len, reverse=True)) + r"|\d+(?:-\d+)?)(?:_|$)"
)


@dataclass(frozen=True)
class Located:
    """Where a file's module lies: its parts by diffusers' names, and whether the name could not be taken apart."""

    parts: tuple[Part, ...]
    flat: bool = False


@dataclass(frozen=True)
class _Name:
    """A module's name without its prefix: of which text encoder ("" for the denoiser), and whether it is flat."""

    component: str
    rest: str
    flat: bool


def _split(module: str) -> _Name:
    name = module.removeprefix(PEFT_FOLDER)
    if found := COMFYS_ENCODER.match(name):
        kind = found[1]
        return _Name(T5 if kind.startswith("t5") else BY_KIND.get(kind, "text_encoder"), name[found.end() :], False)
    for prefix, component in (DOTTED_PREFIXES | FLAT_PREFIXES).items():
        if name.startswith(prefix):
            rest = name.removeprefix(prefix).removeprefix(PEFT_FOLDER)
            is_flat = prefix in FLAT_PREFIXES
            # sd-scripts' third text encoder is the T5, whatever else is there.
            return _Name(T5 if is_flat and component == "text_encoder_3" else component, rest, is_flat)
    return _Name("", name, False)


def one_spelling(module: str) -> str:
    """A flat name without the dots that diffusers' kohya export leaves in that of a magnitude alone."""
    is_flat = module.startswith(tuple(FLAT_PREFIXES))
    return module.replace(".", "_") if is_flat else module


def locate(module: str, anatomy: Anatomy) -> Located:
    """Where a module lies that a file names so, in a model of this anatomy.

    A name that the model does not have comes back as it is, by diffusers' names as far as they can be told.
    """
    bare = module.removeprefix(PEFT_FOLDER)
    if bare in anatomy.paths:
        return _whole(bare)
    name = _split(module)
    if name.component:
        return _in_encoder(name, anatomy)
    return _in_denoiser_here(name, anatomy) or _in_denoiser(name, anatomy)


def _whole(layer: str, flat: bool = False) -> Located:
    return Located((Part(layer, WHOLE),), flat)


def _in_denoiser_here(name: _Name, anatomy: Anatomy) -> Located | None:
    """A layer of the model that is there, by its own name or, after that, by its original one; else None."""
    table, originals = (anatomy.flat, anatomy.flat_originals) if name.flat else ({}, anatomy.originals)
    own = [table.get(name.rest, "")] if name.flat else [name.rest, plain_name(name.rest), *_before_peft(name.rest)]
    path = next((path for path in (*own, originals.get(name.rest, "")) if path in anatomy.paths), None)
    return _whole(path) if path else None


def _in_denoiser(name: _Name, anatomy: Anatomy) -> Located:
    path = unflatten(name.rest) if name.flat else name.rest
    if path is None:
        return _whole(name.rest, flat=True)
    path = plain_name(path)
    path = next(iter(_before_peft(path)), path)
    parts = () if anatomy.has(path) else anatomy.parts(path)
    return Located(parts) if parts else _whole(path)


def _before_peft(path: str) -> tuple[str, ...]:
    """What diffusers called a layer before it used PEFT: `attn1.processor.to_out` is `attn1.to_out.0`."""
    plain = path.replace(".processor.", ".")
    # FLUX.2's single blocks have a `to_out` that is the layer itself.
    if plain.endswith(".to_out") and not plain.startswith("single_transformer_blocks."):
        return (plain + ".0",)
    return (plain,) if plain != path else ()


def encoder_named(kind: str, model: Model) -> str:
    """The text encoder of a family's pipeline that ComfyUI and OneTrainer call so: "clip_l", "t5"."""
    if kind.startswith("t5"):
        return PLACE_OF_T5.get(model, "text_encoder_3")
    return BY_KIND.get(kind, "text_encoder")


def _in_encoder(name: _Name, anatomy: Anatomy) -> Located:
    component = encoder_named(T5, anatomy.model) if name.component == T5 else name.component
    path = unflatten(name.rest) if name.flat else name.rest
    here = [anatomy.flat.get(f"{component}_{rest}", "") for rest in _heads_changed(name.rest, "_") if name.flat]
    if path is not None:
        here += [f"{component}.{rest}" for rest in _heads_changed(path, ".")]
    if found := next((path for path in here if path in anatomy.paths), None):
        return _whole(found)
    if path is None:
        return _whole(f"{component}.{name.rest}", flat=True)
    return _whole(f"{component}.{_with_text_model(path)}")


def _heads_changed(path: str, between: str) -> list[str]:
    """A text encoder's layer under each name that releases of transformers have had for it; the file's own first."""
    heads = [head.replace(".", between) for head in HEADS]
    bare = path.removeprefix(next((head for head in heads if head and path.startswith(head)), ""))
    return [path, *(head + bare for head in heads)]


def _with_text_model(path: str) -> str:
    """transformers 5 has a CLIPTextModel without `text_model`; files name it all the same."""
    return f"text_model.{path}" if path.startswith(("encoder.layers.", "final_layer_norm")) else path


def models_of(
    modules: Iterable[str], shapes: Mapping[str, tuple[int, int]], class_name: str, header: Mapping[str, str]
) -> tuple[Model, ...]:
    """The families that a file of these modules may be for: those that have the most of its names.

    `shapes` are outputs and inputs of the linear ones; `class_name` is the denoiser's, where the file says it.
    """
    if class_name != "unknown":
        return (model_of(class_name),)
    names = [name for name in map(_split, modules) if not name.component]
    counts = {model: sum(_is_of(name, Anatomy(model)) for name in names) for model in MODELS}
    most = max(counts.values())
    models = tuple(model for model in MODELS if most and counts[model] == most) or ("other",)
    if len(models) > 1 and (is_flux2(shapes) or is_flux1(shapes)):
        models = tuple(model for model in models if (model == "flux2") == is_flux2(shapes))
    said = [model for model in models if model in _said_by(header)]
    return tuple(said) or models


def _is_of(name: _Name, anatomy: Anatomy) -> bool:
    path = unflatten(name.rest) if name.flat else name.rest
    spelt = () if path is None else (path, plain_name(path), *_before_peft(path))
    return any(anatomy.has(p) or anatomy.parts(p) for p in spelt)


# What modelspec and sd-scripts call the families in a file's header.
_ARCHITECTURES: dict[str, Model] = {
    r"stable-diffusion-(v1|v2|xl)|sd_v[12]|sdxl": "unet",
    r"stable-diffusion-3|^sd3": "sd3",
    r"flux[-._]?1": "flux",
    r"flux[-._]?2": "flux2",
    r"chroma": "chroma",
    r"qwen": "qwen",
    r"z[-_]?image": "z-image",
}


def _said_by(header: Mapping[str, str]) -> Collection[Model]:
    said = [header.get(key, "").lower() for key in ("modelspec.architecture", "ss_base_model_version")]
    return {model for pattern, model in _ARCHITECTURES.items() if any(re.search(pattern, text) for text in said)}


def dotted(module: str) -> str:
    """The module's name with dots and without what stands before it, as far as that can be told."""
    name = _split(module)
    return (unflatten(name.rest) if name.flat else None) or name.rest


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


def denoiser_prefix(modules: Iterable[str], layers: Iterable[str], model: Model) -> str:
    """ "unet" or "transformer", for files that do not say it themselves."""
    for module in modules:
        for prefix in ("unet", "transformer"):
            if module.removeprefix(PEFT_FOLDER).startswith(prefix + "."):
                return prefix
    if model != "other":
        return "unet" if model == "unet" else "transformer"
    diffusion = re.compile(r"((single_)?transformer_blocks|layers|(noise|context)_refiner)\.")
    return "transformer" if any(diffusion.match(layer) for layer in layers) else "unet"

"""What other programs' lists of adapters show of a file, and choose by: modelspec's and sd-scripts' keys of the header.

A1111 lists an adapter only under models of its own kind, and takes one for Stable Diffusion 1 that has a header without
`ss_base_model_version`; Forge reads `modelspec.architecture`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dora_diffusion.formats.content import AdapterFile, by_layer
from dora_diffusion.formats.description import Description
from dora_diffusion.formats.forms import form_of

__all__ = ["modelspec"]


@dataclass(frozen=True)
class _Base:
    architecture: str
    ss_version: str
    implementation: str = "https://github.com/Stability-AI/generative-models"


SD1 = _Base("stable-diffusion-v1", "sd_v1", "https://github.com/CompVis/stable-diffusion")
SD2 = _Base("stable-diffusion-v2-512", "sd_v2", "https://github.com/Stability-AI/stablediffusion")
SD2_V = _Base("stable-diffusion-v2-768-v", "sd_v2_v", "https://github.com/Stability-AI/stablediffusion")
SDXL = _Base("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")
FLUX = _Base("flux-1-dev", "flux1", "https://github.com/black-forest-labs/flux")


def modelspec(file: AdapterFile, description: Description, *, is_xl: bool) -> dict[str, str]:
    """The header's entries; none for a base that these programs do not know. The width of the text tells a UNet's."""
    objective = description.training.get("objective")
    base = _base_of(file, is_xl, objective == "v_prediction")
    if base is None:
        return {}
    entries = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{base.architecture}/lora",
        "modelspec.implementation": base.implementation,
        "modelspec.title": file.path.stem,
        "ss_base_model_version": base.ss_version,
        "ss_network_dim": str(description.rank),
        "ss_network_alpha": str(description.alpha),
    }
    if base in (SD2, SD2_V):
        entries["ss_v2"] = "True"
    if objective in ("epsilon", "v_prediction"):
        entries["modelspec.prediction_type"] = "epsilon" if objective == "epsilon" else "v"
    if prompt := description.training.get("instance_prompt"):
        entries["modelspec.trigger_phrase"] = str(prompt)
    if resolution := description.training.get("resolution"):
        entries["modelspec.resolution"] = f"{resolution}x{resolution}"
    return entries


def _base_of(file: AdapterFile, is_xl: bool, predicts_v: bool) -> _Base | None:
    if file.prefix == "transformer":
        return FLUX if file.base.model_class == "FluxTransformer2DModel" else None
    if is_xl:
        return SDXL
    layers = {la: held for la, held in by_layer(file.tensors).items() if la.endswith(("attn2.to_k", "attn2.to_v"))}
    texts = {form_of(held).sizes(held).columns for held in layers.values()}
    return {frozenset({768}): SD1, frozenset({1024}): SD2_V if predicts_v else SD2}.get(frozenset(texts))

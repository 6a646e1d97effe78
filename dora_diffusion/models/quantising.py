"""Packing the frozen base's weights, so that it trains in less memory: NF4 (QLoRA, Dettmers et al. 2023) or int8."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from dora_diffusion.errors import ConfigError

if TYPE_CHECKING:  # the web app, which starts before torch is loaded, knows Packing
    import torch
    from torch import nn

__all__ = ["Packing", "base_label", "quantise"]

Packing = Literal["nf4", "int8"]
NF4_BLOCK = 64


def base_label(name: str, packing: Packing | None) -> str:
    """A base as people should read it: a packed one draws other pictures, so its packing belongs to its name."""
    return f"{name} ({packing})" if packing else name


def quantise(denoiser: nn.Module, packing: Packing, device: torch.device) -> int:
    """Pack the linear layers of the denoiser's blocks in place and move it to `device`; returns how many.

    The layers at both ends, embeddings, norms and the network that makes Chroma's modulations stay as they are: they
    are small, and their rounding is seen most. NF4 leaves layers whose rows are no whole number of blocks of 64 too.
    Raises ConfigError.
    """
    from torch import nn

    if packing not in get_args(Packing):
        raise ConfigError(f"quantise is {packing!r}; there is nf4 and int8.")
    stacks = tuple(f"{name}." for name, module in denoiser.named_modules() if isinstance(module, nn.ModuleList))
    layers = {
        name: layer
        for name, layer in denoiser.named_modules()
        if type(layer) is nn.Linear
        and name.startswith(stacks)
        and not name.startswith("distilled_guidance_layer.")
        and (packing == "int8" or layer.in_features % NF4_BLOCK == 0)
    }
    if not layers:
        raise ConfigError(f"quantise = {packing!r}: this base has no linear layer that can be packed.")
    try:
        _pack_nf4(denoiser, layers) if packing == "nf4" else _pack_int8(denoiser, set(layers.values()))
    except ImportError as error:
        raise ConfigError(
            f'quantise = {packing!r} needs {error.name}: pip install "dora-diffusion[quantised]".'
        ) from error
    denoiser.to(device)  # where bitsandbytes quantises
    return len(layers)


def _pack_nf4(denoiser: nn.Module, layers: dict[str, nn.Linear]) -> None:
    from bitsandbytes.nn import LinearNF4

    for name, layer in layers.items():
        packed = LinearNF4(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=layer.weight.dtype
        )
        packed.load_state_dict(layer.state_dict())
        # bitsandbytes would repack it for inference at the first preview, and it could not be trained through any more.
        packed.support_avx512bf16_for_cpu = False
        denoiser.set_submodule(name, packed)


def _pack_int8(denoiser: nn.Module, layers: set[nn.Linear]) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(denoiser, Int8WeightOnlyConfig(), filter_fn=lambda module, _: module in layers)

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


def quantise(denoiser: nn.Module, packing: Packing, device: torch.device, dtype: torch.dtype) -> int:
    """Pack the linear layers of the denoiser's blocks in place and move it to `device`; returns how many.

    They are packed from weights of this dtype, one layer at a time; a float32 denoiser is all float32 after it.
    The layers at both ends, embeddings, norms and the network that makes Chroma's modulations stay as they are: they
    are small, and their rounding is seen most. NF4 leaves layers whose rows are no whole number of blocks of 64 too.
    Raises ConfigError.
    """
    import torch
    from torch import nn

    from dora_diffusion.memory import give_back

    if packing not in get_args(Packing):
        raise ConfigError(f"quantise is {packing!r}; there is nf4 and int8.")
    stacks = tuple(f"{name}." for name, module in denoiser.named_modules() if isinstance(module, nn.ModuleList))
    names = [
        name
        for name, layer in denoiser.named_modules()
        if type(layer) is nn.Linear
        and name.startswith(stacks)
        and not name.startswith("distilled_guidance_layer.")
        and (packing == "int8" or layer.in_features % NF4_BLOCK == 0)
    ]
    if not names:
        raise ConfigError(f"quantise = {packing!r}: this base has no linear layer that can be packed.")
    try:
        pack = _pack_nf4 if packing == "nf4" else _pack_int8
        for name in names:  # each alone: the weights that it was made from go as soon as it stands
            layer: nn.Linear = denoiser.get_submodule(name)  # type: ignore[assignment]
            denoiser.set_submodule(name, pack(layer.float() if dtype == torch.float32 else layer, device))
            del layer
            give_back()
    except ImportError as error:
        raise ConfigError(
            f'quantise = {packing!r} needs {error.name}: pip install "dora-diffusion[quantised]".'
        ) from error
    denoiser.to(device)
    if dtype == torch.float32:
        denoiser.float()  # what is not packed, of a denoiser that was read as it lies on disk
    return len(names)


def _pack_nf4(layer: nn.Linear, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import LinearNF4

    packed = LinearNF4(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=layer.weight.dtype)
    packed.load_state_dict(layer.state_dict())
    # bitsandbytes would repack it for inference at the first preview, and it could not be trained through any more.
    packed.support_avx512bf16_for_cpu = False
    return packed.to(device)  # which packs it


def _pack_int8(layer: nn.Linear, device: torch.device) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig())
    return layer.to(device)

"""What diffusers takes from a file, asked of the installed diffusers itself.

It loads the file into a pipeline of the same models without weights (one number stands for each tensor's), and what it
has then in each layer is read off: the names, alphas and ranks that it knows are its own business, and its refusals are
its own words. `formula.py` computes what comes of it.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dora_diffusion.formats.names import TEXT_ENCODERS
from dora_diffusion.formats.original import WHOLE
from dora_diffusion.formats.original import Part as Piece
from dora_diffusion.inspection.reading import FileModule, Reading, is_magnitude, split_key

__all__ = ["read_by_diffusers"]

NAME = "file"  # of the adapter, in the pipeline without weights
LONGEST = 240  # characters of an error that are shown


def read_by_diffusers(
    path: Path, tensors: Mapping[str, Tensor], pipe: DiffusionPipeline, pieces_of: Callable[[str], tuple[Piece, ...]]
) -> Reading:
    """What `pipe.load_lora_weights(path)` would give each layer of this pipeline, which is left as it is.

    `pieces_of` says which layers a module of the file is, to find the keys that diffusers drops.
    """
    shell = _without_weights(pipe)
    try:
        with _silence():
            shell.load_lora_weights(str(path), adapter_name=NAME)
    except Exception as error:  # its own checks and its accidents alike: the file does not go in
        return Reading((), {}, f"refuses the file: {_in_short(error)}", by_layer=True)
    modules = tuple(_loaded(shell))
    taken = {module.name: module for module in modules}
    dropped: Counter[str] = Counter()
    for key in tensors:
        name, ending = split_key(key)
        found = [taken[piece.layer] for piece in pieces_of(name) if piece.layer in taken]
        lost = is_magnitude(ending) and all(module.magnitude is None for module in found)
        if not found or lost:
            dropped[ending] += 1
    return Reading(modules, dict(dropped), by_layer=True)


def _without_weights(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The same pipeline with the models that can be adapted, each tensor of theirs one number, and no others."""
    shell = copy.copy(pipe)
    loadable = getattr(pipe, "_lora_loadable_modules", ())
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            setattr(shell, name, _hollow(part) if name in loadable else None)
    return shell


def _hollow(model: nn.Module) -> nn.Module:
    """A model of this class and size. What its numbers are tells a magnitude that was loaded from one that was not."""
    build = getattr(type(model), "from_config", type(model))
    with torch.device("meta"):
        hollow = cast(nn.Module, build(model.config))
    for module in hollow.modules():
        for name, weight in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(_one_number(weight), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, _one_number(buffer))
    return hollow


def _one_number(tensor: Tensor) -> Tensor:
    value = math.nan if tensor.is_floating_point() else 0
    return torch.full((), value, dtype=tensor.dtype).expand(tensor.shape)


def _loaded(shell: DiffusionPipeline) -> Iterator[FileModule]:
    for name, part in shell.components.items():
        if not isinstance(part, nn.Module):
            continue
        start = f"{name}." if name in TEXT_ENCODERS else ""
        for path, layer in part.named_modules():
            if isinstance(layer, LoraLayer) and NAME in layer.scaling:
                yield _module(start + path, layer)


def _module(path: str, layer: LoraLayer) -> FileModule:
    down, up = (cast(Tensor, factors[NAME].weight).detach() for factors in (layer.lora_A, layer.lora_B))
    magnitude = None
    if NAME in layer.lora_magnitude_vector:
        magnitude = cast(Tensor, layer.lora_magnitude_vector[NAME].weight).detach()
    bias = layer.lora_B[NAME].bias if layer.lora_bias.get(NAME) else None
    untrained = magnitude is not None and bool(magnitude.isnan().any())
    return FileModule(
        path,
        (Piece(path, WHOLE),),
        down,
        up,
        alpha=layer.scaling[NAME] * down.shape[0],
        magnitude=None if untrained else magnitude,
        untrained=untrained,
        scaled_bias=None if bias is None else cast(Tensor, bias).detach(),
    )


def _in_short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= LONGEST else text[:LONGEST] + " ..."


@contextmanager
def _silence() -> Iterator[None]:
    """What the libraries say of a file, which is about to be said better."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "peft")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)

"""Adapter files as other programs write them, key by key, with the weights they mean by the formulas in float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import bases
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from oracles import dora_weight, lora_weight
from safetensors.torch import save_file
from torch import Tensor, nn

RANK, ALPHA = 4, 6.0


@functools.cache
def _whole(family: str) -> object:
    if family == "flux":
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=_whole("sd").text_encoder,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=bases.flux_transformer(),
        )
    pipe = bases.stable_diffusion() if family == "sd" else bases.stable_diffusion_xl()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fresh(family: str) -> object:
    """A small pipeline of its own: the models are copied, what reads texts is shared."""
    pipe = copy.copy(_whole(family))
    for name, part in _whole(family).components.items():
        if isinstance(part, nn.Module):
            setattr(pipe, name, copy.deepcopy(part))
    return pipe


@dataclass
class Made:
    """A file's tensors, and what W' - W0 it means for each layer of the model, in float64."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)

    def save(self, path: Path, metadata: dict[str, str] | None = None) -> Path:
        save_file({key: tensor.contiguous() for key, tensor in self.tensors.items()}, path, metadata=metadata)
        return path


@dataclass(frozen=True)
class Values:
    """One layer's A, B and norms of V as a start for magnitudes, before a dialect names them."""

    W0: Tensor
    A: Tensor
    B: Tensor
    by_output: Tensor
    by_input: Tensor
    s: float


def values_of(W0: Tensor, generator: torch.Generator, s: float = ALPHA / RANK, rank: int = RANK) -> Values:
    """As if trained: B away from zero, magnitudes up to 30 % away from the norms of W0."""
    W0 = W0.detach()
    out, inputs = W0.shape[:2]
    ones = (1,) * (W0.dim() - 2)
    A = torch.randn(rank, *W0.shape[1:], generator=generator) / W0[0].numel() ** 0.5
    B = 0.1 * torch.randn(out, rank, *ones, generator=generator)
    spread = [0.7 + 0.6 * torch.rand(n, generator=generator) for n in (out, inputs)]
    return Values(
        W0, A, B, W0.flatten(1).norm(dim=1) * spread[0], W0.transpose(0, 1).flatten(1).norm(dim=1) * spread[1], s
    )


def input_axis_weight(v: Values) -> Tensor:
    """V (m / ||V||), the norm by input, in float64."""
    V = lora_weight(v.W0, v.A, v.B, v.s)
    n = V.transpose(0, 1).flatten(1).norm(dim=1)
    return V * (v.by_input.double() / n).reshape(1, -1, *(1,) * (V.dim() - 2))


def lora_delta(v: Values) -> Tensor:
    return lora_weight(v.W0, v.A, v.B, v.s) - v.W0.double()


def dora_delta(v: Values) -> Tensor:
    return dora_weight(v.W0, v.A, v.B, v.by_output, v.s) - v.W0.double()


def input_axis_delta(v: Values) -> Tensor:
    return input_axis_weight(v) - v.W0.double()


def ai_toolkit_delta(v: Values) -> Tensor:
    """s B A + (m / n - 1) (W0 + B A) with n = ||W0 + B A||, as its forward pass has it."""
    V = lora_weight(v.W0, v.A, v.B, 1.0)
    n = V.flatten(1).norm(dim=1)
    return lora_delta(v) + (v.by_output.double() / n - 1).reshape(-1, *(1,) * (V.dim() - 1)) * V


Name = Callable[[str], str]
Leaves = Callable[[Values], Mapping[str, Tensor]]


def flat(prefix: str) -> Name:
    return lambda path: prefix + path.replace(".", "_")


def dotted(prefix: str) -> Name:
    return lambda path: prefix + path


def alpha(v: Values) -> dict[str, Tensor]:
    return {"alpha": torch.tensor(v.s * v.A.shape[0])}


def kohya(v: Values) -> dict[str, Tensor]:
    return {"lora_down.weight": v.A, "lora_up.weight": v.B, **alpha(v)}


def kohya_dora(v: Values) -> dict[str, Tensor]:
    return {**kohya(v), "dora_scale": v.by_output.reshape(-1, *(1,) * (v.W0.dim() - 1))}


def kohya_input_axis(v: Values) -> dict[str, Tensor]:
    return {**kohya(v), "dora_scale": v.by_input.reshape(1, -1, *(1,) * (v.W0.dim() - 2))}


def peft(v: Values) -> dict[str, Tensor]:
    return {"lora_A.weight": v.A, "lora_B.weight": v.B}


def old_diffusers(v: Values) -> dict[str, Tensor]:
    return {"down.weight": v.A, "up.weight": v.B}


def nvlabs(v: Values) -> dict[str, Tensor]:
    return {**peft(v), "weight_m_wdecomp.weight": v.by_output[:, None]}


def make(
    model: nn.Module,
    paths: Iterable[str],
    name: Name,
    leaves: Leaves,
    delta: Callable[[Values], Tensor],
    *,
    s: float = ALPHA / RANK,
    seed: int = 0,
    into: Made | None = None,
    between: str = ".",
    deltas_behind: str = "",
) -> Made:
    """Random values for these layers of a model, under the keys that a dialect gives them."""
    generator = torch.Generator().manual_seed(seed)
    made = into or Made()
    for path in paths:
        v = values_of(model.get_submodule(path).weight, generator, s)
        for leaf, tensor in leaves(v).items():
            made.tensors[name(path) + between + leaf] = tensor
        made.deltas[deltas_behind + path] = delta(v)
    return made

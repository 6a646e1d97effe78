"""What the tests measure against: the formulas of DoRA and LoRA in float64, and models called with fixed inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.injection import Adapter, AdapterConfig
from dora_diffusion.adapters.layers import LoRAUpdate

BY_INPUT = "dora by input"
KINDS = ("dora", BY_INPUT, "lora")  # what can be trained


def config_of(kind: str, **options: object) -> AdapterConfig:
    """The configuration of one of KINDS."""
    axis = {"kind": "dora", "norm_axis": "input"} if kind == BY_INPUT else {"kind": kind}
    return AdapterConfig(**axis, **options)  # type: ignore[arg-type]


def lora_weight(W0: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """W0 + s B A in float64, for a matrix or a convolution's kernel."""
    return W0.double() + s * (B.double().flatten(1) @ A.double().flatten(1)).reshape(W0.shape)


def dora_weight(W0: Tensor, A: Tensor, B: Tensor, m: Tensor, s: float) -> Tensor:
    """(m / n) (W0 + s B A) in float64, n a constant in the backward pass (Liu et al. 2024, section 4.3)."""
    V = lora_weight(W0, A, B, s)
    n = torch.linalg.vector_norm(V.detach().flatten(1), dim=1)
    return V * (m.double() / n).reshape(-1, *(1,) * (V.dim() - 1))


def input_axis_dora_weight(W0: Tensor, A: Tensor, B: Tensor, m: Tensor, s: float) -> Tensor:
    """The same with the norm of every input's column, over outputs and a convolution's kernel."""
    V = lora_weight(W0, A, B, s)
    n = torch.linalg.vector_norm(V.detach().transpose(0, 1).flatten(1), dim=1)
    return V * (m.double() / n).reshape(1, -1, *(1,) * (V.dim() - 2))


def formula_weight(W0: Tensor, parameters: Mapping[str, Tensor], s: float) -> Tensor:
    """W' of an update with these parameters, by their names, in float64; differentiable."""
    if "lora_A" not in parameters:
        return decomposed_weight(W0.double() + form_difference(W0, parameters, s), parameters)
    A, B = parameters["lora_A"], parameters["lora_B"]
    if "input_magnitude" in parameters:
        return input_axis_dora_weight(W0, A, B, parameters["input_magnitude"], s)
    if "magnitude" in parameters:
        return dora_weight(W0, A, B, parameters["magnitude"], s)
    return lora_weight(W0, A, B, s)


def form_difference(W0: Tensor, parameters: Mapping[str, Tensor], s: float) -> Tensor:
    """s dW of a LoKr or a LoHa in float64, by LyCORIS's definitions; with both of LoKr's factors whole s is 1."""
    held = {name: p.double() for name, p in parameters.items()}
    if "hada_w1_a" in held:
        dW = (held["hada_w1_a"] @ held["hada_w1_b"]) * (held["hada_w2_a"] @ held["hada_w2_b"])
    else:
        w2 = held["lokr_w2"] if "lokr_w2" in held else held["lokr_w2_a"] @ held["lokr_w2_b"]
        dW, s = torch.kron(held["lokr_w1"], w2.flatten(1)), 1.0 if "lokr_w2" in held else s
    return s * dW.reshape(W0.shape)


def decomposed_weight(V: Tensor, parameters: Mapping[str, Tensor], constant: bool = True) -> Tensor:
    """V with these magnitudes, along the axis that they have; the norm is a constant in the backward pass, unless
    `constant` says that it is not."""
    by_output = "magnitude" in parameters
    if not by_output and "input_magnitude" not in parameters:
        return V
    m = parameters["magnitude" if by_output else "input_magnitude"].double()
    rows = (V.detach() if constant else V).transpose(0, 0 if by_output else 1).flatten(1)
    shape = (-1, 1) if by_output else (1, -1)
    return V * (m / rows.norm(dim=1)).reshape(*shape, *(1,) * (V.dim() - 2))


def adapted_weight(W0: Tensor, update: LoRAUpdate) -> Tensor:
    """W' of this update by the formula, in float64."""
    return formula_weight(W0, {name: p.detach() for name, p in update.named_parameters()}, update.scale)


@torch.no_grad()
def perturb_update(update: LoRAUpdate, generator: torch.Generator, size: float = 0.1) -> None:
    """As if trained: B away from zero, magnitudes up to 30 % away from the norms."""
    update.lora_B.copy_(size * torch.randn(update.lora_B.shape, generator=generator))
    for m in (getattr(update, "magnitude", None), getattr(update, "input_magnitude", None)):
        if m is not None:
            m.mul_(0.7 + 0.6 * torch.rand(m.shape, generator=generator))


def perturb(adapter: Adapter, seed: int = 0, size: float = 0.1) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    for update in adapter.updates().values():
        perturb_update(update, generator, size)
    return adapter


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest expected value."""
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


def inputs_of(model: nn.Module) -> dict[str, Tensor]:
    """Fixed inputs for the small models of bases.py, by their class."""
    g = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    name = type(model).__name__
    if name == "UNet2DConditionModel":
        return {
            "sample": normal(1, 4, 8, 8),
            "timestep": torch.tensor([321]),
            "encoder_hidden_states": normal(1, 5, 32),
        }
    if name == "SD3Transformer2DModel":
        return {
            "hidden_states": normal(1, 4, 8, 8),
            "encoder_hidden_states": normal(1, 5, 32),
            "pooled_projections": normal(1, 64),
            "timestep": torch.tensor([321.0]),
        }
    assert name == "FluxTransformer2DModel"
    return {
        "hidden_states": normal(1, 16, 4),
        "encoder_hidden_states": normal(1, 5, 32),
        "pooled_projections": normal(1, 32),
        "timestep": torch.tensor([0.3]),
        "img_ids": torch.arange(48.0).reshape(16, 3) % 4,
        "txt_ids": torch.zeros(5, 3),
    }


@torch.no_grad()
def output_of(model: nn.Module) -> Tensor:
    return model(**inputs_of(model), return_dict=False)[0]

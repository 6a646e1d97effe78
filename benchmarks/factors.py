"""The numbers that every library's adapters get: the same tensors, layer by layer, far enough from the start that what
they change stands well above the rounding of half precision.

Of each layer the parameters go by this project's names, whatever a library calls them: lora_A, lora_B, lokr_w1 and so
on, and the magnitudes last.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["ALPHA_PER_RANK", "Factors", "set_factors"]

ALPHA_PER_RANK = 2  # s = alpha / rank = 2, so that no one can leave the scale out
Factors = Mapping[str, nn.Parameter]  # one layer's
Values = dict[str, Tensor]


def _lora(layer: Factors, size: float, generator: torch.Generator) -> Values:
    """The usual A, and B such that a row of s B A is about `size` long."""
    B, A = _low_rank(layer["lora_B"], layer["lora_A"], size / ALPHA_PER_RANK, generator)
    return {"lora_A": A, "lora_B": B}


def _lokr(layer: Factors, size: float, generator: torch.Generator) -> Values:
    """A row of kron(w1, w2) is as long as w1's row times w2's."""
    w1 = _uniform(layer["lokr_w1"], generator)
    size = size * 3**0.5  # a row of w1 has a norm of about 1 / sqrt(3)
    if "lokr_w2" in layer:
        w2 = torch.randn(layer["lokr_w2"].shape, generator=generator)
        return {"lokr_w1": w1, "lokr_w2": w2 * size / w2[0].numel() ** 0.5}
    a, b = _low_rank(layer["lokr_w2_a"], layer["lokr_w2_b"], size / ALPHA_PER_RANK, generator)
    return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b}


def _loha(layer: Factors, size: float, generator: torch.Generator) -> Values:
    """Elements of about 1 times elements of a row's share of `size`."""
    rank, columns = layer["hada_w1_b"].shape
    values = {name: torch.randn(layer[name].shape, generator=generator) for name in sorted(layer) if "hada" in name}
    values["hada_w1_a"] /= rank**0.5
    values["hada_w2_a"] *= size / ALPHA_PER_RANK / (columns * rank) ** 0.5
    return values


def _low_rank(up: Tensor, down: Tensor, size: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """up @ down with rows of about this length."""
    down = _uniform(down, generator)
    return size * (3 / len(down)) ** 0.5 * torch.randn(up.shape, generator=generator), down


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    bound = like[0].numel() ** -0.5
    return torch.empty(like.shape).uniform_(-bound, bound, generator=generator)


_OF: dict[str, Callable[[Factors, float, torch.Generator], Values]] = {
    "lora_A": _lora,
    "lokr_w1": _lokr,
    "hada_w1_a": _loha,
}


@torch.no_grad()
def set_factors(factors: Mapping[str, Factors], base: nn.Module) -> None:
    """An update about as large as W0 in every layer, and magnitudes up to 30 % away from the norms."""
    generator = torch.Generator().manual_seed(0)
    for path in sorted(factors):
        layer = factors[path]
        weight: Tensor = base.get_submodule(path).weight.detach().float().cpu()  # type: ignore[union-attr, operator]
        norms = weight.flatten(1).norm(dim=1)
        make = next(make for name, make in _OF.items() if name in layer)
        values = make(layer, float(norms.mean()), generator)
        # Drawn without magnitudes too: the next layer's numbers are the same.
        values["magnitude"] = norms * (0.7 + 0.6 * torch.rand(len(weight), generator=generator))
        columns = weight.transpose(0, 1).flatten(1).norm(dim=1)
        own = torch.Generator().manual_seed(len(columns))
        values["input_magnitude"] = columns * (0.7 + 0.6 * torch.rand(len(columns), generator=own))
        for name, parameter in layer.items():
            parameter.copy_(values[name].reshape(parameter.shape))

"""What a program computes from what it read, in float64: its rules from `programs.py` put into numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from dora_diffusion.inspection.directions import DIRECTIONS, DoesNotFit
from dora_diffusion.inspection.programs import Program
from dora_diffusion.inspection.reading import FileModule

__all__ = ["DoesNotFit", "halves_swapped", "program_update", "scale_of"]


def program_update(
    program: Program,
    module: FileModule,
    W0: Tensor,
    strength: float = 1.0,
    header_scale: float | None = None,
    swapped: bool = False,
) -> Tensor:
    """W' - W0 [out, in, ...] as the program computes it. `header_scale` is s as the file's header has it; `swapped`
    says that the program brings B A into the order of a checkpoint whose halves have changed places.

    Raises DoesNotFit where the program's own code would fail.
    """
    W0 = W0.double()
    if module.replacement is not None:
        return _replaced(module.replacement.double(), W0, swapped)
    if module.difference is not None:
        if module.difference.shape != W0.shape:
            raise DoesNotFit(f"the difference is {_shape(module.difference)}, the weight {_shape(W0)}")
        if program.biases_of_differences and W0.dim() == 1 and not module.of_norm:
            raise DoesNotFit("it reads a norm's difference as .w_norm alone")
        return strength * module.difference.double()
    if not module.form:
        return torch.zeros_like(W0)  # the file changes its bias alone
    m = module.magnitude
    if module.untrained:
        m = _peft_shaped(W0.flatten(1).norm(dim=1), W0)
    if m is not None and program.cuts and len(module.pieces) > 1 and not _is_by_output(program, m, W0):
        raise DoesNotFit("it has the fused layer in parts, and a norm by input has none")
    if m is None:
        return _direction(program, module, W0, strength, header_scale)
    if swapped and m.dim() > 0 and m.shape[0] == W0.shape[0]:
        m = halves_swapped(m)  # it stays where it is while the rows change places; seen from them, it moves
    inside = strength if program.strength == "low rank" else 1.0
    V = W0 + _direction(program, module, W0, inside, header_scale)
    g = _ratio(program, m.double(), W0, V)
    if program.strength == "ratio":
        return _product(V, 1 + strength * (g - 1)) - W0
    outside = strength if program.strength == "difference" else 1.0
    return outside * (_product(V, g) - W0)


def _replaced(W: Tensor, W0: Tensor, swapped: bool) -> Tensor:
    """W in the place of W0, whatever the strength; where its rows stay and all else is turned, seen from there."""
    if W.shape != W0.shape:
        raise DoesNotFit(f"the weight is {_shape(W0)}, that of the file {_shape(W)}")
    return (halves_swapped(W) if swapped else W) - W0


def _direction(program: Program, module: FileModule, W0: Tensor, strength: float, header_scale: float | None) -> Tensor:
    """The update without a magnitude, [out, in, ...]."""
    try:
        if module.form != "lora":
            others = {name: tensor.double() for name, tensor in module.others.items()}
            return DIRECTIONS[program.forms[module.form]](others, module.alpha, W0, strength)
        assert module.up is not None, "incomplete modules are not read"
        s = scale_of(program, module, header_scale)
        return strength * s * (module.up.double().flatten(1) @ _down(module).flatten(1)).reshape(W0.shape)
    except RuntimeError as error:
        raise DoesNotFit(f"the update does not have the weight's shape {_shape(W0)}") from error


def halves_swapped(tensor: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    return torch.cat(tensor.chunk(2)[::-1])


def _down(module: FileModule) -> Tensor:
    """A [r, in, ...], a Tucker core multiplied into it."""
    assert module.down is not None
    A = module.down.double()
    return A if module.core is None else torch.einsum("mn...,nj->mj...", module.core.double(), A.flatten(1))


def scale_of(program: Program, module: FileModule, header_scale: float | None) -> float:
    """s, as the program takes it from the file. Raises DoesNotFit where it needs one that is not there."""
    assert module.down is not None
    if program.header and header_scale is not None:
        return header_scale
    if module.alpha is not None:
        return module.alpha / module.down.shape[0]
    if program.needs_alpha:
        raise DoesNotFit("it needs an alpha for every module")
    return 1.0


def _ratio(program: Program, m: Tensor, W0: Tensor, V: Tensor) -> Tensor:
    """m / n, in whatever shape the program's own arithmetic gives it."""
    if _is_by_output(program, m, W0):
        normed = W0 if program.output_norm == "W0" else V
        n = normed.flatten(1).norm(dim=1).reshape(-1, *(1,) * (W0.dim() - 1))  # [out, 1, ...]
    else:
        n = V.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *(1,) * (W0.dim() - 2))  # [1, in, ...]
    try:
        return _magnitude(program, m, n) / (n + program.epsilon)
    except RuntimeError as error:
        raise DoesNotFit(f"a magnitude {_shape(m)} and norms {_shape(n)}") from error


def _is_by_output(program: Program, m: Tensor, W0: Tensor) -> bool:
    if program.axis == "shape":
        return m.dim() > 0 and m.shape[0] == W0.shape[0]
    if program.axis == "whole shape":
        return m.shape[:1] == W0.shape[:1] and (m.dim() > 1 or W0.shape[0] != W0.shape[1]) and m.numel() == m.shape[0]
    return program.axis == "output"


def _magnitude(program: Program, m: Tensor, n: Tensor) -> Tensor:
    if program.magnitude == "copied":
        return torch.empty_like(n).copy_(m)
    if program.magnitude == "peft":
        own = _peft_shaped(n, n)
        if m.shape != own.shape:
            raise DoesNotFit(f"a magnitude {_shape(m)} where it has {_shape(own)}")
        return m.reshape(n.shape)
    return m


def _peft_shaped(m: Tensor, W0: Tensor) -> Tensor:
    """[out], for a convolution [1, out, 1, 1]."""
    return m.flatten() if W0.dim() == 2 else m.reshape(1, -1, *(1,) * (W0.dim() - 2))


def _product(V: Tensor, g: Tensor) -> Tensor:
    try:
        W = V * g
    except RuntimeError as error:
        raise DoesNotFit(f"a weight {_shape(V)} and factors {_shape(g)}") from error
    if W.shape != V.shape:
        raise DoesNotFit(f"the result would be {_shape(W)}, the weight is {_shape(V)}")
    return W


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))

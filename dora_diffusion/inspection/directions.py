"""W' - W0 of the forms that are not B A, before any magnitude, as programs compute it from a file's tensors in float64.

The names are LyCORIS's. Most programs compute alike; where one does not, it has a function of its own here, and its row
in `programs.py` names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["DIRECTIONS", "ENDINGS", "OTHERWISE", "DoesNotFit", "form_of"]

Held = Mapping[str, Tensor]
# The forms by a tensor that they cannot do without, and the endings of their keys.
_MARKS = {"hada_w1_a": "loha", "lokr_w1": "lokr", "lokr_w1_a": "lokr", "a1.weight": "glora", "on_input": "ia3"}
ENDINGS: Mapping[str, tuple[str, ...]] = {
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "glora": ("a1.weight", "a2.weight", "b1.weight", "b2.weight"),
    "oft": ("oft_blocks", "rescale"),
    "boft": ("oft_blocks", "rescale"),
    "ia3": ("weight", "on_input"),
}


class DoesNotFit(Exception):
    """The program would fail at these shapes; the message says at what."""


def form_of(held: Held) -> str:
    """The form of which these tensors are; empty where they are of none."""
    if "oft_blocks" in held:
        return "boft" if held["oft_blocks"].dim() == 4 else "oft"
    return next((form for mark, form in _MARKS.items() if mark in held), "")


def _scale(alpha: float | None, rank: int | None) -> float:
    return 1.0 if alpha is None or rank is None else alpha / rank


def _rebuilt(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """a b, or with Tucker's core [r, r, ...] what it makes of a [r, n] and b [r, m]."""
    return a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a)


def _loha(held: Held, alpha: float | None, W0: Tensor, w: float) -> Tensor:
    first, second = (_rebuilt(held[f"hada_w{i}_a"], held[f"hada_w{i}_b"], held.get(f"hada_t{i}")) for i in (1, 2))
    return w * _scale(alpha, held["hada_w1_b"].shape[0]) * (first * second).reshape(W0.shape)


def _lokr(held: Held, alpha: float | None, W0: Tensor, w: float) -> Tensor:
    factor = next((held[name] for name in ("lokr_w2_b", "lokr_w1_b") if name in held), None)
    return w * _scale(alpha, None if factor is None else factor.shape[0]) * _kronecker(held).reshape(W0.shape)


def _kronecker(held: Held, as_it_lies: bool = False) -> Tensor:
    w1 = held["lokr_w1"] if "lokr_w1" in held else held["lokr_w1_a"] @ held["lokr_w1_b"]
    w2 = held.get("lokr_w2")
    if w2 is None:
        w2 = _rebuilt(held["lokr_w2_a"], held["lokr_w2_b"], held.get("lokr_t2"))
    return torch.kron(w1.reshape(*w1.shape, *(1,) * (w2.dim() - 2)), w2 if as_it_lies else w2.contiguous())


def _lokr_of_comfyui(held: Held, alpha: float | None, W0: Tensor, w: float) -> Tensor:
    """It gives torch.kron what Tucker's core makes as it lies in memory, where that fails (seen with torch 2.13)."""
    if "lokr_t2" in held:
        try:
            _kronecker(held, as_it_lies=True)
        except RuntimeError as error:
            raise DoesNotFit("torch.kron fails at what it makes of LoKr's Tucker core") from error
    return _lokr(held, alpha, W0, w)


def _lokr_of_sdcpp(held: Held, alpha: float | None, W0: Tensor, w: float) -> Tensor:
    """It has no Tucker's core, and takes a rank of 1 for two whole factors."""
    if "lokr_t2" in held:
        raise DoesNotFit("it has no Tucker core for LoKr")
    ranks = [held[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in held]
    return _lokr(held, None if ranks[:1] == [1] else alpha, W0, w)


def _glora(held: Held, alpha: float | None, W0: Tensor, w: float) -> Tensor:
    a1, a2, b1, b2 = (held[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    inputs = torch.einsum("oi...,ij->oj...", W0, a1 @ a2)
    return w * _scale(alpha, b2.shape[0]) * (inputs + (b1 @ b2).reshape(W0.shape))


def _glora_of_old(held: Held, alpha: float | None, W0: Tensor, w: float) -> Tensor:
    """LyCORIS's first order of the factors: W0 a2 a1 + b2 b1, which those of today do not fit."""
    a1, a2, b1, b2 = (held[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
    try:
        return w * ((b2 @ b1).reshape(W0.shape) + (W0.flatten(1) @ a2 @ a1).reshape(W0.shape))
    except RuntimeError as error:
        raise DoesNotFit("it takes GLoRA's factors in the order of LyCORIS before 2.0") from error


def _rotations(blocks: Tensor, limit: float) -> Tensor:
    """(I + Q) (I - Q)^-1, Q skew-symmetric and, with a limit above 0, of no larger norm."""
    Q = blocks - blocks.mT
    norm = float(Q.norm()) + 1e-8
    if limit > 0 and norm > limit:
        Q = Q * (limit / norm)
    I = torch.eye(Q.shape[-1], dtype=Q.dtype)  # noqa: E741
    return (I + Q) @ torch.linalg.inv(I - Q)


def _turned(W0: Tensor, R: Tensor) -> Tensor:
    """R^T in blocks along the outputs."""
    blocks, size = R.shape[:2]
    return torch.einsum("knm,kn...->km...", R, W0.reshape(blocks, size, *W0.shape[1:])).reshape(W0.shape)


def _limit(alpha: float | None, outputs: int) -> float:
    return (alpha or 0.0) * outputs


def _rescaled(W: Tensor, held: Held) -> Tensor:
    return W * held["rescale"].reshape(-1, *(1,) * (W.dim() - 1)) if "rescale" in held else W


def _oft(held: Held, alpha: float | None, W0: Tensor, w: float) -> Tensor:
    R = _rotations(held["oft_blocks"], _limit(alpha, W0.shape[0]))
    return w * (_rescaled(_turned(W0, R), held) - W0)


def _oft_of_comfyui(held: Held, alpha: float | None, W0: Tensor, w: float) -> Tensor:
    """It takes alpha itself for the limit, leaves `rescale` out, and multiplies by the strength twice."""
    return w * w * (_turned(W0, _rotations(held["oft_blocks"], alpha or 0.0)) - W0)


def _oft_of_sdnext(held: Held, alpha: float | None, W0: Tensor, w: float) -> Tensor:
    """It takes a limit of 0 for one, which lets nothing turn, and leaves `rescale` out."""
    if alpha is None:
        raise DoesNotFit("it needs an alpha for an OFT")
    if alpha == 0:
        return torch.zeros_like(W0)
    return w * (_turned(W0, _rotations(held["oft_blocks"], _limit(alpha, W0.shape[0]))) - W0)


def _butterfly(W0: Tensor, R: Tensor, w: float = 1.0) -> Tensor:
    W, size = W0, R.shape[-1]
    eye = torch.eye(size, dtype=R.dtype)
    for i, turn in enumerate(R):
        k = 2**i * (size // 2)
        W = W.unflatten(0, (-1, 2, k)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        W = torch.einsum("bij,bj...->bi...", w * turn + (1 - w) * eye, W).flatten(0, 1)
        W = W.unflatten(0, (-1, k, 2)).transpose(1, 2).flatten(0, 2)
    return W


def _boft(held: Held, alpha: float | None, W0: Tensor, w: float) -> Tensor:
    R = _rotations(held["oft_blocks"], _limit(alpha, W0.shape[0]))
    return w * (_rescaled(_butterfly(W0, R), held) - W0)


def _boft_of_comfyui(held: Held, alpha: float | None, W0: Tensor, w: float) -> Tensor:
    """It takes alpha itself for the limit, and the strength inside each turn as well as outside."""
    if alpha is None:
        raise DoesNotFit("it needs an alpha for a BOFT")
    return w * (_rescaled(_butterfly(W0, _rotations(held["oft_blocks"], alpha), w), held) - W0)


def _ia3(held: Held, alpha: float | None, W0: Tensor, w: float) -> Tensor:
    ones = (1,) * (W0.dim() - 2)
    by_input = bool(held["on_input"].item())
    return w * W0 * held["weight"].reshape((1, -1, *ones) if by_input else (-1, 1, *ones))


def _ia3_of_a1111(held: Held, alpha: float | None, W0: Tensor, w: float) -> Tensor:
    """It makes one column of the outputs' factors, whatever the weight's axes, so that convolutions fail."""
    if W0.dim() > 2 and not bool(held["on_input"].item()):
        raise DoesNotFit("its factors of the outputs have two axes, a convolution's weight four")
    return _ia3(held, alpha, W0, w)


DIRECTIONS: Mapping[str, Callable[[Held, float | None, Tensor, float], Tensor]] = {
    "loha": _loha,
    "lokr": _lokr,
    "lokr of ComfyUI": _lokr_of_comfyui,
    "lokr of sd.cpp": _lokr_of_sdcpp,
    "glora": _glora,
    "glora of old": _glora_of_old,
    "oft": _oft,
    "oft of ComfyUI": _oft_of_comfyui,
    "oft of SD.Next": _oft_of_sdnext,
    "boft": _boft,
    "boft of ComfyUI": _boft_of_comfyui,
    "ia3": _ia3,
    "ia3 of A1111": _ia3_of_a1111,
}
# In words, what is otherwise where a program has a function of its own.
OTHERWISE: Mapping[str, str] = {
    "lokr of sd.cpp": "takes no alpha for LoKr factors of rank 1, and no Tucker core",
    "glora of old": "takes GLoRA's factors in the order of old LyCORIS, which those of today do not fit",
    "oft of ComfyUI": "takes OFT's constraint without the number of outputs, no rescaling, and the strength twice",
    "oft of SD.Next": "takes OFT's constraint of 0 for one that lets nothing turn, and no rescaling",
    "boft of ComfyUI": "takes BOFT's constraint without the number of outputs, and the strength inside each turn too",
}

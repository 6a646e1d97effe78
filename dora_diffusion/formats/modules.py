"""One module of a file: whether its tensors go together, and the one form they are brought into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dora_diffusion.formats.original import Rows

__all__ = ["BY_ROW", "cannot_fall_apart", "check_module", "cut", "foreign_kind", "has_no_parts", "one_form"]

MAGNITUDES = ("magnitude", "unscaled_magnitude", "dora_scale")
BY_ROW = ("lora_B", "magnitude", "unscaled_magnitude", "difference")  # what has a row for each output


def check_module(held: Mapping[str, Tensor]) -> tuple[list[str], list[str]]:
    """What is missing of a module, and what is misshapen, each in words."""
    if "difference" in held:
        beside = [p for p in held if p not in ("difference", "alpha")]
        D = held["difference"]
        wrong = [f"difference of shape {list(D.shape)}"] if D.dim() not in (2, 4) or not D.numel() else []
        return [], wrong + [f"{p} beside a whole difference" for p in beside] + _alpha_problems(held)
    missing = [p for p in ("lora_A", "lora_B") if p not in held]
    if missing:
        return missing, []
    A, B = held["lora_A"], held["lora_B"]
    if not _pair_up(A, B, held.get("lora_mid")):
        mid = f", lora_mid {list(held['lora_mid'].shape)}" if "lora_mid" in held else ""
        return [], [f"no rank in common: lora_A {list(A.shape)}, lora_B {list(B.shape)}{mid}"]
    wrong = [
        f"{p} of shape {list(held[p].shape)} for {_sizes(A, B)}" for p in MAGNITUDES if p in held and not _fits(p, held)
    ]
    if sum(p in held for p in MAGNITUDES) > 1:
        wrong.append("two magnitudes")
    return [], wrong + _alpha_problems(held)


def foreign_kind(held: Mapping[str, Tensor]) -> str:
    """What a module is that is sound and not read here; empty for one that is read, or broken."""
    dims = {held[p].dim() for p in ("lora_A", "lora_B", "difference") if p in held}
    if dims == {1} and "difference" in held:
        return "a change of normalisation weights or biases"
    if dims and dims <= {3, 5}:
        return "an update of convolutions along one axis or three, as models for sound and video have them"
    return ""


def _pair_up(A: Tensor, B: Tensor, mid: Tensor | None) -> bool:
    """Whether A is [r, in, ...] and B [out, r, ...] for one r of at least 1; between them a core [r, r, ...]."""
    if A.dim() != B.dim() or A.dim() not in (2, 4) or min(*A.shape, *B.shape) < 1 or set(B.shape[2:]) - {1}:
        return False
    if mid is None:
        return A.shape[0] == B.shape[1]
    core = mid.dim() == 4 and A.dim() == 4 and set(A.shape[2:]) == {1} and min(mid.shape) > 0
    return core and mid.shape[:2] == (B.shape[1], A.shape[0])


def _sizes(A: Tensor, B: Tensor) -> str:
    return f"{B.shape[0]} outputs and {A.shape[1]} inputs"


def _fits(parameter: str, held: Mapping[str, Tensor]) -> bool:
    m, out = held[parameter], held["lora_B"].shape[0]
    ones = (1,) * (held["lora_A"].dim() - 2)
    if parameter == "dora_scale":
        return tuple(m.shape) in ((out, 1, *ones), (1, held["lora_A"].shape[1], *ones), (out,), (out, 1))
    return tuple(m.shape) in ((out,), (out, 1), (1, out, *ones), (out, 1, *ones))


def _alpha_problems(held: Mapping[str, Tensor]) -> list[str]:
    alpha = held.get("alpha")
    if alpha is None:
        return []
    if alpha.numel() != 1:
        return [f"alpha of shape {list(alpha.shape)}"]
    value = float(alpha)
    return [] if math.isfinite(value) and value > 0 else [f"alpha is {value:g}; it must be above 0"]


def one_form(held: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A checked module's tensors by the names of our parameters, and what is worth saying of it."""
    tensors, notes = dict(held), []
    if "lora_mid" in tensors:
        down = tensors["lora_A"].flatten(1).float()  # [r, in]
        tensors["lora_A"] = torch.einsum("mn...,nj->mj...", tensors.pop("lora_mid").float(), down)
        notes.append("lora_mid (a Tucker core) is multiplied into lora_A: the same update, without the core")
    if "dora_scale" in tensors:
        m, out = tensors.pop("dora_scale"), tensors["lora_B"].shape[0]
        by_output = m.shape[0] == out and m.numel() == out
        if by_output and m.dim() == 1 and tensors["lora_A"].shape[1] == out:
            notes.append("a dora_scale with one axis on a square layer: read as the norm by output, as PEFT writes it")
        tensors["magnitude" if by_output else "input_magnitude"] = m.flatten()
    for parameter in ("magnitude", "unscaled_magnitude"):
        if parameter in tensors:
            tensors[parameter] = tensors[parameter].flatten()
    return tensors, notes


def cannot_fall_apart(tensors: Mapping[str, Tensor], rows: Sequence[Rows]) -> str:
    """Why a fused layer's update has no such rows; empty when it has."""
    height = tensors["lora_B" if "lora_B" in tensors else "difference"].shape[0]
    if not all(part.fits(height) for part in rows):
        return f"{height} rows do not fall into {rows[0].of} equal shares"
    return ""


def has_no_parts(tensors: Mapping[str, Tensor], rows: Sequence[Rows]) -> str:
    """What a sound update of a fused layer is that is not the sum of its parts; empty for one that is."""
    if len(rows) > 1 and "input_magnitude" in tensors:
        return (
            "a DoRA whose norm by input runs over all rows of a fused layer, which diffusers has in parts, so that "
            "there is no exact way to cut it (a norm by output can be cut)"
        )
    return ""


def cut(tensors: Mapping[str, Tensor], rows: Sequence[Rows]) -> list[dict[str, Tensor]]:
    """The parts of a fused layer's update, each with its rows; of one that was put together of several, their ranks."""
    parts = [{p: part.cut(t) if p in BY_ROW else t for p, t in tensors.items()} for part in rows]
    if len(parts) < 2 or not tensors.keys() >= {"lora_A", "alpha"}:
        return parts
    used = [part["lora_B"].flatten(1).ne(0).any(dim=0) for part in parts]  # [rank] of each
    if not torch.stack(used).sum(dim=0).eq(1).all() or not all(columns.any() for columns in used):
        return parts
    for part, columns in zip(parts, used):
        part["lora_A"], part["lora_B"] = part["lora_A"][columns], part["lora_B"][:, columns]
        part["alpha"] = part["alpha"].double() * (columns.sum() / columns.numel())  # s stays
    return parts
